"""A folder of class folders."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.pipelines.sources.base import SPLITS, SourceError, SplitNeededError, class_labels, is_image, read_image
from fastdeit.pipelines.sources.files import Listing, listing


class ClassFolders:
    """The files below the class folders of `root`, by one rule for hidden names, links and loops.

    folders   names of the classes, sorted
    left_out  hidden and junk names skipped, see `files.is_left_out`; a folder counts once
    looping   links below a class folder that were not followed: into `root`, to a folder that holds `root`, or to a
              folder that the class already has
    linked    folders outside `root` that links lead to

    Raises SourceError for an unreadable folder, for a class folder that links back into `root`, and for a folder that
    links put into two classes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real = Path(os.path.realpath(root))
        self._class: dict[tuple[int, int], str] = {}  # of each folder outside of the root
        top = listing(root)
        self.folders, self.files = top.folders, top.files
        self.left_out, self.looping = top.left_out, 0
        self.linked: list[Path] = []

    def below(self, class_name: str) -> list[tuple[str, list[str]]]:
        """Folders and names of all files of a class, in torchvision's order; paths start with the class's name."""
        found: list[tuple[str, list[str]]] = []
        waiting = [(class_name, False)]
        while waiting:
            folder, outside = waiting.pop()
            path = os.path.join(self.root, folder)
            if os.path.islink(path):
                target = Path(os.path.realpath(path))
                if target.is_relative_to(self._real) or self._real.is_relative_to(target):
                    if folder == class_name:
                        raise SourceError(f"{path}: is a link back into {self.root}, not a class of its own. Remove it")
                    self.looping += 1
                    continue
                outside = True
                self.linked.append(target)
            if outside and not self._enter(path, class_name):
                self.looping += 1
                continue
            inside: Listing = listing(path)
            self.left_out += inside.left_out
            found.append((folder, inside.files))
            # Depth first, by name: of two links to one folder, the first by name counts.
            waiting += [(os.path.join(folder, name), outside) for name in reversed(inside.folders)]
        return sorted(found)

    def _enter(self, path: str, class_name: str) -> bool:
        """Whether a folder outside the root is new. Raises SourceError if another class has it."""
        status = os.stat(path)
        holder = self._class.setdefault((status.st_dev, status.st_ino), "")
        if holder and holder != class_name:
            raise SourceError(
                f"{path}: links put this folder into the classes '{holder}' and '{class_name}'. Remove one of them"
            )
        self._class[status.st_dev, status.st_ino] = class_name
        return not holder


class ImageFolder:
    """A folder of class folders, in torchvision's order: classes by name, files by folder and name.

    Images have one of torchvision's extensions, or .gif or .jp2; `ClassFolders` decides which files are left out.

    With `class_names`, labels follow that list. A listed class may be absent; a folder that is not listed is an error,
    and so is a class folder without images.
    """

    in_memory = False

    def __init__(self, root: Path, class_names: list[str] | None = None) -> None:
        self.root = root
        tree = ClassFolders(root)
        folders = tree.folders
        if not folders:
            raise SourceError(f"{root}: no class folders in it: give a folder with one folder of images for each class")
        if all(name.lower() in SPLITS for name in folders):
            raise SplitNeededError(
                f"{root}: holds the splits {', '.join(folders)}, not classes: choose one with --split"
            )
        label = class_labels(folders, class_names, str(root))
        self.class_names = list(label)
        self._files: list[str] = []
        labels: list[int] = []
        stray = [name for name in tree.files if is_image(name)]
        others = len(tree.files) - len(stray)
        for name in folders:
            first = len(self._files)
            for folder, names in tree.below(name):
                images = [os.path.join(folder, file) for file in names if is_image(file)]
                others += len(names) - len(images)
                self._files += images
            if len(self._files) == first:
                raise SourceError(f"{root / name}: no images in this class folder; fill it or remove it")
            labels += [label[name]] * (len(self._files) - first)
        self._labels = np.array(labels, np.int64)
        self._linked = tree.linked
        self._left_out = {
            "files_that_are_no_images": others,
            "hidden_files": tree.left_out,
            "images_outside_of_class_folders": len(stray),
            "links_not_followed": tree.looping,
            "classes_without_folder": sorted(set(self.class_names) - set(folders)),
        }

    def __len__(self) -> int:
        return len(self._files)

    def inputs(self) -> list[Path]:
        return [self.root, *self._linked]

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "path": str(self.root), **self._left_out}

    def name(self, index: int) -> str:
        return str(self.root / self._files[index])

    def read(self, index: int) -> tuple[bytes, int, str]:
        path = self.root / self._files[index]
        return read_image(path), int(self._labels[index]), str(path)
