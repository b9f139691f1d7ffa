"""The interface of a source of images, and its errors."""

import operator
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import NoRegularFileError, open_regular

# torchvision.datasets.folder.IMG_EXTENSIONS, and the others that `encode` reads
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jp2")
MAX_FILE = 1 << 28  # bytes of one image
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class SourceError(UserError):
    """A source that cannot be opened or read; says which file or sample, why, and what to do."""


class SplitNeededError(SourceError):
    """A source of several splits, none of which was chosen."""


class UnlistedClassError(SourceError):
    """A class of the source that the given class names lack."""


class SampleError(UserError):
    """One sample that cannot be used, in a usable source; says which, why, and what to do."""


class Source(Protocol):
    """Labelled images by index.

    class_names  in the order of the labels; None if the source has only numbers
    in_memory    whether memory holds the samples, so worker processes would need a copy
    """

    @property
    def class_names(self) -> list[str] | None: ...

    @property
    def in_memory(self) -> bool: ...

    def __len__(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """Kind, path and counts of what was left out, for the sidecar and the report."""
        ...

    def inputs(self) -> list[Path]:
        """The files it reads, and the folders whose files all belong to it: nothing may be written there."""
        ...

    def name(self, index: int) -> str:
        """The name of sample `index`, without reading it: a file, `archive.tar:member`, `file.parquet[row]`."""
        ...

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int, str]:
        """Image (a file's bytes, or decoded), label, and a name for messages.

        Raises SampleError or OSError for a bad sample, SourceError for a bad source.
        """
        ...


def check_class_names(names: list[str], where: str) -> list[str]:
    """Return `names`. Raises SourceError, which names `where`, if one is empty or there twice, or if there are none."""
    if not names:
        raise SourceError(f"{where}: no class names: give one a line")
    seen: set[str] = set()
    for line, name in enumerate(names, 1):
        if not name or name in seen:
            raise SourceError(f"{where}, line {line}: " + (f"'{name}' is there twice" if name else "empty"))
        seen.add(name)
    return names


def class_labels(found: list[str], class_names: list[str] | None, where: str) -> dict[str, int]:
    """The label of every class by its name: in the order of `class_names`, or sorted without them.

    `found` are the classes that have images. Raises SourceError, which names `where`, for one that is not listed.
    """
    label = {name: i for i, name in enumerate(class_names or sorted(found))}
    for name in found:
        if name not in label:
            raise UnlistedClassError(
                f"{where}: class '{name}' is not in the list of class names: add it to the list, or remove its images"
            )
    return label


def class_number(value: Any, name: str, what: str = "its label") -> int:
    """`value` as an int if it is an integer, Python's or NumPy's; otherwise raises SampleError naming the field."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise SampleError(f"{name}: {what} is {shown(value)}, not the number of a class. Mend the label")


def shown(value: Any) -> str:
    """`value` for a message, shortened. Containers are not shown: one from a pickle may print as 10 GB."""
    if not isinstance(value, str | bytes | int | float | np.generic | None):
        return f"a {type(value).__name__}"
    try:
        text = repr(value[:41] if isinstance(value, str | bytes) else value)
    except ValueError:  # an integer of more than 4,300 digits
        return "an integer too long to show"
    return text if len(text) <= 40 else f"{text[:40]}..."


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises SampleError if it is not a regular file, or too large for an image."""
    try:
        descriptor = open_regular(path)
    except (NoRegularFileError, IsADirectoryError) as error:
        raise SampleError(f"{path}: is not a regular file: leave it out") from error
    with open(descriptor, "rb") as file:
        if (size := os.fstat(descriptor).st_size) > MAX_FILE:
            raise SampleError(f"{path}: {size} bytes, but an image may have at most {MAX_FILE}. Remove it")
        return file.read()


def stamp(file: Path | int) -> tuple[int, int]:
    """Size and modification time of a file, given by its path or descriptor."""
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns


def check_stamp(path: Path, expected: tuple[int, int], file: int | None = None) -> None:
    """Raise SourceError if the file has changed since it was indexed."""
    if stamp(path if file is None else file) != expected:
        raise SourceError(f"{path}: has changed since it was indexed. Start again")
