"""What a conversion writes to: samples one behind another, under a temporary name until all is complete."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


@dataclass(frozen=True)
class Record:
    """A stored sample without its bytes: size in bytes, their zlib.crc32, and how they are to be read.

    mode  beton.JPEG: a JPEG file; beton.RAW: RGB pixels (height, width, 3)
    """

    height: int
    width: int
    label: int
    mode: int
    size: int
    crc32: int


class Writer(Protocol):
    """Stores at most `capacity` samples; a context manager. The bytes written depend on nothing but the samples.

    Until `finish` everything lies under temporary names that no reader takes for a data set. If the block is left
    without it, they stay for a later `restore` where `keep` is set, and are removed otherwise. After an error they are
    cut back to what `flush` had on disk.
    """

    path: Path
    keep: bool
    named: bool  # whether `finish` has given the data set its name

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def check(self, replaced: list[int] | None = None) -> None:
        """Raise BetonError or ShardError unless `path` is free, or is a data set that fastdeit-convert wrote.

        replaced  `files.mark` of what an interrupted conversion was about to replace, having checked it
        """
        ...

    def restore(self, records: Iterable[Record]) -> int:
        """Take up what an interrupted writer of the same options left; before the first `add`.

        Reads back each sample of `records`, in order, and stops at the first whose bytes are not all there or have
        another crc32. Returns how many samples count as added; whatever follows them is cut off.
        """
        ...

    def add(self, data: bytes, *, height: int, width: int, label: int, mode: int) -> None:
        """Append a sample: a JPEG file (mode JPEG) or RGB pixels (mode RAW, height * width * 3 bytes)."""
        ...

    def flush(self) -> None:
        """Have every sample added so far on disk, so that `restore` will find it."""
        ...

    def finish(self, *, class_names: list[str], **described: Any) -> dict[str, Any]:
        """Give the data set its name, with as many samples as were added; the sidecar, which `described` joins."""
        ...
