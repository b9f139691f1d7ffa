"""Compares stored images with their checksums when they are first read."""

import zlib

import numpy as np


class Checksums:
    """The checksums of a data set's images, and which of them this process has compared.

    An image is compared on its first read only: disks and copies corrupt files over years, memory rarely does within
    a run. Threads may share an object; at worst two compare the same image.

    crc32  (N,) uint32, zlib.crc32 of every sample's stored bytes
    """

    def __init__(self, crc32: np.ndarray) -> None:
        self._crc32 = crc32
        self._compared = bytearray(len(crc32))

    def fits(self, index: int, stored: np.ndarray) -> bool:
        """Whether `stored`, (size,) uint8, has the checksum of sample `index`."""
        if not self._compared[index]:
            if zlib.crc32(stored.data) != self._crc32[index]:
                return False
            self._compared[index] = 1
        return True


def unchecked(path: object, checksums: Checksums | None) -> str | None:
    """The warning for a data set without checksums; None if it has them."""
    if checksums is not None:
        return None
    return (
        f"{path} has no checksums, so damage that still decodes goes unnoticed: "
        "convert the data with fastdeit-convert, or copy the .json file that belongs beside it"
    )
