"""Folders of images, a folder for each class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.pipelines.sources.base import SPLITS, SourceError, class_labels, is_image, read_image


class ImageFolder:
    """A folder of class folders, in torchvision's order: classes by name, files by folder and name.

    Beside torchvision's extensions .gif and .jp2 are taken for images.

    With `class_names` the labels follow that list instead; a listed class may be absent, a folder that is not
    listed is an error, as is a class folder without images.
    """

    in_memory = False

    def __init__(self, root: Path, class_names: list[str] | None = None) -> None:
        self.root = root
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not folders:
            raise SourceError(f"{root}: no class folders in it: give a folder with one folder of images for each class")
        if all(name.lower() in SPLITS for name in folders):
            raise SourceError(f"{root}: holds the splits {', '.join(folders)}, not classes: choose one with --split")
        label = class_labels(folders, class_names, str(root))
        self.class_names = list(label)
        self._absent = sorted(set(self.class_names) - set(folders))
        self._files: list[str] = []
        labels: list[int] = []
        self._ignored = sum(entry.is_file() for entry in os.scandir(root))
        for name in folders:
            images = self._images(name)
            if not images:
                raise SourceError(f"{root / name}: no images in this class folder; fill it or remove it")
            self._files += images
            labels += [label[name]] * len(images)
        self._labels = np.array(labels, np.int64)

    def _images(self, class_name: str) -> list[str]:
        images: list[str] = []
        root = os.path.join(self.root, "")
        for folder, _, names in sorted(os.walk(root + class_name, followlinks=True)):
            found = [name for name in sorted(names) if is_image(name)]
            images += [os.path.join(folder, name)[len(root) :] for name in found]
            self._ignored += len(names) - len(found)
        return images

    def __len__(self) -> int:
        return len(self._files)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "folder",
            "path": str(self.root),
            "files_that_are_no_images": self._ignored,
            "classes_without_folder": self._absent,
        }

    def name(self, index: int) -> str:
        return str(self.root / self._files[index])

    def read(self, index: int) -> tuple[bytes, int, str]:
        path = self.root / self._files[index]
        return read_image(path), int(self._labels[index]), str(path)
