"""WebDataset: tar shards whose samples are adjacent members that share their name up to the first dot."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.pipelines.parsing import parse_json
from fastdeit.pipelines.sources import tar
from fastdeit.pipelines.sources.base import SampleError, SourceError, class_number

# The last part of a member's extension; the formats that `encode` reads.
IMAGES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2"}
MAX_LABEL = 1 << 20  # bytes of a label's member

_RULE = "the members of a sample share their name up to its first dot. Rename them"
# By the number in `_SAMPLE`'s `problem`.
_PROBLEMS = (
    "",
    f"no image in this sample; {_RULE}",
    f"one of several images in a sample; {_RULE}",
    f"no .cls or .json with its label in this sample; {_RULE}",
)

_SAMPLE = np.dtype(
    [
        ("shard", "<i4"),
        ("problem", "<i4"),
        ("json", "?"),
        ("image", "<i8", 2),  # offset and size
        ("label", "<i8", 2),
    ]
)


class WebDataset:
    """Samples of tar shards, in order: an image, and a label in a `.cls` (a number) or a `.json`.

    label_key  key of the label in a .json

    Reading a sample without an image or a label raises SampleError; so does each image of a sample with several.
    `left_out` counts the archives that were skipped for their names. Raises SourceError for shards that `tar.index`
    refuses, and if the members of a sample are not adjacent.
    """

    in_memory = False

    def __init__(
        self,
        pattern: str,
        shards: list[Path],
        class_names: list[str] | None = None,
        label_key: str = "label",
        left_out: int = 0,
    ) -> None:
        self.pattern = pattern
        self.class_names = class_names
        self._key = label_key
        self._shards = []
        for path in shards:
            shard = tar.Archive(path, limit=0)
            self._shards.append(shard)
        self._names: list[str] = []
        self._counts: Counter[str] = Counter(hidden_files=left_out)
        samples: list[tuple[Any, ...]] = []
        with tar.progress(sum(shard.size for shard in self._shards)) as bar:
            for number, shard in enumerate(self._shards):
                members = tar.index(shard, str(shard.path), bar=bar)
                self._counts["hidden_files"] += members.ignored
                samples += self._samples(number, members)
        if not samples:
            raise SourceError(f"{pattern}: no samples in it")
        self._table = np.array(samples, _SAMPLE)

    def _samples(self, shard: int, members: tar.Members) -> list[tuple[Any, ...]]:
        groups: dict[str, list[int]] = {}
        last = None
        for i, name in enumerate(members.names):
            key = _key(name)
            if key != last and key in groups:
                path = self._shards[shard].path
                raise SourceError(
                    f"{path}:{name}: does not lie with the rest of its sample. Sort the archive by name. If it is of "
                    f"another sample: {_RULE}"
                )
            groups.setdefault(key, []).append(i)
            last = key
        return [sample for key, group in groups.items() for sample in self._group(shard, members, key, group)]

    def _group(self, shard: int, members: tar.Members, key: str, group: list[int]) -> list[tuple[Any, ...]]:
        """The sample of the members of one key; one for each image if there are several, so errors can name each."""
        extension = {i: members.names[i][len(key) + 1 :].lower() for i in group}
        images = [i for i in group if extension[i].rpartition(".")[2] in IMAGES]
        label = next((i for kind in ("cls", "json") for i in group if extension[i] == kind), None)
        problem = 1 if not images else 2 if len(images) > 1 else 3 if label is None else 0
        self._counts["incomplete_samples"] += (problem != 0) * max(len(images), 1)
        self._counts["other_members"] += len(group) - len(images) - (label is not None)
        self._names += [members.names[image] for image in images] or [key]

        def place(i: int | None) -> tuple[int, int]:
            return (0, 0) if i is None else (int(members.offset[i]), int(members.size[i]))

        is_json = label is not None and extension[label] == "json"
        return [(shard, problem, is_json, place(image), place(label)) for image in images or [None]]

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        return f"{self._shards[self._table['shard'][index]].path}:{self._names[index]}"

    def inputs(self) -> list[Path]:
        return [shard.path for shard in self._shards]

    def describe(self) -> dict[str, Any]:
        return {"kind": "webdataset", "path": self.pattern, "shards": len(self._shards), **self._counts}

    def read(self, index: int) -> tuple[bytes, int, str]:
        name = self.name(index)
        sample = self._table[index]
        if sample["problem"]:
            raise SampleError(f"{name}: {_PROBLEMS[sample['problem']]}")
        shard = self._shards[sample["shard"]]
        if sample["label"][1] > MAX_LABEL:
            raise SampleError(f"{name}: a label of {sample['label'][1]} bytes, but at most {MAX_LABEL} are allowed")
        label = self._label(name, shard.member(name, *sample["label"].tolist()), bool(sample["json"]))
        return shard.member(name, *sample["image"].tolist()), label, name

    def _label(self, name: str, data: bytes, is_json: bool) -> int:
        if not is_json:
            if re.fullmatch(rb"\s*-?\d{1,18}\s*", data):
                return int(data)
            raise SampleError(f"{name}: its .cls holds {data[:40]!r}, not the number of a class. Mend the label")
        try:
            label = parse_json(data, MAX_LABEL)[self._key]
        except ValueError as error:
            raise SampleError(f"{name}: its .json cannot be read ({error}). Mend the label") from error
        except (KeyError, TypeError, IndexError) as error:
            raise SampleError(f"{name}: its .json holds no '{self._key}': name another with #label=KEY") from error
        return class_number(label, name, f"'{self._key}' of its .json")


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
