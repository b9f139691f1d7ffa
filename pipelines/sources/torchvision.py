"""The classification data sets of torchvision."""

from __future__ import annotations

import difflib
import inspect
import os
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdeit.pipelines.errors import fact
from fastdeit.pipelines.sources.base import SourceError, class_number, read_image
from fastdeit.pipelines.sources.files import is_left_out
from fastdeit.pipelines.sources.folder import ClassFolders


class Torchvision:
    """A classification data set of torchvision on disk; nothing is downloaded.

    If torchvision lets us choose the loader, images are the bytes of their files; otherwise torchvision decodes them.
    `split` goes to its constructor's `split` or `train` (train, test); None: the constructor's default.
    """

    def __init__(self, name: str, root: str, split: str | None = None, class_names: list[str] | None = None) -> None:
        self._arguments = (name, root, split, class_names)  # to reopen it in another process
        self._text = f"torchvision:{name}:{root}"
        import torch
        from torchvision import datasets

        kind = getattr(datasets, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
            near = difflib.get_close_matches(name, datasets.__all__, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise SourceError(f"{self._text}: torchvision has no data set named '{name}'{hint}")
        self._options = self._constructor_options(kind, split)
        try:
            self._data: Any = kind(root, **self._options)
        except Exception as error:  # on a damaged file, torchvision raises almost anything
            raise SourceError(
                f"{self._text}: torchvision cannot find or open it there ({fact(error)}). "
                f"Nothing is downloaded here: put the data set in place first"
            ) from error
        if hasattr(self._data, "loader"):
            self._data.loader = Path
        self.in_memory = isinstance(getattr(self._data, "data", None), (np.ndarray, torch.Tensor))
        self._check_listing()
        own = getattr(self._data, "classes", None) or getattr(self._data, "categories", None)
        self.class_names = class_names or (own and [n if isinstance(n, str) else ", ".join(n) for n in own])

    def _check_listing(self) -> None:
        """Raise SourceError if torchvision lists more than `ClassFolders`, the rule of all sources.

        Torchvision takes hidden folders for classes, follows links in circles, and skips unreadable folders.
        """
        from torchvision.datasets import DatasetFolder

        named = [*(getattr(self._data, "classes", None) or ()), *(getattr(self._data, "categories", None) or ())]
        for name in named:
            if isinstance(name, str) and is_left_out(name):
                raise SourceError(f"{self._text}: torchvision takes '{name}' for a class. Move it out of the data set")
        if not isinstance(self._data, DatasetFolder):
            return
        root = os.path.join(self._folder(), "")
        tree = ClassFolders(self._folder())
        below = (found for folder in tree.folders for found in tree.below(folder))
        ours = {os.path.join(root, folder, name) for folder, names in below for name in names}
        for path, _ in self._data.samples:
            if path not in ours:
                raise SourceError(
                    f"{path}: torchvision takes this for an image, but it is hidden, or lies behind a link back into "
                    f"the data set. Remove it or the link"
                )

    def _constructor_options(self, kind: type, split: str | None) -> dict[str, Any]:
        parameters = inspect.signature(kind).parameters
        options: dict[str, Any] = {"download": False} if "download" in parameters else {}
        if split is None:
            return options
        if "split" in parameters:
            return {**options, "split": split}
        if "train" in parameters and split in ("train", "test"):
            return {**options, "train": split == "train"}
        if "train" in parameters:
            raise SourceError(f"{self._text}: it has only the splits train and test, not '{split}'")
        raise SourceError(f"{self._text}: this data set of torchvision has no splits: leave out '{split}'")

    def __reduce__(self) -> tuple[type[Torchvision], tuple[Any, ...]]:
        return Torchvision, self._arguments

    def __len__(self) -> int:
        return len(self._data)

    def inputs(self) -> list[Path]:
        from torchvision.datasets import DatasetFolder

        return [self._folder()] if isinstance(self._data, DatasetFolder) else []

    def _folder(self) -> Path:
        """The folder with the class folders; the root of EuroSAT, Country211 and ImageNet is the folder above it."""
        data: Any = self._data
        if hasattr(data, "split_folder"):
            return Path(data.split_folder)
        if hasattr(data, "_data_folder"):
            return Path(data._data_folder)
        if hasattr(data, "_base_folder") and hasattr(data, "_split"):
            return Path(data._base_folder, data._split)
        return Path(data.root)

    def describe(self) -> dict[str, Any]:
        name, root, split, _ = self._arguments
        return {"kind": "torchvision", "name": name, "path": root, "split": split}

    def name(self, index: int) -> str:
        return f"{self._text}[{index}]"

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int, str]:
        name = self.name(index)
        sample = self._data[index]
        image: Any = None
        target: Any = sample
        if isinstance(sample, tuple) and len(sample) == 2:
            image, target = sample
        if target is not None and getattr(target, "shape", None) == ():
            target = target.item()
        if not isinstance(target, (Number, str, type(None))):
            raise SourceError(f"{name}: not a pair of image and class number: it cannot be converted")
        label = class_number(target, name)
        file = image if isinstance(image, Path) else getattr(image, "filename", None)
        if file:
            return read_image(Path(file)), label, str(file)
        if not isinstance(image, (Image.Image, np.ndarray)):
            raise SourceError(f"{name}: holds a {type(image).__name__}, not an image: it cannot be converted")
        return image, label, name
