"""Files that are read by place, by many threads, and that may shrink under their reader."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np

_KINDS = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}


class OpenFile:
    """A file that is open for reading, closed when the last thread that reads it has let go of it.

    What lies on disk is read, never mapped: access to a mapped file that was cut short ends the process (SIGBUS).

    identity  device, inode, size and time of the last change, when it was opened
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Without waiting, as a fifo would have it.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.descriptor)
        _check_regular(path, status.st_mode)
        self.identity = identity(status)

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


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError naming `path` unless it is a regular file; before it is opened, since a fifo would wait forever."""
    _check_regular(path, os.stat(path).st_mode)


def _check_regular(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"Is a {_KINDS.get(stat.S_IFMT(mode), 'device')}, not a file", os.fspath(path))


def misfetched(path: str | os.PathLike[str]) -> str | None:
    """Why a file is not what its name says, and the remedy: it is a Git LFS pointer, or a web page; None: neither."""
    with open(path, "rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
    if head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "it is a web page, so the download failed: fetch the file again, from its direct link"
    return None


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
