"""The log of an unfinished conversion, from which `--resume` continues; it lies beside the destination."""

from __future__ import annotations

import binascii
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeit.pipelines.closing import Closing
from fastdeit.pipelines.conversion.workers import Reject
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import kind, sync_folder
from fastdeit.pipelines.formats.writer import Record
from fastdeit.pipelines.locks import lock
from fastdeit.pipelines.parsing import parse_json

_VERSION = 1
MAX_LINE = 16 << 20  # bytes
_ENTRIES = 1000  # in a line; with the longest reasons and names they fill a third of `MAX_LINE`
_START = b'00000000 {"journal":'  # of every journal, except for the checksum


class JournalError(UserError):
    """A journal in use by another conversion, or a file that is not a journal."""


@dataclass(frozen=True)
class Kept:
    """A stored sample, and which of `encode.CHANGES` were made."""

    record: Record
    changes: tuple[str, ...]


class Journal(Closing):
    """A log of stored and rejected samples, in the order of the conversion; a context manager.

    path    the file, which stays until `remove`
    locked  whether this journal holds the lock; False if the file system has no locks
    begun   whether a conversion has written to it

    Every line is the zlib.crc32 of the rest, a space, and JSON: first a description of the conversion, then lists of
    samples, each written after its bytes are on disk. The first torn or damaged line ends the journal. Raises
    JournalError if another `Journal`, in any process, has it open, and for a file that is not a journal. The methods
    raise it for a complete line that no conversion wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self._file = self._open()
            try:
                self.locked = self._lock()
                # The last holder may have removed it between open and lock.
                if os.path.exists(path) and os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
                    self.begun = self._check_own()
                    return
            except BaseException:
                self._file.close()
                raise
            self._file.close()

    def _open(self) -> io.FileIO:
        if os.path.lexists(self.path) and not stat.S_ISREG(mode := os.lstat(self.path).st_mode):
            raise JournalError(f"{self.path}: is {kind(mode)}, not a journal of fastdeit-convert: move it away")
        # Append mode: writes go to the end, wherever the last read was.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        # Unbuffered: a buffer would retry the bytes that a full disk refused.
        return io.FileIO(os.open(self.path, flags, 0o666), "a+")

    def _check_own(self) -> bool:
        """Whether a conversion has begun it; False for an empty file. A damaged journal counts."""
        self._file.seek(0)
        start = self._file.read(len(_START))
        # A power cut may leave part of the first line, or zeros.
        torn = not start.strip(b"\0") or (start[:8].isalnum() and start[8:] == _START[8 : len(start)])
        if start and not torn:
            raise JournalError(
                f"{self.path}: is not a journal of fastdeit-convert: move it away, or name another place"
            )
        return bool(start)

    def _lock(self) -> bool:
        try:
            return lock(self._file)
        except BlockingIOError as error:
            raise JournalError(
                f"{self.path}: another conversion to the same place is under way. Wait for it, or name another place"
            ) from error

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file and close it."""
        # Before the lock goes, or another conversion could take it over.
        self.path.unlink(missing_ok=True)
        self._file.close()

    def description(self) -> dict[str, Any] | None:
        """The description given to `begin`; None if it was never called."""
        line = next((line for line, _ in self._lines() if isinstance(line, dict)), None)
        return None if line is None else {name: value for name, value in line.items() if name != "journal"}

    def replaced(self) -> list[int] | None:
        """The last mark given to `note_replaced`."""
        marks = [line["replaces"] for line, _ in self._lines() if isinstance(line, dict) and "replaces" in line]
        return marks[-1] if marks else None  # unchecked: it is only compared

    def note_replaced(self, mark: list[int]) -> None:
        """Note, by its `files.mark`, the data set that the conversion is about to replace."""
        self._write({"replaces": mark})

    def begin(self, description: dict[str, Any]) -> None:
        """Clear the journal and describe the conversion that starts now."""
        self._file.truncate(0)
        self._write({"journal": _VERSION, **description})
        self.begun = True
        sync_folder(self.path.parent)

    def entries(self) -> Iterator[Kept | Reject]:
        """The samples handled so far."""
        for line, _ in self._lines():
            if isinstance(line, list):
                yield from map(self._entry, line)

    def cut(self, count: int) -> None:
        """Drop everything after the first `count` stored samples."""
        end = 0
        left: list[Kept | Reject] = []
        for line, after in self._lines():
            entries = [self._entry(value) for value in line] if isinstance(line, list) else []
            kept = sum(isinstance(entry, Kept) for entry in entries)
            if kept > count:
                stored = (at for at, entry in enumerate(entries) if isinstance(entry, Kept))
                left = entries[: next(at for number, at in enumerate(stored) if number == count)]
                break
            count -= kept
            end = after
        self._file.truncate(end)
        if left:
            self.append(left)

    def append(self, entries: Iterable[Kept | Reject]) -> None:
        """Add samples, whose bytes are already on disk, and sync."""
        values = [_value(entry) for entry in entries]
        self._write(*(values[at : at + _ENTRIES] for at in range(0, len(values), _ENTRIES)))

    def _write(self, *values: Any) -> None:
        texts = [json.dumps(value, separators=(",", ":")).encode() for value in values]
        end = os.fstat(self._file.fileno()).st_size
        rest = memoryview(b"".join(b"%08x %s\n" % (binascii.crc32(text), text) for text in texts))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:
            # A full disk or an interrupt: nothing after a torn line would be read.
            with suppress(OSError):
                self._file.truncate(end)
            raise

    def _lines(self) -> Iterator[tuple[Any, int]]:
        """The value of each whole line, and the byte where the line ends."""
        end = 0
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            while line := file.readline(MAX_LINE):
                crc32, _, text = line.removesuffix(b"\n").partition(b" ")
                if not line.endswith(b"\n") or crc32 != b"%08x" % binascii.crc32(text):
                    return
                end += len(line)
                try:
                    value = parse_json(text, MAX_LINE)
                except ValueError as error:
                    raise self._foreign(str(error)) from error
                yield value, end

    def _entry(self, value: Any) -> Kept | Reject:
        match value:
            case [int() as index, str() as name, str() as reason]:
                return Reject(index, name, reason)
            case [int() as height, int() as width, int() as label, int() as mode, int() as size, int() as crc32, *made]:
                if all(isinstance(change, str) for change in made):
                    record = Record(height=height, width=width, label=label, mode=mode, size=size, crc32=crc32)
                    return Kept(record, tuple(made))
        raise self._foreign("a sample whose fields are missing or wrong")

    def _foreign(self, reason: str) -> JournalError:
        return JournalError(
            f"{self.path}: holds a line that no conversion wrote ({reason}): move it away, and start again "
            f"without --resume"
        )


def difference(then: Any, now: Any, field: str = "") -> str | None:
    """The first field in which two descriptions differ, and how; None if they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*now, *then)):
            if changed := difference(then.get(name), now.get(name), f"{field}.{name}" if field else name):
                return changed
        return None
    if then == now:
        return None
    values = [json.dumps(value) for value in (then, now)]
    return f"{field} differs" if max(map(len, values)) > 200 else f"{field} was {values[0]} and is now {values[1]}"


def _value(entry: Kept | Reject) -> list[Any]:
    if isinstance(entry, Reject):
        return [entry.index, entry.name, entry.reason]
    record = entry.record
    fields = (record.height, record.width, record.label, record.mode, record.size, record.crc32)
    return [*fields, *entry.changes]
