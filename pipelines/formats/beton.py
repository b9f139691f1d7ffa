"""Reads FFCV's beton format by index, without FFCV; `beton_layout` describes the file, `BetonWriter` writes it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastdeit.pipelines.formats.beton_layout import (
    ALLOCATION,
    FIELD,
    FIELDS,
    HEADER,
    KIND,
    MAX_CLASSES,
    MAX_PIXELS,
    METADATA_START,
    MIN_PAGE,
    RAW,
    SAMPLE,
    VERSION,
    BetonError,
    field_descriptors,
    sidecar_path,
)
from fastdeit.pipelines.formats.files import misfetched
from fastdeit.pipelines.formats.open_file import OpenFile
from fastdeit.pipelines.formats.sidecar import SidecarError
from fastdeit.pipelines.formats.stored import StoredImages
from fastdeit.pipelines.machine import machine_error

_PIECE = 24 << 18  # bytes read at once: whole records of a table, or the gaps between images


class BetonDataset(StoredImages):
    """Random access to the images of a beton file: FFCV's own or one that `BetonWriter` wrote.

    path           the file
    height, width  (N,) int32, pixels
    label          (N,) int64
    offset, size   (N,) int64, where in the file an image is stored, bytes
    class_names    of the sidecar, in the order of the labels; None without one
    content_hash   of the sidecar; None without one
    sidecar        as `sidecar` describes it; None without one
    checksums      of the stored bytes, from the sidecar; None without one
    num_classes    length of class_names, or the largest label + 1

    Opening it checks header, records and sizes against the file. Raises BetonError naming file, sample and reason,
    FileNotFoundError for a missing file, and MachineError where the machine cannot read it. Reading a file that was
    cut short is an error too. Threads may share an object; a pickled one reopens its path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            file = OpenFile(self.path)
            self._file: OpenFile | None = file
            self._identity = file.identity
            self._read_tables(file)
            self._read_sidecar(sidecar_path(self.path), KIND, self._metadata_hash)
        except (FileNotFoundError, IsADirectoryError):
            raise
        except (OSError, MemoryError) as error:
            raise machine_error(error, f"{self.path}: cannot be opened") from error

    def _error(self, reason: str, index: int | None = None) -> BetonError:
        where = f"{self.path}, sample {index}" if index is not None else str(self.path)
        return BetonError(f"{where}: {reason}. Convert the data set again, or copy the file again")

    def _forbid(self, bad: np.ndarray, reason: str) -> None:
        if bad.any():
            raise self._error(reason, int(bad.argmax()))

    def _load(self, file: OpenFile, offset: int, size: int) -> np.ndarray:
        data = file.read(size, offset)
        if len(data) != size:
            raise self._error(f"it was cut short while it was read: {len(data)} of {size} bytes at byte {offset}")
        return data

    def _load_table(self, file: OpenFile, start: int, end: int, record: np.dtype, field: str) -> np.ndarray:
        """The bytes from `start` to `end`, a table of `record` whose `field` is never 0.

        A sparse file may claim far more than it holds: its holes read as zeros, and the first zero is an error.
        """
        pieces = []
        for at in range(start, end, _PIECE):
            pieces.append(self._load(file, at, min(_PIECE, end - at)))
            blank = pieces[-1].view(record)[field] == 0
            if blank.any():
                index = (at - start) // record.itemsize + int(blank.argmax())
                raise self._error(f"record {index} of a table is empty, so its data lie outside the file's data")
        return np.concatenate(pieces)

    def _read_tables(self, file: OpenFile) -> None:
        length = file.identity[2]
        if (reason := misfetched(self.path)) is not None:
            raise BetonError(f"{self.path}: {reason}")
        if length < METADATA_START:
            raise self._error(f"{length} bytes are too few for a beton file's header")
        start = self._load(file, 0, METADATA_START)
        header = start[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION:
            raise self._error(f"this is not a beton file of version {VERSION} (it says {header['version']})")
        page_size, count, end = (int(header[name]) for name in ("page_size", "num_samples", "alloc_table_ptr"))
        self._fields = start[HEADER.itemsize :].view(FIELD)
        types = tuple(int(t) for t in self._fields["type_id"])
        if header["num_fields"] != len(FIELDS) or types != tuple(t for t, _ in FIELDS):
            raise self._error("its fields are not an RGBImageField and an IntField, in this order")
        if page_size < MIN_PAGE or page_size & (page_size - 1):
            raise self._error(f"page size {page_size} is not a power of two of at least {MIN_PAGE}")
        metadata_end = METADATA_START + count * SAMPLE.itemsize
        if count == 0:
            raise self._error("it holds no samples")
        if metadata_end > end or end + count * ALLOCATION.itemsize != length:
            raise self._error(
                f"{count} samples with an allocation table at byte {end} do not fit a file of {length} bytes"
            )
        self.page_size, self._data_start, self._data_end = page_size, metadata_end, end
        metadata = self._load_table(file, METADATA_START, metadata_end, SAMPLE, "data_ptr")
        self._metadata_hash = hashlib.sha256(metadata.data).hexdigest()
        samples = metadata.view(SAMPLE)
        table = self._load_table(file, end, length, ALLOCATION, "size").view(ALLOCATION)
        pointer, size = self._allocations(table, count)
        self._forbid(pointer != samples["data_ptr"], "record and allocation table name different offsets")
        # In this order no sum can overflow.
        outside = (size == 0) | (size > end) | (pointer < metadata_end) | (pointer > end)
        self._forbid(outside, "its place is outside of the file's data")
        self._forbid(pointer + size > end, "its place is outside of the file's data")
        self._forbid(pointer // page_size != (pointer + size - 1) // page_size, "it crosses a page boundary")

        self.offset, self.size = pointer.astype(np.int64), size.astype(np.int64)
        self.height, self.width = samples["height"].astype(np.int32), samples["width"].astype(np.int32)
        self.label = samples["label"].astype(np.int64)
        self._mode = samples["mode"].copy()
        self._forbid((self.height == 0) | (self.width == 0), "its height or width is 0")
        self._forbid(self._mode > RAW, "its mode is neither JPEG nor raw")
        pixels = self.height.astype(np.int64) * self.width * 3
        self._forbid(pixels > 3 * MAX_PIXELS, f"it has more than {MAX_PIXELS} pixels")
        self._forbid((self._mode == RAW) & (self.size != pixels), "its raw pixels do not match its height and width")
        self._forbid(self.label < 0, "its label is negative")
        self._forbid(self.label >= MAX_CLASSES, f"its label is not below {MAX_CLASSES}")
        for array in (self.offset, self.size, self.height, self.width, self.label):
            array.setflags(write=False)

    def _allocations(self, table: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size of every sample, (N,) uint64; FFCV's workers write the table in any order."""
        sample = table["sample_id"]
        if (sample >= count).any():
            raise self._error(f"the allocation table names sample {sample.max()} of {count}")
        sample = sample.astype(np.int64)
        self._forbid(np.bincount(sample, minlength=count) != 1, "it is not allocated exactly once")
        pointer, size = np.empty(count, np.uint64), np.empty(count, np.uint64)
        pointer[sample], size[sample] = table["ptr"], table["size"]
        return pointer, size

    def read(self, index: int) -> np.ndarray:
        """Stored bytes of sample `index`: (size,) uint8, read-only.

        Raises IndexError for an index outside the data set, BetonError where the file was cut short since it was
        opened, MachineError where the machine cannot read it, ValueError after `close`.
        """
        self._check_index(index)
        file, size = self._open(index), int(self.size[index])
        try:
            data = file.read(size, int(self.offset[index]))
        except (OSError, MemoryError) as error:
            raise machine_error(error, f"{self.path}, sample {index}: cannot be read") from error
        if len(data) != size:
            raise self._error(
                f"the file was cut short since it was opened: {len(data)} of {size} bytes are left", index
            )
        data.setflags(write=False)
        return data

    def _open(self, index: int) -> OpenFile:
        file = self._file
        if file is None:
            raise ValueError(f"{self.path}: sample {index} was requested after the data set was closed")
        return file

    def check(self) -> list[str]:
        """Problems outside the samples' own bytes, a sentence each; empty if there are none.

        Reads header, fields, tables, sidecar and the gaps between images again. Raises MachineError.
        """
        try:
            again = BetonDataset(self.path)
        except (FileNotFoundError, IsADirectoryError):
            return [f"{self.path}: it was removed since the data set was opened"]
        except (BetonError, SidecarError) as error:
            return [str(error)]
        if (again._identity, again.sidecar) != (self._identity, self.sidecar):
            return [f"{self.path}: it was changed or replaced since the data set was opened"]
        findings = []
        # FFCV's own writer leaves the arguments zero too, but its caller chooses the names.
        expected = field_descriptors() if self.sidecar is not None else field_descriptors(again._fields["name"])
        if again._fields.tobytes() != expected.tobytes():
            findings.append(f"{self.path}: the descriptors of its fields are not what was written")
        if self.sidecar is not None and self.sidecar.get("page_size") != again.page_size:
            findings.append(f"{self.path}: pages of {again.page_size} bytes are not those it was written in")
        try:
            return findings + list(again._check_gaps())
        except OSError as error:
            raise machine_error(error, f"{self.path}: cannot be read") from error

    def _check_gaps(self) -> Iterator[str]:
        order = np.argsort(self.offset, kind="stable")
        start = np.append(self.offset[order], self._data_end)
        end = np.append(self._data_start, (self.offset + self.size)[order])
        for at in np.flatnonzero(start < end).tolist():
            yield f"{self.path}, sample {order[at]}: it overlaps sample {order[at - 1]}"
        for at in np.flatnonzero(start > end).tolist():
            byte = self._first_nonzero(int(end[at]), int(start[at]))
            if byte is not None:
                where = f"before sample {order[at]}" if at < len(self) else "after the last image"
                yield f"{self.path}: byte {byte}, {where}, is not zero, but nothing is stored there"

    def _first_nonzero(self, start: int, end: int) -> int | None:
        file = self._open(0)
        for at in range(start, end, _PIECE):
            nonzero = np.flatnonzero(file.read(min(_PIECE, end - at), at))
            if len(nonzero):
                return at + int(nonzero[0])
        return None

    def close(self) -> None:
        """Drop the file; it closes after the last read in progress."""
        self._file = None
