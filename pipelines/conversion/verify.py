"""Checks a converted data set bit by bit against its checksums, and against its source."""

import binascii
import io
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from fastdeit.pipelines.console import progress_bar
from fastdeit.pipelines.console import report as say_report
from fastdeit.pipelines.conversion.convert import sample_order
from fastdeit.pipelines.conversion.encode import Encoding
from fastdeit.pipelines.conversion.workers import Encoded, Reject, encoded, reason
from fastdeit.pipelines.errors import UserError, printable
from fastdeit.pipelines.formats import sidecar
from fastdeit.pipelines.formats.beton_layout import JPEG
from fastdeit.pipelines.formats.dataset import Dataset, open_dataset
from fastdeit.pipelines.formats.files import kind
from fastdeit.pipelines.formats.sidecar import ContentHash
from fastdeit.pipelines.machine import MachineError
from fastdeit.pipelines.sources import Source, open_source

NAMED = 20  # findings kept; further ones are only counted
_CHUNK = 16  # samples that a thread checks at once
_OPTIONS = {"mode": str, "quality": int, "max_side": int, "shuffle_seed": int, "limit": int, "pillow": str}
_OPTIONAL = ("max_side", "shuffle_seed", "limit")


class VerifyError(UserError):
    """A check that cannot run as requested; says why and what to do."""


@dataclass
class Verification:
    """The result of a check.

    findings   the first problems, a sentence each
    count      of all problems
    unchecked  parts that could not be checked, a sentence each
    notes      further remarks
    """

    dest: Path
    num_samples: int = 0
    findings: list[str] = field(default_factory=list)
    count: int = 0
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.count == 0

    def add(self, finding: str) -> None:
        self.count += 1
        if len(self.findings) < NAMED:
            self.findings.append(finding)

    def __str__(self) -> str:
        outcome = "nothing wrong was found" if self.ok else f"{self.count} finding{'s' * (self.count > 1)}"
        lines = [f"{self.dest}: {self.num_samples} images checked in {self.seconds:.1f} s, {outcome}"]
        lines += [f"  {finding}" for finding in self.findings]
        if self.count > len(self.findings):
            lines.append(f"  and {self.count - len(self.findings)} more")
        lines += [f"  not checked: {what}" for what in self.unchecked]
        return "\n".join(map(printable, lines + [f"  note: {note}" for note in self.notes]))


def verify(
    dest: str | os.PathLike[str],
    against: str | os.PathLike[str] | Source | None = None,
    *,
    workers: int = 0,
    progress: bool = True,
) -> Verification:
    """Decode every image of the data set `dest`, and compare all its bytes with their checksums.

    against   a source; it is converted again in memory with the sidecar's options and compared sample by sample
    workers   threads that decode, and processes that convert; 0: one per usable core
    progress  show progress bars and print the result

    A problem of the data set is a finding, not an error. Raises FileNotFoundError for a missing data set, MachineError
    where the machine cannot read it, SourceError for a source that cannot be read, and VerifyError if the sidecar of
    `dest` lacks the options of its conversion, or for fewer workers than 0.
    """
    start = time.perf_counter()
    dest = Path(dest)
    if workers < 0:
        raise VerifyError(f"{workers} workers: give 0 for all cores, or how many")
    if isinstance(against, (str, os.PathLike)):
        against = open_source(against)
    result = Verification(dest)
    mode = dest.stat().st_mode  # raises FileNotFoundError with the path
    if not dest.is_file() and not dest.is_dir():
        raise VerifyError(f"{dest}: is {kind(mode)}, not a data set: name one that was converted")
    try:
        dataset = open_dataset(dest)
    except MachineError:
        raise
    except UserError as error:
        result.add(str(error))
        result.unchecked.append("everything else, since the data set does not open")
    else:
        with closing(dataset):
            for finding in dataset.check():
                result.add(finding)
            _check_samples(dataset, result, workers, progress)
            if against is not None:
                _compare(dataset, against, result, workers, progress)
    result.seconds = time.perf_counter() - start
    if progress:
        say_report(str(result), f"{dest} has been checked, see the exit status")
    return result


def _check_samples(dataset: Dataset, result: Verification, workers: int, progress: bool) -> None:
    """Read, compare and decode every sample, in order."""
    described = dataset.sidecar
    crc32 = None if described is None else sidecar.crc32s(described)
    if described is None:
        result.unchecked.append("labels, class names and checksums, since there is no sidecar")
    content = ContentHash()
    complete = True
    threads = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool, _bar(len(dataset), "checking", progress, result) as bar:
        waiting: deque[tuple[range, Future[list[tuple[np.ndarray | None, str | None]]]]] = deque()

        def take() -> None:
            nonlocal complete
            indices, future = waiting.popleft()
            for index, (data, finding) in zip(indices, future.result(), strict=True):
                if finding is not None:
                    result.add(finding)
                if data is None:
                    complete = False
                else:
                    height, width, label = (int(a[index]) for a in (dataset.height, dataset.width, dataset.label))
                    content.add(data.data, height=height, width=width, label=label)
                result.num_samples += 1
                bar.update()

        for first in range(0, len(dataset), _CHUNK):
            indices = range(first, min(first + _CHUNK, len(dataset)))
            waiting.append((indices, pool.submit(_check_chunk, dataset, indices, crc32)))
            if len(waiting) == 2 * threads:
                take()
        while waiting:
            take()
    if described is not None and complete and str(content) != dataset.content_hash:
        result.add(f"{dataset.path}: its content hash is {content}, but {dataset.content_hash} was written")


