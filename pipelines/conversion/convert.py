"""Converts a source of images into one of two formats, on all cores, in a fixed order, whole or not at all."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL
from PIL import features

from fastdeit.pipelines.console import report as say_report
from fastdeit.pipelines.conversion.destination import check_apart, rejects_path
from fastdeit.pipelines.conversion.encode import Encoding, Mode
from fastdeit.pipelines.conversion.job import Conversion
from fastdeit.pipelines.conversion.workers import ConvertError, Reject
from fastdeit.pipelines.errors import printable
from fastdeit.pipelines.formats.beton_writer import BetonWriter
from fastdeit.pipelines.formats.shard_writer import DEFAULT_SHARD_SIZE, ShardWriter
from fastdeit.pipelines.formats.writer import Writer
from fastdeit.pipelines.sources import Source, open_source
from fastdeit.pipelines.sources.files import is_folder

Format = Literal["beton", "webdataset"]
OnError = Literal["fail", "skip"]

NAMED = 5  # rejects named in the report


@dataclass(frozen=True)
class Report:
    """The result of a conversion.

    counts    images by each of `encode.CHANGES`
    rejects   images left out
    done      images handled in this run; fewer than all if it resumed an interrupted one
    bytes     size of the data set
    seconds   wall clock
    sidecar   the sidecar beside the data
    notes     further remarks, a sentence each
    """

    dest: Path
    num_samples: int
    num_classes: int
    counts: dict[str, int]
    rejects: list[Reject]
    done: int
    bytes: int
    seconds: float
    sidecar: dict[str, Any]
    notes: list[str]

    def __str__(self) -> str:
        facts = {k: len(v) if isinstance(v, list) else v for k, v in self.sidecar["source"].items()}
        source = ", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in facts.items() if fact)
        counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in self.counts.items() if n)
        lines = [
            f"{self.dest}: {self.num_samples} images in {self.num_classes} classes, {self.bytes / 1e6:.1f} MB",
            f"  source: {source}",
            f"  images: {counts}",
            f"  {self.seconds:.1f} s, {self.done / self.seconds:.0f} images/s",
        ]
        if self.rejects:
            lines.append(f"  left out: {len(self.rejects)}, listed in {rejects_path(self.dest)}")
            lines += [f"    {reject.name}: {reject.reason}" for reject in self.rejects[:NAMED]]
            if len(self.rejects) > NAMED:
                lines.append(f"    and {len(self.rejects) - NAMED} more")
        return "\n".join(map(printable, lines + [f"  note: {note}" for note in self.notes]))


def convert(
    source: str | os.PathLike[str] | Source,
    dest: str | os.PathLike[str],
    *,
    format: Format = "beton",
    max_side: int | None = None,
    mode: Mode = "auto",
    quality: int = 92,
    workers: int = 0,
    shuffle_seed: int | None = None,
    limit: int | None = None,
    class_names: list[str] | None = None,
    on_error: OnError = "fail",
    resume: bool = False,
    real_labels: str | os.PathLike[str] | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    nodes: int = 1,
    progress: bool = True,
) -> Report:
    """Write the images of `source` to `dest`, a beton file with its sidecar or a folder of shards.

    source        a text for `open_source`, or an open source
    max_side, mode, quality   how images are stored, see `Encoding`
    workers       processes; 0: one per usable core, one for a small data set. Changes no byte of the result
    shuffle_seed  store the samples in a random order; None: in the source's order
    limit         convert only the first `limit` samples of that order
    class_names   for `open_source`
    on_error      "fail": an unreadable image ends the conversion and is named; "skip": it is left out and listed in
                  `rejects_path`
    resume        continue an interrupted conversion of the same source and options; the result has the same bytes as
                  an uninterrupted one
    real_labels   ImageNet-ReaL's labels for the sidecar, see `sources.imagenet.real_labels`
    shard_size, nodes   for the format webdataset, see `ShardWriter`
    progress      show a progress bar and print the report

    Worker processes are spawned, so a script that calls this needs an `if __name__ == "__main__"` guard. Until it is
    complete, the data set lies under names that end in `.partial`, with a journal beside it, and an existing `dest`
    stays as it is. An error or interrupt leaves these files for `resume`. A conversion replaces only a data set that a
    conversion wrote, and no file that the source reads. Raises SourceError, ConvertError, BetonError or ShardError,
    and JournalError if another conversion is writing to `dest`.
    """
    start = time.perf_counter()
    encoding = Encoding(mode=mode, quality=quality, max_side=max_side)
    for name, value, known in (("format", format, Format), ("on_error", on_error, OnError)):
        if value not in get_args(known):
            raise ConvertError(f"{name} '{value}' is not one of {', '.join(get_args(known))}")
    if isinstance(source, (str, os.PathLike)):
        source = open_source(source, class_names=class_names)
    elif class_names is not None:
        raise ConvertError("the source is already open: give class_names to open_source")
    dest = Path(dest)
    if not is_folder(dest.parent):
        raise ConvertError(f"{dest}: the folder {dest.parent} does not exist: create it first")
    if not dest.name:
        raise ConvertError(f"{dest}: has no name of its own: name a file or folder in it, e.g. {dest / 'train'}")
    check_apart(dest, format, source)
    if format == "beton" and is_folder(dest):
        raise ConvertError(f"{dest}: is a folder: name a file, e.g. {dest / 'train.beton'}")
    options = {
        "format": format,
        "mode": mode,
        "quality": quality,
        "max_side": max_side,
        "shuffle_seed": shuffle_seed,
        "limit": limit,
        "pillow": PIL.__version__,
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
    }
    order = sample_order(len(source), shuffle_seed, limit)
    writer: Writer
    if format == "beton":
        writer = BetonWriter(dest, len(order))
    else:
        writer = ShardWriter(dest, len(order), shard_size=shard_size, nodes=nodes)
        options |= {"shard_size": shard_size, "nodes": nodes}
    conversion = Conversion(source, dest, order, options, None if real_labels is None else Path(real_labels))
    sidecar = conversion.write(writer, encoding, workers, skip=on_error == "skip", resume=resume, progress=progress)
    report = Report(
        dest=dest,
        num_samples=sidecar["num_samples"],
        num_classes=len(sidecar["class_names"]),
        counts=dict(conversion.counts),
        rejects=conversion.rejects,
        done=conversion.position - conversion.restored,
        bytes=_size(dest),
        seconds=time.perf_counter() - start,
        sidecar=sidecar,
        notes=conversion.notes,
    )
    if progress:
        say_report(str(report), f"{dest} is complete")
    return report


def sample_order(count: int, shuffle_seed: int | None, limit: int | None) -> np.ndarray:
    """Source indices in the order they are stored, (N,) int64. Raises ConvertError if there are none."""
    if count == 0:
        raise ConvertError("the source holds no images")
    if limit is not None and limit < 1:
        raise ConvertError(f"limit {limit}: at least one image must be converted")
    order = np.arange(count, dtype=np.int64)
    if shuffle_seed is not None:
        if shuffle_seed < 0:
            raise ConvertError(f"shuffle seed {shuffle_seed} is negative")
        # Sorts raw words: numpy guarantees Philox's bit stream across versions, but not its permutations.
        words = np.asarray(np.random.Philox(key=shuffle_seed).random_raw(count))
        order = np.argsort(words, kind="stable")
    return order[:limit]


def _size(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
