"""FFCV's beton format, version 2, read and written without FFCV.

Layout, little-endian: a header, one descriptor per field, one metadata record per sample, the stored images, and
the allocation table that tells how long each image is. No image crosses a page boundary, pages being counted
from the start of the file. The fields are an RGBImageField and an IntField, as ffcv-imagenet writes them.

A sidecar `<name>.beton.json` lies beside it, see `sidecar`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from fastdeit.pipelines import sidecar
from fastdeit.pipelines.sidecar import ContentHash

VERSION = 2
JPEG, RAW = 0, 1
MIN_PAGE, DEFAULT_PAGE, MAX_PAGE = 1 << 21, 1 << 23, 1 << 31
MAX_SIDE = 65535  # sides are stored in 16 bits

_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
_FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
_FIELDS = ((2, b"image"), (1, b"label"))  # type ids of RGBImageField and IntField
# The image's record is packed, the label after it aligned to 8 bytes.
_SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "data_ptr", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_METADATA_START = _HEADER.itemsize + len(_FIELDS) * _FIELD.itemsize

_KIND = "fastdeit-beton"


class BetonError(ValueError):
    """A beton file, or its sidecar, that cannot be read or written as asked."""


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of the beton file at `path` lies."""
    return path.with_name(path.name + ".json")


class BetonDataset:
    """Random access to the images of a beton file: FFCV's own or one that `BetonWriter` wrote.

    path           the file
    height, width  (N,) int32, pixels
    label          (N,) int64
    offset, size   (N,) int64, where in the file an image is stored, bytes
    class_names    of the sidecar, in the order of the labels; None without one
    content_hash   of the sidecar; None without one
    sidecar        as `sidecar` describes it; None without one
    num_classes    length of class_names, or the largest label + 1

    Header, records and sizes are checked against the file when it is opened; raises BetonError naming file,
    sample and reason. Threads may share an object; pickled, it is reopened by its path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self._length = os.fstat(file.fileno()).st_size
            if self._length < _METADATA_START:
                raise self._error(f"{self._length} bytes are too few for a beton file's header")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Views keep the mapping alive, so that closing can never pull memory from under a reader.
        self._bytes: np.ndarray | None = np.frombuffer(mapped, np.uint8)
        self._read_tables(self._bytes)
        self._read_sidecar()

    def _error(self, reason: str, index: int | None = None) -> BetonError:
        where = f"{self.path}, sample {index}" if index is not None else str(self.path)
        return BetonError(f"{where}: {reason}. Convert the data set again, or copy the file again")

    def _forbid(self, bad: np.ndarray, reason: str) -> None:
        if bad.any():
            raise self._error(reason, int(bad.argmax()))

    def _read_tables(self, data: np.ndarray) -> None:
        header = data[: _HEADER.itemsize].view(_HEADER)[0]
        if header["version"] != VERSION:
            raise self._error(f"this is not a beton file of version {VERSION} (it says {header['version']})")
        page_size, count, end = (int(header[name]) for name in ("page_size", "num_samples", "alloc_table_ptr"))
        fields = data[_HEADER.itemsize : _METADATA_START].view(_FIELD)
        types = tuple(int(t) for t in fields["type_id"])
        if header["num_fields"] != len(_FIELDS) or types != tuple(t for t, _ in _FIELDS):
            raise self._error("its fields are not an RGBImageField and an IntField, in this order")
        if page_size < MIN_PAGE or page_size & (page_size - 1):
            raise self._error(f"page size {page_size} is not a power of two of at least {MIN_PAGE}")
        metadata_end = _METADATA_START + count * _SAMPLE.itemsize
        if count == 0:
            raise self._error("it holds no samples")
        if metadata_end > end or end + count * _ALLOCATION.itemsize != self._length:
            raise self._error(
                f"{count} samples with an allocation table at byte {end} do not fit a file of {self._length} bytes"
            )
        metadata = data[_METADATA_START:metadata_end]
        self._metadata_hash = hashlib.sha256(metadata.data).hexdigest()
        samples = metadata.view(_SAMPLE)
        pointer, size = self._allocations(data[end:].view(_ALLOCATION), count)
        self._forbid(pointer != samples["data_ptr"], "record and allocation table name different places")
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
        self._forbid((self._mode == RAW) & (self.size != pixels), "raw pixels do not have the size of its sides")
        self._forbid(self.label < 0, "its label is negative")
        for array in (self.offset, self.size, self.height, self.width, self.label):
            array.setflags(write=False)

    def _allocations(self, table: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Place and size of every sample, (N,) uint64; FFCV's workers write the table in any order."""
        sample = table["sample_id"]
        if (sample >= count).any():
            raise self._error(f"the allocation table names sample {sample.max()} of {count}")
        sample = sample.astype(np.int64)
        self._forbid(np.bincount(sample, minlength=count) != 1, "it is not allocated exactly once")
        pointer, size = np.empty(count, np.uint64), np.empty(count, np.uint64)
        pointer[sample], size[sample] = table["ptr"], table["size"]
        return pointer, size

    def _read_sidecar(self) -> None:
        self.class_names: list[str] | None = None
        self.content_hash: str | None = None
        self.sidecar: dict[str, Any] | None = None
        self.num_classes = int(self.label.max()) + 1
        path = sidecar_path(self.path)
        if not path.exists():
            return
        self.sidecar = sidecar.read(
            path,
            kind=_KIND,
            num_samples=len(self),
            num_classes=self.num_classes,
            metadata_hash=self._metadata_hash,
        )
        self.class_names, self.content_hash = self.sidecar["class_names"], self.sidecar["content_hash"]
        self.num_classes = len(self.sidecar["class_names"])

    def __len__(self) -> int:
        return len(self.label)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: there is no sample {index}, only 0 to {len(self) - 1}")

    def is_jpeg(self, index: int) -> bool:
        """Whether sample `index` is stored as a JPEG file; if not, as raw RGB (height, width, 3)."""
        self._check_index(index)
        return bool(self._mode[index] == JPEG)

    def read(self, index: int) -> np.ndarray:
        """Stored bytes of sample `index`: (size,) uint8, a read-only view of the mapped file.

        Raises IndexError for an index outside the data set, ValueError after `close`.
        """
        self._check_index(index)
        if self._bytes is None:
            raise ValueError(f"{self.path}: sample {index} asked for after the data set was closed")
        start = int(self.offset[index])
        return self._bytes[start : start + int(self.size[index])]

    def close(self) -> None:
        """Let go of the mapping; it goes with the last view that `read` handed out."""
        self._bytes = None

    def __enter__(self) -> BetonDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[BetonDataset], tuple[Path]]:
        return BetonDataset, (self.path,)


