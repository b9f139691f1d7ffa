"""Limits for untrusted compressed files and NumPy arrays, checked before anything is unpacked.

A deflated kilobyte can unpack to a megabyte; images and labels hardly compress.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

_FREE, _RATIO = 64 << 20, 16  # a file may unpack to this many bytes plus this many times its size
_MOST_DIRECTORY = 1 << 20  # bytes of a .npz file's directory; a real one takes 200


def most_unpacked(stored: int) -> int:
    """The bytes that `stored` compressed bytes may unpack to. MNIST's digits take five times their stored size."""
    return _FREE + _RATIO * stored


class BoundedReads(io.RawIOBase):
    """Wraps a file for `zipfile`, and refuses to read more than `most` bytes at once, such as a huge directory."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most = file, most

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._most + 1 if size < 0 else min(size, self._most + 1))
        if len(data) > self._most:
            raise zipfile.BadZipFile(f"its directory takes more than {self._most} bytes")
        return data


def read_array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype in the header of a .npy file. Raises ValueError unless `np.save` wrote it."""
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version} of the format")
        return np.lib.format.read_array_header_1_0(file)
    # NumPy evaluates the header as Python literals; a damaged one raises almost anything.
    except Exception as error:
        raise ValueError(f"not an array of NumPy ({type(error).__name__}: {error})") from error


def read_array(file: BinaryIO, size: int) -> np.ndarray:
    """The array in the next `size` bytes, a .npy file; read-only.

    Raises ValueError if they are not one, or if the header claims another size, before it takes memory.
    """
    start = file.tell()
    shape, fortran, dtype = read_array_header(file)
    left = start + size - file.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"{size} bytes are not an array of shape {shape}")
    return np.frombuffer(file.read(left), dtype).reshape(shape, order="F" if fortran else "C")


def read_npz(file: BinaryIO, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `names` of an uncompressed .npz file; read-only.

    Raises ValueError, KeyError, EOFError or zipfile.BadZipFile for any other file. A compressed one is refused before
    it is unpacked, so no array takes more memory than it takes on the disk.
    """
    arrays = {}
    with zipfile.ZipFile(BoundedReads(file, _MOST_DIRECTORY)) as archive:
        for name in names:
            record = archive.getinfo(f"{name}.npy")
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"its {name} is compressed")
            with archive.open(record) as member:
                pieces = iter(lambda member=member: member.read(_MOST_DIRECTORY), b"")
                arrays[name] = read_array(io.BytesIO(b"".join(pieces)), record.file_size)
    return arrays
