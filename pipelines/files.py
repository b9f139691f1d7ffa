"""Files that are read by place, by many threads, and that may shrink under their reader."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


class OpenFile:
    """A file that is open for reading, closed when the last thread that reads it has let go of it.

    What lies on disk is read, never mapped: access to a mapped file that was cut short ends the process (SIGBUS).

    identity  device, inode, size and time of the last change, when it was opened
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = identity(os.fstat(self.descriptor))

    def read(self, size: int, offset: int) -> np.ndarray:
        """Bytes from `offset` on, (size,) uint8, or fewer where the file ends."""
        data = np.empty(size, np.uint8)
        done = 0
        while done < size:
            count = os.preadv(self.descriptor, [data[done:].data], offset + done)
            if count == 0:
                break
            done += count
        return data[:done]

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def kind(mode: int) -> str:
    """What a file of that st_mode is, for messages."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def mark(path: Path) -> list[int] | None:
    """Tells a file from any that replaces it, also after a restart: inode, size, time; None where there is none."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]
