"""Regular files: opened safely, named in messages, and written whole or not at all.

Imports nothing but the standard library, so cheap commands may use it.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from fastdeit.pipelines.errors import UserError, naming, os_sentence

TEMPORARY = ".tmp"  # the end of a file's name while `atomic_write` writes it
_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


class NoRegularFileError(UserError):
    """A pipe, socket or device in place of a file: reading one may wait for ever, or never end."""


def kind(mode: int) -> str:
    """What a file of this st_mode is, for messages."""
    return _KINDS.get(stat.S_IFMT(mode), "a device")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError naming `path` unless it is a regular file. Call it before opening: a fifo would wait for ever."""
    _check_mode(path, os.stat(path).st_mode)


def _check_mode(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"Is {kind(mode)}, not a file", os.fspath(path))


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open the file at `path` for reading and return its descriptor.

    Raises NoRegularFileError for a pipe, socket or device, IsADirectoryError for a folder, and OSError where the file
    cannot be opened.
    """

    def check(mode: int) -> None:
        try:
            _check_mode(path, mode)
        except IsADirectoryError:
            raise
        except OSError as error:
            raise NoRegularFileError(os_sentence(error)) from error

    # Before, because opening a device may act on it; after, because the name may point elsewhere by then.
    check(os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        check(os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether `path` still names the open `file`, which may have been removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            raise
        return False


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a regular file of at most `most` bytes.

    Raises what `open_regular` raises, and ValueError for a longer file or another encoding.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{size} bytes, above the limit of {most}")
        return file.read(size).decode("utf-8")


def beside(path: Path, suffix: str) -> Path:
    """The path in the same folder whose name has `suffix` at its end."""
    return path.with_name(path.name + suffix)


@contextlib.contextmanager
def atomic_write(path: Path, suffix: str = TEMPORARY) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when the block ends: `path` holds the old bytes or all the new ones.

    The bytes go to `path` + `suffix`, which is synced, renamed and removed on any error. Only a killed process leaves
    it behind. An OSError names a path.
    """
    partial = beside(path, suffix)
    try:
        with naming(path):
            partial.unlink(missing_ok=True)  # of a killed process; a link's target is not ours to overwrite
            with open(partial, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync it, for a folder or name that readers do not see yet. An OSError names `path`."""
    with naming(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk, if its file system can: Windows' disks under WSL (9p) cannot."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(folder)


def mark(path: Path) -> list[int] | None:
    """Inode, size and time, which identify a file even after a restart; None where there is no file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def misfetched(path: str | os.PathLike[str]) -> str | None:
    """The reason and remedy if a file is a Git LFS pointer or a web page in place of the data; None otherwise."""
    with open(path, "rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
    if head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "it is a web page, so the download failed: fetch the file again, from its direct link"
    return None
