"""Move files into and out of the Linux page cache, without privileges."""

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
    """Drop the pages of `files` from the page cache and from this process's mappings.

    Dirty pages and pages that another process maps stay; `resident` counts them. The files must not be mapped writable.
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

    Linux reports this for files that the user owns or may write, and counts all others as resident.
    """
    in_cache = pages = 0
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                continue
            # A private writable mapping: ctypes takes the address of writable buffers only.
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
    """Release the pages of this process's mappings of `paths`; the next access reads them again."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in paths and "w" not in fields[1]:
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            assert match is not None
            start, end = (int(number, 16) for number in match.groups())
            _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
