"""Whether a path is a file that can be read as one; nothing here needs more than Python itself."""

from __future__ import annotations

import errno
import os
import stat

_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


def kind(mode: int) -> str:
    """What a file with that st_mode is, for messages."""
    return _KINDS.get(stat.S_IFMT(mode), "a device")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError naming `path` unless it is a regular file; before it is opened, since a fifo would wait forever."""
    check_mode(path, os.stat(path).st_mode)


def check_mode(path: str | os.PathLike[str], mode: int) -> None:
    """As `check_regular`, of the mode that stat gives."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"Is {kind(mode)}, not a file", os.fspath(path))


def misfetched(path: str | os.PathLike[str]) -> str | None:
    """Why a file is not what its name says, and the remedy: it is a Git LFS pointer, or a web page; None: neither."""
    with open(path, "rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
    if head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "it is a web page, so the download failed: fetch the file again, from its direct link"
    return None