class BetonWriter:
    """Streams a known number of samples into a beton file that appears whole or not at all.

    Use as a context manager: `add` every sample in order, then `finish`. Until then all is under a temporary
    name in the same folder, which is removed if the block is left in any other way. The bytes written depend on
    nothing but the samples. Pages are of `page_size` bytes; an image that is larger doubles the page size of the
    whole file until it fits, which moves nothing: what lies within a page lies within a larger one.

    Raises BetonError for a sample that the format cannot hold and for a wrong number of samples.
    """

    def __init__(self, path: str | os.PathLike[str], num_samples: int, *, page_size: int = DEFAULT_PAGE) -> None:
        self.path = Path(path)
        if num_samples < 1:
            raise BetonError(f"{self.path}: no samples to write")
        if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise BetonError(f"page size {page_size} is not a power of two from {MIN_PAGE} to {MAX_PAGE}")
        self.page_size = page_size
        self._samples = np.zeros(num_samples, _SAMPLE)
        self._sizes = np.zeros(num_samples, np.uint64)
        self._count = 0
        metadata_end = _METADATA_START + self._samples.nbytes
        self._end = metadata_end + -metadata_end % page_size
        self._content = ContentHash()
        self._file: BinaryIO | None = None
        self._temporary = _temporary(self.path)
        self._temporary_sidecar = _temporary(sidecar_path(self.path))

    def __enter__(self) -> BetonWriter:
        return self

    def _output(self) -> BinaryIO:
        # Opened by the first sample: an interrupt while the block is entered would not be followed by `__exit__`.
        if self._file is None:
            self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115
        return self._file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing flushes, and raises once more where the disk is full.
        try:
            if self._file is not None:
                self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)
            self._temporary_sidecar.unlink(missing_ok=True)
            if not self.path.exists():
                sidecar_path(self.path).unlink(missing_ok=True)

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
        if not 0 < size <= MAX_PAGE or (mode == RAW and size != height * width * 3):
            raise BetonError(
                f"{self.path}, sample {index}: {size} bytes cannot be stored as {width} x {height} pixels. "
                f"Have it resized (--max-side) or stored as a JPEG (--mode jpeg)"
            )
        if label < 0:
            raise BetonError(f"{self.path}, sample {index}: label {label} is negative")
        while self.page_size < size:
            self.page_size *= 2
        if self._end % self.page_size + size > self.page_size:
            self._end += -self._end % self.page_size
        file = self._output()
        file.seek(self._end)
        file.write(data)
        self._samples[index] = (mode, width, height, self._end, label)
        self._sizes[index] = size
        self._content.add(data, height=height, width=width, label=label)
        self._count += 1
        self._end += size

    def finish(self, *, class_names: list[str], **described: Any) -> dict[str, Any]:
        """Write tables and sidecar and give both files their names; `described` joins the sidecar returned."""
        count = len(self._samples)
        if self._count != count:
            raise BetonError(f"{self.path}: {self._count} samples written of {count} announced")
        if len(class_names) <= self._samples["label"].max():
            raise BetonError(f"{self.path}: {len(class_names)} class names, but label {self._samples['label'].max()}")
        header = np.array([(VERSION, len(_FIELDS), self.page_size, count, self._end)], _HEADER)
        fields = np.zeros(len(_FIELDS), _FIELD)
        fields["type_id"], fields["name"] = zip(*_FIELDS, strict=True)
        table = np.zeros(count, _ALLOCATION)
        table["sample_id"], table["ptr"], table["size"] = np.arange(count), self._samples["data_ptr"], self._sizes
        output = self._output()
        output.seek(self._end)
        output.write(table.tobytes())
        output.seek(0)
        output.write(header.tobytes() + fields.tobytes() + self._samples.tobytes())
        output.flush()
        os.fsync(output.fileno())
        described_by = sidecar.build(
            _KIND,
            self._content,
            class_names=class_names,
            metadata_hash=hashlib.sha256(self._samples.tobytes()).hexdigest(),
            described=described,
        )
        sidecar.write(self._temporary_sidecar, described_by)
        # The sidecar first: with it alone an old file is refused, with the data alone its names would be lost.
        os.replace(self._temporary_sidecar, sidecar_path(self.path))
        os.replace(self._temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return described_by


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