def _check_chunk(
    dataset: Dataset, indices: range, crc32: np.ndarray | None
) -> list[tuple[np.ndarray | None, str | None]]:
    return [_check_sample(dataset, index, crc32) for index in indices]


def _check_sample(dataset: Dataset, index: int, crc32: np.ndarray | None) -> tuple[np.ndarray | None, str | None]:
    """The stored bytes, and their problem if any."""
    try:
        data = dataset.read(index)
    except MachineError:
        raise  # says nothing about the data set
    except (OSError, UserError) as error:
        return None, str(error)
    finding = None
    if crc32 is not None and binascii.crc32(data.data) != crc32[index]:
        finding = "its checksum (crc32) does not match. Convert the data set again, or copy it again"
    elif dataset.is_jpeg(index):
        finding = _decode(dataset, index, data)
    return data, finding and f"{_name(dataset, index)}: {finding}"


def _decode(dataset: Dataset, index: int, data: np.ndarray) -> str | None:
    try:
        with Image.open(io.BytesIO(data.data), formats=["JPEG"]) as image:
            size = int(dataset.width[index]), int(dataset.height[index])
            if image.size != size:
                return f"it has {image.width} x {image.height} pixels, but the tables say {size[0]} x {size[1]}"
            image.convert("RGB")
    except MemoryError:
        raise
    # On a damaged image, PIL raises almost anything.
    except Exception as error:
        return f"PIL cannot decode it ({reason(error)})"
    return None


def _compare(dataset: Dataset, source: Source, result: Verification, workers: int, progress: bool) -> None:
    """Convert the source again and compare each sample with the stored one."""
    options, rejected = _conversion(dataset)
    order = sample_order(len(source), options["shuffle_seed"], options["limit"])
    left_out = np.isin(order, np.array(rejected, np.int64))
    if len(order) - left_out.sum() != len(dataset) or left_out.sum() != len(rejected):
        result.add(
            f"{dataset.path}: holds {len(dataset)} samples, and {len(rejected)} were left out, but the source has "
            f"{len(order)}: none was compared"
        )
        return
    if options["pillow"] != PIL.__version__:
        result.notes.append(
            f"it was converted with Pillow {options['pillow']} and compared with {PIL.__version__}, "
            f"which may encode an image differently"
        )
    named = _same_names(dataset.class_names, source.class_names)
    if not named and dataset.class_names is not None and source.class_names is not None:
        result.notes.append("the source names other classes, so labels were compared by number")
    encoding = Encoding(mode=options["mode"], quality=options["quality"], max_side=options["max_side"])
    index = 0
    with (
        closing(encoded(source, order.tolist(), encoding, workers)) as samples,
        _bar(len(order), "comparing", progress, result) as bar,
    ):
        for at, bad, sample in zip(order.tolist(), left_out.tolist(), samples, strict=True):
            where = f"{source.name(at)}, sample {at} of the source"
            if bad:
                if isinstance(sample, Encoded):
                    result.add(f"{where}: was left out, but can be read now")
            else:
                for finding in _differences(dataset, index, source.class_names if named else None, sample):
                    result.add(f"{_name(dataset, index)}: {finding}; it is {where}")
                index += 1
            bar.update()


def _conversion(dataset: Dataset) -> tuple[dict[str, Any], list[int]]:
    """The options of the conversion that made a data set, and the source's samples that it left out."""
    described = dataset.sidecar or {}
    options, rejected = described.get("options"), described.get("rejected")
    if (
        isinstance(options, dict)
        and all(
            type(options.get(name)) is kind or (name in _OPTIONAL and options.get(name, 0) is None)
            for name, kind in _OPTIONS.items()
        )
        and isinstance(rejected, list)
        and all(type(index) is int and 0 <= index < 1 << 63 for index in rejected)
    ):
        return options, rejected
    raise VerifyError(
        f"{dataset.path}: does not say how it was converted, so it cannot be compared with its source. "
        f"Leave out --against"
    )


def _same_names(ours: list[str] | None, theirs: list[str] | None) -> bool:
    """Whether one list of class names contains the other, in any order."""
    return ours is not None and theirs is not None and (set(ours) <= set(theirs) or set(theirs) <= set(ours))


def _differences(dataset: Dataset, index: int, names: list[str] | None, sample: Encoded | Reject) -> Iterator[str]:
    if isinstance(sample, Reject):
        yield f"it can no longer be read from the source ({sample.reason})"
        return
    ours = _class(dataset.class_names if names is not None else None, int(dataset.label[index]))
    theirs = _class(names, sample.label)
    if ours != theirs:
        yield f"it is of {ours}, but in the source of {theirs}"
    image = sample.image
    try:
        same = dataset.read(index).tobytes() == image.data
    except MachineError:
        raise
    except (OSError, UserError):
        return  # already a finding
    kind = bool(dataset.is_jpeg(index)), int(dataset.height[index]), int(dataset.width[index])
    if not same or kind != (image.mode == JPEG, image.height, image.width):
        yield "its bytes differ from those that the source gives"


def _class(names: list[str] | None, label: int) -> str:
    return f"class {label}" if names is None else f"class '{names[label]}'"


def _name(dataset: Dataset, index: int) -> str:
    return f"{dataset.path}, sample {index} ({_class(dataset.class_names, int(dataset.label[index]))})"


def _bar(total: int, what: str, progress: bool, result: Verification) -> Any:
    return progress_bar(result.notes, progress, total=total, desc=what)
