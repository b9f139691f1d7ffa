"""Reads tar archives by index: it checks every header once, and then reads members in place."""

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from fastdeit.pipelines.console import progress_bar
from fastdeit.pipelines.errors import printable
from fastdeit.pipelines.formats.bounds import most_unpacked
from fastdeit.pipelines.sources.base import MAX_FILE, SampleError, SourceError, check_stamp, stamp
from fastdeit.pipelines.sources.files import is_left_out, open_regular

BLOCK = 512
MAX_EXTENDED = 1 << 20  # bytes of a pax header
MAX_NAME = 4096  # characters, as in a Linux path
MAX_PADDING = 16 << 20  # bytes after the end-of-archive blocks; writers pad to about 10 KiB
MAX_UNZIPPED = 2 << 30  # bytes of a gzipped archive, held in memory
_FETCH = "Fetch the archive again"
_KINDS = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a fifo", "S": "sparse"}


@dataclass
class Archive:
    """The bytes of a tar archive: a file, or the gunzipped content in memory.

    Raises SourceError for a gzipped file that is damaged, or that unpacks to more than `limit` bytes or
    `most_unpacked`; limit 0 refuses gzip.
    """

    path: Path
    limit: int = MAX_UNZIPPED

    def __post_init__(self) -> None:
        with open_regular(self.path) as file:
            zipped = file.read(2) == b"\x1f\x8b"
        if zipped and not self.limit:
            raise SourceError(f"{self.path}: is gzipped, but shards are read in place: gunzip it first")
        self.data = _unzip(self.path, self.limit) if zipped else None
        self._held: int | None = None
        self._stamp = stamp(self.path)
        self.size = self._stamp[0] if self.data is None else len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset` on; fewer at the end. Raises SourceError if the file has changed."""
        if self.data is not None:
            return bytes(memoryview(self.data)[offset : offset + size])
        if self._held is not None:
            return self._pread(self._held, offset, size)
        # Not kept open: a data set may have thousands of archives.
        file = os.open(self.path, os.O_RDONLY)
        try:
            return self._pread(file, offset, size)
        finally:
            os.close(file)

    def _pread(self, file: int, offset: int, size: int) -> bytes:
        check_stamp(self.path, self._stamp, file)
        return os.pread(file, size, offset)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file open for many small reads: on a network file system, opening costs more than reading."""
        if self.data is not None or self._held is not None:
            yield
            return
        self._held = os.open(self.path, os.O_RDONLY)
        try:
            yield
        finally:
            os.close(self._held)
            self._held = None

    def member(self, name: str, offset: int, size: int) -> bytes:
        """The bytes of a member. Raises SampleError if it is too large for a sample, or cut short."""
        if size > MAX_FILE:
            raise SampleError(f"{name}: {size} bytes, but an image may have at most {MAX_FILE}. Remove it")
        data = self.read(offset, size)
        if len(data) != size:
            raise SampleError(f"{name}: cut short after {len(data)} of {size} bytes. {_FETCH}")
        return data

    def __getstate__(self) -> dict[str, object]:
        if self.data is not None:
            raise TypeError(f"{self.path}: is held in memory, which is not copied to other processes")
        return self.__dict__


@dataclass
class Members:
    """Regular members of a tar archive, in its order.

    names         as stored, without a leading "./"; unprintable characters and bytes that are not UTF-8 are escaped
    offset, size  (N,) int64, bytes in the archive
    ignored       number of files skipped for a name in their path, see `files.is_left_out`
    """

    names: list[str]
    offset: np.ndarray
    size: np.ndarray
    ignored: int


def index(archive: Archive, where: str, start: int = 0, end: int | None = None, bar: tqdm | None = None) -> Members:
    """The members of the tar in `archive` from byte `start` to `end`; `where` names it in messages.

    Raises SourceError for members that no data set needs (absolute names or ones with "..", links, devices, sparse
    members, a name twice), and for a damaged or truncated archive.
    """
    names: list[str] = []
    seen: set[str] = set()
    places: list[tuple[int, int]] = []
    ignored = 0
    with archive.held():
        for name, offset, size in _headers(archive, where, start, archive.size if end is None else end, bar):
            if name in seen:
                raise SourceError(f"{where}:{name}: a second member of this name. Pack the archive again with one")
            seen.add(name)
            if any(is_left_out(part) for part in name.split("/") if part != "."):
                ignored += 1
                continue
            names.append(name)
            places.append((offset, size))
    table = np.array(places, np.int64).reshape(-1, 2)
    return Members(names, table[:, 0].copy(), table[:, 1].copy(), ignored)


def progress(total: int) -> tqdm:
    """A progress bar over bytes; it appears after 2 seconds of indexing."""
    return progress_bar([], unit="B", unit_scale=True, total=total, desc="indexing", delay=2, leave=False)


def _headers(archive: Archive, where: str, start: int, end: int, bar: tqdm | None) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every regular member."""
    at = start
    extended: dict[str, str] = {}
    while True:
        header = archive.read(at, BLOCK) if at + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise SourceError(f"{where}: ends at byte {at - start} without its end-of-archive blocks. {_FETCH}")
        if not any(header):
            break
        kind, size, own_name = _fields(header, f"{where}, byte {at - start}")
        name = extended.get("path", own_name).removeprefix("./")
        size = int(extended.get("size", size))
        if len(name) > MAX_NAME:
            here = f"{where}, byte {at - start}"
            raise SourceError(
                f"{here}: a name of {len(name)} characters, but at most {MAX_NAME} are allowed. Rename it"
            )
        label = f"{where}:{name}"
        if at + BLOCK + size > end:
            raise SourceError(f"{label}: declares {size} bytes, beyond the end of the archive. {_FETCH}")
        following = at + BLOCK + -(-size // BLOCK) * BLOCK
        if bar is not None:
            bar.update(following - at)
        if kind in "LKxg":
            if size > MAX_EXTENDED:
                raise SourceError(f"{label}: an extended header of {size} bytes; at most {MAX_EXTENDED} are allowed")
            data = archive.read(at + BLOCK, size)
            # Check each one: a file that damage turned into an extended header would silently be missing.
            here = f"{where}, byte {at - start}"
            if kind in "LK":
                if b"\0" in data.rstrip(b"\0"):
                    raise SourceError(f"{here}: a damaged long name. {_FETCH}")
                extended |= {"path": _text(data)} if kind == "L" else {}
            else:
                stated = _pax(data, here)
                extended |= stated if kind == "x" else {}
        else:
            extended = {}
            _refuse(name, kind, label)
            if kind != "5":
                yield name, at + BLOCK, size
        at = following
    _check_end(archive, where, at, start, end)


def _check_end(archive: Archive, where: str, at: int, start: int, end: int) -> None:
    if end - at > MAX_PADDING:
        raise SourceError(f"{where}: goes on for {end - at} bytes after its end. Unpack and pack it again")
    rest = archive.read(at, end - at)
    if len(rest) < 2 * BLOCK:
        raise SourceError(f"{where}: ends at byte {at - start} without its end-of-archive blocks. {_FETCH}")
    if rest.count(0) != len(rest):
        raise SourceError(f"{where}: holds more after its end at byte {at - start}. Unpack and pack it again")


def _fields(header: bytes, where: str) -> tuple[str, int, str]:
    """Kind, size and name in a header."""
    if _number(header[148:156], where) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise SourceError(f"{where}: not a tar header, or a damaged one. {_FETCH}")
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    kind = chr(header[156])
    return "0" if kind in "\x007" else kind, _number(header[124:136], where), f"{prefix}/{name}" if prefix else name


def _number(field: bytes, where: str) -> int:
    if field[0] == 0x80:  # GNU's form for numbers too large for octal digits
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise SourceError(f"{where}: {field!r} is not a number of a tar header. {_FETCH}")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    # Names are printed to terminals.
    return printable(field.partition(b"\0")[0].decode("utf-8", "backslashreplace"))


def _pax(data: bytes, where: str) -> dict[str, str]:
    """The name and size in a pax header. Format: POSIX.1-2017, pax, extended header."""
    found: dict[str, str] = {}
    data = data.rstrip(b"\0")
    at = 0
    while at < len(data):
        length, space, _ = data[at : at + 9].partition(b" ")
        if not (space and length.isdigit() and len(length) + 3 < int(length) <= len(data) - at):
            raise SourceError(f"{where}: a damaged pax header. {_FETCH}")
        record = data[at + len(length) + 1 : at + int(length)]
        at += int(length)
        key, separator, value = record.removesuffix(b"\n").partition(b"=")
        if not separator or (key == b"size" and not (value.isdigit() and len(value) < 20)):
            raise SourceError(f"{where}: a damaged pax header. {_FETCH}")
        if key.startswith(b"GNU.sparse"):
            raise SourceError(f"{where}: a sparse member. Pack the archive again without --sparse")
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value)
    return found


def _refuse(name: str, kind: str, label: str) -> None:
    if name.startswith("/"):
        raise SourceError(f"{label}: an absolute name. Pack the archive again with relative ones")
    if ".." in PurePosixPath(name).parts:
        raise SourceError(f"{label}: a name with '..'. Pack the archive again from the folder itself")
    if kind not in "05":
        what = _KINDS.get(kind, f"of type {kind!r}")
        raise SourceError(f"{label}: is {what}, not a file. Pack the archive again with files only")
    if kind == "0" and not name.strip("/"):
        raise SourceError(f"{label}: a member without a name. {_FETCH}")


def _unzip(path: Path, limit: int) -> bytearray:
    data = bytearray()
    limit = min(limit, most_unpacked(path.stat().st_size))
    try:
        with gzip.open(path) as file:
            while piece := file.read(1 << 20):
                data += piece
                if len(data) > limit:
                    raise SourceError(f"{path}: holds more than {limit} bytes, too many for memory: gunzip it first")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: truncated or damaged ({error}). {_FETCH}") from error
    return data
