"""Random access to a file by many threads, also one that shrinks while it is read."""

import os
from collections.abc import Iterator

import numpy as np

from fastdeit.pipelines.formats.files import open_regular


class OpenFile:
    """A regular file open for reading; it closes when the last thread that reads it drops its reference.

    Reads, never maps: touching a mapped file that was cut short kills the process (SIGBUS).

    identity  device, inode, size and time of the last change, when it was opened

    Raises what `open_regular` raises.
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
        """Like `read`, at most `most` bytes at a time, so a bad table is refused before memory holds all of it."""
        for at in range(offset, offset + size, most):
            yield self.read(min(most, offset + size - at), at)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
