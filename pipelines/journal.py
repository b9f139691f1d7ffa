"""What an unfinished conversion has done so far, so that it can go on: a log of lines beside its destination."""

from __future__ import annotations

import binascii
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdeit.pipelines.encoded import Reject
from fastdeit.pipelines.locks import lock
from fastdeit.pipelines.writing import Record


class JournalError(ValueError):
    """A journal that is in use, or of another conversion."""


@dataclass(frozen=True)
class Kept:
    """A sample that was stored, and what was done to it, see `encode.CHANGES`."""

    record: Record
    changes: tuple[str, ...]


class Journal:
    """A log of samples that were stored or rejected, in the order of the conversion; a context manager.

    path    it stays there when it is closed, until `remove`
    locked  whether nobody else can open it; False where the file system has no locks

    Every line is the zlib.crc32 of what follows, a space, and JSON: first a description of the conversion, then lists
    of samples, each written once its bytes are on disk. A line that is torn or damaged ends the journal, wherever it
    stands. Raises JournalError where another process, or another journal of this one, has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            # In append mode, what is written stands at the end wherever was read before.
            self._file = open(path, "a+b")  # noqa: SIM115
            try:
                self.locked = self._lock()
                # Whoever had it may have removed it while this waited to be opened.
                if os.path.exists(path) and os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
                    return
            except BaseException:
                self._file.close()
                raise
            self._file.close()

    def _lock(self) -> bool:
        try:
            return lock(self._file)
        except BlockingIOError as error:
            raise JournalError(
                f"{self.path}: another conversion to the same place is under way. Wait for it, or name another place"
            ) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def remove(self) -> None:
        """Take the file away; nothing can be added any more."""
        # While it is locked: nobody can take it up in between.
        self.path.unlink(missing_ok=True)
        self._file.close()

    def description(self) -> dict[str, Any] | None:
        """What `begin` was given; None in a journal that never began."""
        return next((line for line, _ in self._lines() if isinstance(line, dict)), None)

    def begin(self, description: dict[str, Any]) -> None:
        """Drop what it holds, and describe the conversion that now begins."""
        self._file.truncate(0)
        self._write(description)

    def entries(self) -> Iterator[Kept | Reject]:
        """The samples that were done."""
        for line, _ in self._lines():
            if isinstance(line, list):
                yield from map(_entry, line)

    def cut(self, count: int) -> None:
        """Drop what was done after the sample that was stored as number `count`."""
        end = 0
        left: list[Kept | Reject] = []
        for line, after in self._lines():
            entries = [_entry(value) for value in line] if isinstance(line, list) else []
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
        """Add samples that were done, those stored being on disk already, and have them on disk."""
        self._write([_value(entry) for entry in entries])

    def _write(self, value: Any) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        self._file.write(b"%08x %s\n" % (binascii.crc32(text), text))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lines(self) -> Iterator[tuple[Any, int]]:
        """What each whole line holds, and where in the file it ends."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            crc32, _, text = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc32 != b"%08x" % binascii.crc32(text):
                return
            end += len(line)
            yield json.loads(text), end


def difference(then: Any, now: Any, field: str = "") -> str | None:
    """The first field in which two descriptions differ, and how; None where they are the same."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*now, *then)):
            if found := difference(then.get(name), now.get(name), f"{field}.{name}" if field else name):
                return found
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


def _entry(value: list[Any]) -> Kept | Reject:
    if len(value) == 3:
        return Reject(*value)
    height, width, label, mode, size, crc32, *changes = value
    record = Record(height=height, width=width, label=label, mode=mode, size=size, crc32=crc32)
    return Kept(record, tuple(changes))
