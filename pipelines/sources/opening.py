"""The source that a line of text names."""

from __future__ import annotations

import os
from pathlib import Path

from fastdeit.pipelines.sources.base import Source, SourceError, check_class_names
from fastdeit.pipelines.sources.folder import ImageFolder
from fastdeit.pipelines.sources.idx import Idx, is_idx, open_idx_folder
from fastdeit.pipelines.sources.torchvision import Torchvision


def read_class_names(path: Path) -> list[str]:
    """Class names in the order of the labels, one a line. Raises SourceError for a file that holds none."""
    names = path.read_text(encoding="utf-8").splitlines()
    while names and not names[-1].strip():
        names.pop()
    return check_class_names([name.strip() for name in names], str(path))


def open_source(text: str | os.PathLike[str], split: str | None = None, class_names: list[str] | None = None) -> Source:
    """The source that `text` names. Raises SourceError where there is none.

    FOLDER                           class folders, or with `split` FOLDER/split; IDX files, which need a split
    FILE                             IDX images file, its labels beside it
    torchvision:NAME:ROOT[:SPLIT]    class of torchvision.datasets and its root

    `class_names` gives an image folder the order of its labels, and names the labels 0, 1, ... of other sources.
    """
    text = os.fspath(text)
    if class_names is not None:
        check_class_names(class_names, "class names")
    if text.startswith("torchvision:"):
        name, _, root = text.removeprefix("torchvision:").partition(":")
        root, _, last = root.partition(":")
        if not root:
            raise SourceError(f"{text}: write torchvision:NAME:ROOT or torchvision:NAME:ROOT:SPLIT")
        if last and split and last != split:
            raise SourceError(f"{text}: names the split '{last}', --split names '{split}'")
        return Torchvision(name, root, last or split, class_names)
    path = Path(text)
    if path.is_file():
        if not is_idx(path):
            raise SourceError(f"{path}: neither a folder nor an IDX images file (...images...idx3-ubyte[.gz])")
        if split is not None:
            raise SourceError(f"{path}: one file is one split: leave out --split, or name the folder")
        return Idx(path, class_names)
    if path.is_dir() and any(is_idx(file) for file in path.iterdir()):
        return open_idx_folder(path, split, class_names)
    folder = path / split if split else path
    if not folder.is_dir():
        raise SourceError(f"{folder}: there is no such folder or file")
    return ImageFolder(folder, class_names)
