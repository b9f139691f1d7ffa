"""Beton files written without FFCV, see `beton_layout`."""

from __future__ import annotations

import binascii
import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from fastdeit.pipelines import sidecar
from fastdeit.pipelines.beton_layout import (
    ALLOCATION,
    DEFAULT_PAGE,
    FIELDS,
    HEADER,
    JPEG,
    KIND,
    MAX_PAGE,
    MAX_SIDE,
    METADATA_START,
    MIN_PAGE,
    RAW,
    SAMPLE,
    VERSION,
    BetonError,
    field_descriptors,
    sidecar_path,
)
from fastdeit.pipelines.files import sync_folder
from fastdeit.pipelines.sidecar import ContentHash
from fastdeit.pipelines.writing import Record


class BetonWriter:
    """Streams at most `capacity` samples into a beton file that appears whole or not at all; a `Writer`.

    Pages are of `page_size` bytes; an image that is larger doubles the page size of the whole file until it fits,
    which moves nothing: what lies within a page lies within a larger one. Until `finish` all is in `<path>.partial`
    and `<path>.json.partial`.

    Raises BetonError for a sample that the format cannot hold.
    """

    def __init__(self, path: str | os.PathLike[str], capacity: int, *, page_size: int = DEFAULT_PAGE) -> None:
        self.path, self.keep = Path(path), False
        if capacity < 1:
            raise BetonError(f"{self.path}: no samples to write")
        if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise BetonError(f"page size {page_size} is not a power of two from {MIN_PAGE} to {MAX_PAGE}")
        self.page_size = page_size
        self._samples = np.zeros(capacity, SAMPLE)
        self._sizes = np.zeros(capacity, np.uint64)
        self._count = 0
        metadata_end = METADATA_START + self._samples.nbytes
        self._end = metadata_end + -metadata_end % page_size
        self._content = ContentHash()
        self._file: BinaryIO | None = None
        self._partial = _partial(self.path)
        self._partial_sidecar = _partial(sidecar_path(self.path))

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing is lost where closing fails: `restore` counts on no more than `flush` had on disk.
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None
        if not self.keep:
            self._partial.unlink(missing_ok=True)
            self._partial_sidecar.unlink(missing_ok=True)

    def _output(self) -> BinaryIO:
        # Opened by the first sample: an interrupt while the block is entered would not be followed by `__exit__`.
        if self._file is None:
            self._file = open(self._partial, "w+b", buffering=1 << 20)  # noqa: SIM115
        return self._file

    def restore(self, records: Iterable[Record]) -> int:
        """Take up what an interrupted writer of the same options left; see `Writer`."""
        try:
            self._file = open(self._partial, "r+b", buffering=1 << 20)  # noqa: SIM115
        except FileNotFoundError:
            return 0
        except IsADirectoryError as error:
            raise BetonError(
                f"{self._partial}: is a folder, as an interrupted conversion to shards leaves it: remove it"
            ) from error
        for record in records:
            if self._count == len(self._samples) or not self._take_up(self._file, record):
                break
        if self._count:
            self._file.truncate(self._end)
            self._clear(self._file, int(self._samples["data_ptr"][0]))
        else:
            self._file.close()
            self._file = None
            self._partial.unlink()
        self._partial_sidecar.unlink(missing_ok=True)
        return self._count

    def _take_up(self, file: BinaryIO, record: Record) -> bool:
        """Whether the sample of `record` stands where it would be added next; if so it counts as added."""
        page_size, start = self._place(record.size)
        file.seek(self._end)
        stored = file.read(start - self._end + record.size)
        gap, data = stored[: start - self._end], stored[start - self._end :]
        if len(data) != record.size or gap != bytes(len(gap)) or binascii.crc32(data) != record.crc32:
            return False
        self.page_size = page_size
        self._count_in(data, start, record.height, record.width, record.label, record.mode)
        return True

    def _clear(self, file: BinaryIO, end: int) -> None:
        """Have zeros up to byte `end`, where a writer may have been interrupted as it finished."""
        file.seek(0)
        if file.read(end) != bytes(end):
            file.seek(0)
            file.write(bytes(end))

    def _place(self, size: int) -> tuple[int, int]:
        """Page size and place in the file for a next sample of `size` bytes."""
        page_size = self.page_size
        while page_size < size:
            page_size *= 2
        fits = self._end % page_size + size <= page_size
        return page_size, self._end if fits else self._end + -self._end % page_size

    def add(self, data: bytes, *, height: int, width: int, label: int, mode: int) -> None:
        """Append a sample: a JPEG file (mode JPEG) or RGB pixels (mode RAW, height * width * 3 bytes)."""
        index, size = self._count, len(data)
        if index == len(self._samples):
            raise BetonError(f"{self.path}: more samples than the {index} announced")
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
            raise BetonError(
                f"{self.path}, sample {index}: {width} x {height} pixels; sides go up to {MAX_SIDE}. "
                f"Have it resized (--max-side)"
            )
        if mode not in (JPEG, RAW) or not 0 < size <= MAX_PAGE or (mode == RAW and size != height * width * 3):
            raise BetonError(
                f"{self.path}, sample {index}: {size} bytes cannot be stored as {width} x {height} pixels. "
                f"Have it resized (--max-side) or stored as a JPEG (--mode jpeg)"
            )
        if label < 0:
            raise BetonError(f"{self.path}, sample {index}: label {label} is negative")
        self.page_size, start = self._place(size)
        file = self._output()
        file.seek(start)
        file.write(data)
        self._count_in(data, start, height, width, label, mode)

    def _count_in(self, data: bytes, start: int, height: int, width: int, label: int, mode: int) -> None:
        self._samples[self._count] = (mode, width, height, start, label)
        self._sizes[self._count] = len(data)
        self._content.add(data, height=height, width=width, label=label)
        self._count += 1
        self._end = start + len(data)

    def flush(self) -> None:
        """Have every sample added so far on disk, so that `restore` will find it."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            sync_folder(self.path.parent)

    def finish(self, *, class_names: list[str], **described: Any) -> dict[str, Any]:
        """Write tables and sidecar and give both files their names; `described` joins the sidecar returned."""
        count = self._count
        if count == 0:
            raise BetonError(f"{self.path}: no samples to write")
        samples = self._samples[:count]
        if len(class_names) <= samples["label"].max():
            raise BetonError(f"{self.path}: {len(class_names)} class names, but label {samples['label'].max()}")
        header = np.array([(VERSION, len(FIELDS), self.page_size, count, self._end)], HEADER)
        table = np.zeros(count, ALLOCATION)
        table["sample_id"], table["ptr"], table["size"] = np.arange(count), samples["data_ptr"], self._sizes[:count]
        output = self._output()
        output.seek(self._end)
        output.write(table.tobytes())
        output.seek(0)
        output.write(header.tobytes() + field_descriptors().tobytes() + samples.tobytes())
        output.flush()
        os.fsync(output.fileno())
        described_by = sidecar.build(
            KIND,
            self._content,
            class_names=class_names,
            metadata_hash=hashlib.sha256(samples.tobytes()).hexdigest(),
            described={**described, "page_size": self.page_size},
        )
        sidecar.write(self._partial_sidecar, described_by)
        # The sidecar first: with it alone an old file is refused, with the data alone its names would be lost.
        os.replace(self._partial_sidecar, sidecar_path(self.path))
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)
        return described_by


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
