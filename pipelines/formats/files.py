"""Files that are read by place, by many threads, and that may shrink under their reader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastdeit.pipelines.errors import UserError, os_sentence
from fastdeit.pipelines.formats.regular import check_mode


class NoRegularFileError(UserError):
    """A pipe, socket or device where a file is needed: reading one may wait for ever, or never end."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor of the file at `path`, for reading.

    Raises NoRegularFileError for what is no file, IsADirectoryError for a folder, OSError where it cannot be opened.
    """
    # Looked at before, since opening some devices does something, and after, since the name may be another's by then.
    _check_regular(path, os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: str | os.PathLike[str], mode: int) -> None:
    try:
        check_mode(path, mode)
    except IsADirectoryError:
        raise
    except OSError as error:
        raise NoRegularFileError(os_sentence(error)) from error


class OpenFile:
    """A regular file that is open for reading, closed when the last thread that reads it has let go of it.

    What lies on disk is read, never mapped: access to a mapped file that was cut short ends the process (SIGBUS).

    identity  device, inode, size and time of the last change, when it was opened

    Raises as `open_regular`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.descriptor = open_regular(path)
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

    def pieces(self, size: int, offset: int, most: int) -> Iterator[np.ndarray]:
        """As `read`, at most `most` bytes at a time: a table that is all holes need not be held to be refused."""
        for at in range(offset, offset + size, most):
            yield self.read(min(most, offset + size - at), at)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a regular file of at most `most` bytes.

    Raises as `open_regular`, and ValueError for a longer file or for another encoding.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{size} bytes, above the limit of {most}")
        return file.read(size).decode("utf-8")


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def mark(path: Path) -> list[int] | None:
    """Tells a file from any that replaces it, also after a restart: inode, size, time; None where there is none."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]
