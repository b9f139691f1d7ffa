"""The base of every error that a user can mend, and the remedy for each error of the operating system."""

import contextlib
import errno
import os
import re
import unicodedata
from collections.abc import Iterator


class UserError(Exception):
    """Bad input, configuration, data or environment; the message names what is wrong and what to do about it.

    Commands print the message alone and exit with status 2. Any other exception is a bug: a traceback, status 1.
    """


# States of the machine, whatever fails: other files would fail as well.
_LOCAL = {
    errno.ENOSPC: "free space there, or name a place on another disk",
    errno.EDQUOT: "free some of your quota there, or name a place on another disk",
    errno.EROFS: "name a place that can be written to",
    errno.EIO: "check the disk and the system's log, or copy the files to another disk",
    errno.EMFILE: "raise the limit with ulimit -n 4096",
    errno.ENFILE: "close other programs, or raise the system's limit (sysctl fs.file-max)",
    errno.ENOMEM: "close other programs, or use fewer threads or workers",
    errno.ENOLCK: "name a place on a file system that has locks",
    errno.EFBIG: "name a place whose file system and ulimit -f allow larger files",
    errno.ESTALE: "mount its file system again, then run the same command again",
}
# The same for a file. Without a path they may come from a connection, which has nothing to do with files.
MACHINE = _LOCAL | dict.fromkeys(
    (
        errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
        errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.ENODEV, errno.EREMOTEIO,
    ),
    _LOCAL[errno.ESTALE],
)  # fmt: skip
_PATH = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "part of this path is a file, not a folder: check it",
    errno.EISDIR: "name a file",
    errno.EEXIST: "move it away, or name another place",
    errno.ENOTEMPTY: "empty it, or name another place",
    errno.ELOOP: "its links form a loop: name the file itself",
    errno.EXDEV: "name a place on the same file system",
    errno.ENXIO: "name a regular file",
    errno.ETXTBSY: "wait until the program that uses it has ended",
    errno.EBUSY: "wait until the program that uses it has ended",
    errno.EINVAL: "name a regular file",
}


def os_sentence(error: OSError) -> str | None:
    """One sentence with path, reason and remedy; None unless a path or the machine's state is at fault."""
    path = None if isinstance(error.filename, int) else error.filename  # open() also takes a descriptor
    if error.errno is None or (path is None and error.errno not in _LOCAL):
        return None
    where = "" if path is None else f"{printable(os.fsdecode(path))}: "
    return f"{where}{error.strerror or os.strerror(error.errno)}: {remedy(error)}"


def remedy(error: OSError) -> str:
    """The remedy for an error of the operating system."""
    return (MACHINE | _PATH).get(error.errno or 0, "check the path")


def fact(error: BaseException) -> str:
    """The first sentence of another library's error; the rest is advice on using that library."""
    if isinstance(error, UserError):
        return str(error)
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return re.split(r"\.\s+(?=[A-Z])", line)[0].rstrip(".")


def printable(text: str, keep: str = "") -> str:
    """`text` on one line, with control characters, bidirectional controls and bytes that are not UTF-8 escaped.

    Letters of every script, emoji, the joiners inside them, spaces, and the characters in `keep` stay.
    """
    if text.isprintable():
        return text
    keep += "\u200c\u200d"  # the joiners
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add `path` to an OSError of the block that names no file: `write` and `fsync` raise such errors."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
