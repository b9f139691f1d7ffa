"""Files in and out of the page cache of Linux, without privileges."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path

_MADV_DONTNEED = 4
_LIBC = ctypes.CDLL(None, use_errno=True)


def warm(files: Iterable[Path]) -> None:
    """Read every file once."""
    for path in files:
        path.read_bytes()


def evict(files: Iterable[Path]) -> None:
    """Drop the pages of `files` from the page cache, and from the mappings of them that this process has.

    Pages that are dirty, or that another process maps, stay; `resident` tells. The files must not be mapped writable.
    """
    files = list(files)
    _unmap({os.path.realpath(path) for path in files})
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident(files: Iterable[Path]) -> float:
    """The share of the pages of `files` that is in the page cache.

    Linux tells it of files that this user owns or may write to, and counts all others as resident.
    """
    in_cache = pages = 0
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                continue
            # A private mapping, since ctypes takes the address of writable buffers only.
            with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
                count = -(-size // mmap.PAGESIZE)
                flags = (ctypes.c_ubyte * count)()
                start = ctypes.c_char.from_buffer(mapped)
                failed = _LIBC.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), flags)
                del start
                if failed:
                    error = ctypes.get_errno()
                    raise OSError(error, f"mincore: {os.strerror(error)}", str(path))
                in_cache += sum(flag & 1 for flag in flags)
                pages += count
    return in_cache / pages if pages else 0.0


def _unmap(paths: set[str]) -> None:
    """Give back this process's pages of its mappings of `paths`; they are read again where they are touched."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in paths and "w" not in fields[1]:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            assert found is not None
            start, end = (int(number, 16) for number in found.groups())
            _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
