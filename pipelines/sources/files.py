"""Lists and opens the files of a source; every source leaves out the same junk and refuses the same kinds."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastdeit.pipelines.formats import files
from fastdeit.pipelines.formats.files import kind
from fastdeit.pipelines.sources.base import SourceError, is_image

MAX_TEXT = 8 << 20  # bytes of a list of class names or labels; Kaggle's list for ILSVRC2012's val set takes 4 MB
# Names, in lower case, that file managers, network disks and operating systems leave in folders.
JUNK = frozenset(
    (
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "icon\r",
        "icon\\r",  # the same, as tar escapes it
        "network trash folder",
        "temporary items",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
    )
)


def is_left_out(name: str) -> bool:
    """Whether every source skips a file or folder of this name: hidden, a backup, or one of `JUNK`.

    Hidden names start with a dot, as .DS_Store, ._x, .nfs0001 and .ipynb_checkpoints do; backups end with ~.
    """
    return name.startswith((".", "~$")) or name.endswith("~") or name.lower() in JUNK


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises SourceError for anything else: reading a fifo would wait forever."""
    try:
        return open(files.open_regular(path), "rb")
    except (files.NoRegularFileError, IsADirectoryError) as error:
        what = kind(os.stat(path).st_mode)
        raise SourceError(f"{path}: is {what}, not a regular file. Copy its content to a file and name that") from error
    except FileNotFoundError as error:
        raise SourceError(f"{path}: there is no such file: check the path") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be opened ({error.strerror}). Check its permissions") from error


def is_folder(path: Path | str) -> bool:
    """Whether `path` is a folder; False if it does not exist. Raises SourceError if it cannot be looked into."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SourceError(f"{path}: cannot be looked into ({error.strerror}). Check its permissions") from error


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file of at most `MAX_TEXT`. Raises SourceError for any other."""
    with open_regular(path) as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise SourceError(f"{path}: more than {MAX_TEXT} bytes, too many for a list. Is it the right file?")
    return data


def read_text(path: Path) -> str:
    """`read_bytes` as text. Raises SourceError for bytes that are not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not text ({error}). Save it as UTF-8") from error


@dataclass
class Listing:
    """Names in a folder, sorted; a link counts as its target.

    left_out  number of names that `is_left_out` skipped
    """

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    left_out: int = 0


def listing(folder: str | Path, wanted: Callable[[str], bool] = lambda _: True) -> Listing:
    """The names in `folder` that are `wanted`.

    Raises SourceError, naming the path, if the folder or the target of a link cannot be read: an image or a class
    would silently be missing. A broken link with the name of an image counts as a file; reading it gives the error.
    """
    found = Listing()
    try:
        with os.scandir(folder) as scanned:
            entries = sorted((entry for entry in scanned if wanted(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(
            f"{folder}: cannot be listed ({error.strerror}). Mend its permissions, or move it out of the source"
        ) from error
    for entry in entries:
        if is_left_out(entry.name):
            found.left_out += 1
        elif _is_folder(entry):
            found.folders.append(entry.name)
        else:
            found.files.append(entry.name)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        if not entry.is_symlink():
            return entry.is_dir(follow_symlinks=False)
        return stat.S_ISDIR(os.stat(entry.path).st_mode)
    except OSError as error:
        if is_image(entry.name):
            return False
        what = "is a link that leads nowhere" if isinstance(error, FileNotFoundError) else "cannot be looked into"
        raise SourceError(f"{entry.path}: {what} ({error.strerror}). Mend it or remove it") from error
