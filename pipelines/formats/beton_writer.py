"""Writes beton files without FFCV; `beton_layout` describes them."""

import binascii
import hashlib
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastdeit.pipelines.formats import sidecar
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.beton_layout import (
    ALLOCATION,
    DEFAULT_PAGE,
    FIELDS,
    HEADER,
    KIND,
    MAX_PAGE,
    METADATA_START,
    MIN_PAGE,
    SAMPLE,
    VERSION,
    BetonError,
    field_descriptors,
    sidecar_path,
)
from fastdeit.pipelines.formats.files import beside, kind, mark, sync_folder
from fastdeit.pipelines.formats.writer import Record, Writer

_PIECE = 1 << 16  # bytes cleared at once


class BetonWriter(Writer):
    """Streams at most `capacity` samples into a beton file that appears whole or not at all; a `Writer`.

    Pages have `page_size` bytes. An image that is larger doubles the page size of the whole file until it fits; this
    moves nothing, because what lies within a page lies within a larger one. Until `finish`, all data is in
    `<path>.partial` and `<path>.json.partial`. It then replaces a data set that fastdeit-convert wrote, and nothing
    else.

    Raises BetonError for a sample that the format cannot hold, and before it would replace any other file.
    """

    _Error, _most = BetonError, MAX_PAGE

    def __init__(self, path: str | os.PathLike[str], capacity: int, *, page_size: int = DEFAULT_PAGE) -> None:
        if capacity < 1:
            raise BetonError(f"{path}: no samples to write")
        if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise BetonError(f"page size {page_size} is not a power of two from {MIN_PAGE} to {MAX_PAGE}")
        super().__init__(Path(path), np.zeros(capacity, SAMPLE))
        self.page_size = page_size
        self._sizes = np.zeros(capacity, np.uint64)
        metadata_end = METADATA_START + self._samples.nbytes
        self._end = metadata_end + -metadata_end % page_size
        self._file: BinaryIO | None = None
        self._partial = beside(self.path, ".partial")
        self._partial_sidecar = beside(sidecar_path(self.path), ".partial")
        self._own: set[Path] = set()  # of the two, those that this writer made or took over
        self._flushed: int | None = None  # the end of what is known to be on disk

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # A failed close loses nothing: `restore` relies only on what `flush` put on disk.
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None
        if not self.keep:
            for path in self._own:
                path.unlink(missing_ok=True)
        elif error is not None and self._flushed is not None:
            # The rest may be torn, and it takes room on a full disk.
            with suppress(OSError):
                if self._partial.stat().st_size > self._flushed:
                    os.truncate(self._partial, self._flushed)

    def check(self, replaced: list[int] | None = None) -> None:
        """Raise BetonError unless the path and its sidecar are free, or fastdeit-convert wrote them; see `Writer`."""
        self._replaced = replaced or self._replaced
        beside_it = sidecar_path(self.path)
        move = "move it away, or name another place"
        for file in (self.path, beside_it):
            if os.path.lexists(file) and not stat.S_ISREG(mode := os.lstat(file).st_mode):
                raise BetonError(f"{file}: is {kind(mode)}, not a data set that fastdeit-convert wrote: {move}")
        if os.path.lexists(self.path):
            # An interrupted conversion replaces the sidecar first, so the old data may lie beside a new sidecar.
            if self._replaced is None or mark(self.path) != self._replaced:
                self._check_ours(BetonDataset, "sidecar", move)
        elif os.path.lexists(beside_it) and not sidecar.is_sealed(beside_it, len(self._samples)):
            raise BetonError(f"{beside_it}: is not a sidecar that fastdeit-convert wrote: {move}")

    def _output(self) -> BinaryIO:
        # Opened by the first sample: after an interrupt inside `__enter__`, `__exit__` would not run.
        if self._file is None:
            self.check()
            taken = f"{self._partial}: is there already: move it away, or name another place"
            if os.path.lexists(self._partial):
                raise BetonError(taken)
            self._own.add(self._partial)  # first: an interrupt right after `open` must not leave the file behind
            try:
                self._file = open(self._partial, "x+b", buffering=1 << 20)  # noqa: SIM115
            except FileExistsError as error:
                self._own.remove(self._partial)
                raise BetonError(taken) from error
        return self._file

    def restore(self, records: Iterable[Record]) -> int:
        """Take over what an interrupted writer of the same options left; see `Writer`."""
        if self._partial_sidecar.is_file():
            self._partial_sidecar.unlink()
        if not os.path.lexists(self._partial):
            return 0
        if not stat.S_ISREG(mode := os.lstat(self._partial).st_mode):
            why = ", as an interrupted conversion to shards leaves it" if stat.S_ISDIR(mode) else ""
            raise BetonError(f"{self._partial}: is {kind(mode)}{why}: remove it")
        self._file = open(self._partial, "r+b", buffering=1 << 20)  # noqa: SIM115
        for record in records:
            if self._count == len(self._samples) or not self._take_up(self._file, record):
                break
        if self._count:
            self._own.add(self._partial)
            self._file.truncate(self._end)
            self._flushed = self._end
            self._clear(self._file, int(self._samples["data_ptr"][0]))
        else:
            self._file.close()
            self._file = None
            self._partial.unlink()
        return self._count

    def _take_up(self, file: BinaryIO, record: Record) -> bool:
        """Count the sample of `record` as added if it is stored at the next place; return whether it is."""
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
        """Zero the file up to byte `end`: an interrupted `finish` may have written there."""
        # Writing zeros into a hole would take room that a full disk does not have.
        for at in range(0, end, _PIECE):
            size = min(_PIECE, end - at)
            file.seek(at)
            if file.read(size) != bytes(size):
                file.seek(at)
                file.write(bytes(size))

    def _place(self, size: int) -> tuple[int, int]:
        """Page size and offset for the next sample, of `size` bytes."""
        page_size = self.page_size
        while page_size < size:
            page_size *= 2
        fits = self._end % page_size + size <= page_size
        return page_size, self._end if fits else self._end + -self._end % page_size

    def _append(self, data: bytes, height: int, width: int, label: int, mode: int) -> None:
        self.page_size, start = self._place(len(data))
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
        """Put every sample added so far on disk; see `Writer`."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            sync_folder(self.path.parent)
            self._flushed = self._end

    def finish(self, *, class_names: list[str], **described: Any) -> dict[str, Any]:
        """Write tables and sidecar and give both files their names; see `Writer`."""
        samples, count = self._added(class_names), self._count
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
        if os.path.lexists(self._partial_sidecar):
            raise BetonError(f"{self._partial_sidecar}: is there already: move it away, or name another place")
        self._own.add(self._partial_sidecar)
        sidecar.write(self._partial_sidecar, described_by)
        self.check()
        # The sidecar first: readers refuse old data with a new sidecar, but would read new data without class names.
        os.replace(self._partial_sidecar, sidecar_path(self.path))
        os.replace(self._partial, self.path)
        self.named = True
        sync_folder(self.path.parent)
        return described_by
