"""What both writers share: samples are appended under a temporary name until the data set is complete."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import JPEG, MAX_SIDE, RAW
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.formats.sidecar import ContentHash, SidecarError


@dataclass(frozen=True)
class Record:
    """A stored sample without its bytes: size in bytes, their zlib.crc32, and how to read them.

    mode  JPEG: a JPEG file; RAW: RGB pixels (height, width, 3)
    """

    height: int
    width: int
    label: int
    mode: int
    size: int
    crc32: int


class Writer:
    """Stores at most `capacity` samples; a context manager. The bytes written depend on nothing but the samples.

    Until `finish`, everything lies under temporary names that no reader takes for a data set. A block that ends
    without it leaves them for a later `restore` if `keep` is set, and removes them otherwise. After an error they are
    cut back to what `flush` had on disk.

    named  whether `finish` has given the data set its name
    """

    _Error: type[UserError]
    _most: int  # bytes of a sample

    def __init__(self, path: Path, samples: np.ndarray) -> None:
        self.path, self.keep, self.named = path, False, False
        self._samples = samples  # (capacity,) records
        self._count = 0
        self._content = ContentHash()
        self._replaced: list[int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        raise NotImplementedError

    def check(self, replaced: list[int] | None = None) -> None:
        """Raise BetonError or ShardError unless `path` is free, or is a data set that fastdeit-convert wrote.

        replaced  `files.mark` of the data set that an interrupted conversion had checked and was about to replace
        """
        raise NotImplementedError

    def restore(self, records: Iterable[Record]) -> int:
        """Take over what an interrupted writer of the same options left; call it before the first `add`.

        Reads back each sample of `records`, in order, and stops at the first with missing bytes or another crc32.
        Returns how many samples count as added, and cuts off the rest.
        """
        raise NotImplementedError

    def add(self, data: bytes, *, height: int, width: int, label: int, mode: int) -> None:
        """Append a sample: a JPEG file (mode JPEG) or RGB pixels (mode RAW, height * width * 3 bytes)."""
        index, size = self._count, len(data)
        if index == len(self._samples):
            raise self._Error(f"{self.path}: more samples than the {index} announced")
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
            raise self._Error(
                f"{self.path}, sample {index}: {width} x {height} pixels; sides go up to {MAX_SIDE}. "
                f"Have it resized (--max-side)"
            )
        if mode not in (JPEG, RAW) or not 0 < size <= self._most or (mode == RAW and size != height * width * 3):
            raise self._Error(
                f"{self.path}, sample {index}: {size} bytes cannot be stored as {width} x {height} pixels. "
                f"Have it resized (--max-side) or stored as a JPEG (--mode jpeg)"
            )
        if label < 0:
            raise self._Error(f"{self.path}, sample {index}: label {label} is negative")
        self._append(data, height, width, label, mode)

    def _append(self, data: bytes, height: int, width: int, label: int, mode: int) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Put every sample added so far on disk, where `restore` will find it."""
        raise NotImplementedError

    def finish(self, *, class_names: list[str], **described: Any) -> dict[str, Any]:
        """Write tables and sidecar, give the data set its name, and return the sidecar, which includes `described`."""
        raise NotImplementedError

    def _added(self, class_names: list[str]) -> np.ndarray:
        """The records of the samples added. Raises an error without any, or for a label without a name."""
        samples = self._samples[: self._count]
        if not self._count:
            raise self._Error(f"{self.path}: no samples to write")
        if len(class_names) <= samples["label"].max():
            raise self._Error(f"{self.path}: {len(class_names)} class names, but label {samples['label'].max()}")
        return samples

    def _check_ours(self, opened: Callable[[Path], AbstractContextManager[Dataset]], sidecar: str, move: str) -> None:
        """Raise an error unless `path` opens as a data set with a sidecar: only fastdeit-convert writes sidecars."""
        try:
            with opened(self.path) as dataset:
                described = dataset.sidecar
        except (OSError, self._Error, SidecarError) as error:
            why = str(error).removeprefix(f"{self.path}: ").partition(". ")[0]
            raise self._Error(f"{self.path}: is not a data set that fastdeit-convert wrote ({why}): {move}") from error
        if described is None:
            raise self._Error(f"{self.path}: has no {sidecar}, so fastdeit-convert did not write it: {move}")
