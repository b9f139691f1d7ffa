"""Where a conversion's images come from: image folders, IDX files, torchvision's data sets."""

from __future__ import annotations

import difflib
import gzip
import inspect
import math
import operator
import os
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

# torchvision.datasets.folder.IMG_EXTENSIONS
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class SourceError(ValueError):
    """A source that cannot be opened or read; says which file or sample, why, and what to do."""


class Source(Protocol):
    """Labelled images by index.

    class_names  in the order of the labels; None where the source knows only numbers
    in_memory    whether the samples are held in memory, so that other processes would need a copy
    """

    @property
    def class_names(self) -> list[str] | None: ...

    @property
    def in_memory(self) -> bool: ...

    def __len__(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """What the source is and what it left out, for the sidecar and the report."""
        ...

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int, str]:
        """Image (a file's bytes, or decoded), label, and a name for messages. Raises OSError or SourceError."""
        ...


class ImageFolder:
    """A folder of class folders, in torchvision's order: classes by name, files by folder and name.

    With `class_names` the labels follow that list instead; a listed class may be absent, a folder that is not
    listed is an error, as is a class folder without images.
    """

    in_memory = False

    def __init__(self, root: Path, class_names: list[str] | None = None) -> None:
        self.root = root
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not folders:
            raise SourceError(f"{root}: no class folders in it, one folder of images for each class")
        if all(name.lower() in _SPLITS for name in folders):
            raise SourceError(f"{root}: holds the splits {', '.join(folders)}, not classes: choose one with --split")
        self.class_names = class_names or folders
        label = {name: i for i, name in enumerate(self.class_names)}
        unlisted = [name for name in folders if name not in label]
        if unlisted:
            raise SourceError(f"{root / unlisted[0]}: class '{unlisted[0]}' is not in the list of class names")
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
            found = [name for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS)]
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

    def read(self, index: int) -> tuple[bytes, int, str]:
        path = self.root / self._files[index]
        return path.read_bytes(), int(self._labels[index]), str(path)


class Idx:
    """Images and labels of the MNIST family's IDX files, plain or gzipped.

    Format: http://yann.lecun.com/exdb/mnist, two zero bytes, element type (8: unsigned byte), number of
    dimensions, then each dimension as a big-endian uint32. Classes are named by their digits unless named.
    """

    in_memory = True

    def __init__(self, images: Path, class_names: list[str] | None = None) -> None:
        self.images = images
        self.labels = _labels_file(images)
        self._pixels = read_idx(images, 3)
        self._label = read_idx(self.labels, 1)
        if len(self._pixels) != len(self._label):
            raise SourceError(f"{images}: {len(self._pixels)} images, but {len(self._label)} labels in {self.labels}")
        if not self._pixels.size:
            raise SourceError(f"{images}: holds no pixels")
        self.class_names = class_names or [str(i) for i in range(int(self._label.max()) + 1)]

    def __len__(self) -> int:
        return len(self._pixels)

    def describe(self) -> dict[str, Any]:
        return {"kind": "idx", "images": str(self.images), "labels": str(self.labels)}

    def read(self, index: int) -> tuple[np.ndarray, int, str]:
        return self._pixels[index], int(self._label[index]), f"{self.images}[{index}]"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes. Raises SourceError for another format or a truncated file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: truncated or damaged ({error}). Fetch it again") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes([0, 0, 8, dimensions]):
        raise SourceError(f"{path}: not an IDX file of unsigned bytes with {dimensions} dimension(s)")
    shape = [int(n) for n in np.frombuffer(data[4:start], ">u4")]
    expected = start + math.prod(shape)
    if len(data) != expected:
        raise SourceError(f"{path}: {len(data)} bytes, but its header announces {expected}. Fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _labels_file(images: Path) -> Path:
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for suffix in (".gz", "") if images.suffix == ".gz" else ("", ".gz"):
        if (path := images.with_name(stem + suffix)).is_file():
            return path
    raise SourceError(f"{images}: its labels, {stem} or {stem}.gz, do not lie beside it")


def _is_idx(path: Path) -> bool:
    return "images" in path.name and path.name.removesuffix(".gz").endswith(("idx3-ubyte", "idx3"))


def _open_idx_folder(folder: Path, split: str | None, class_names: list[str] | None) -> Idx:
    words = {"train": ("train",), "test": ("t10k", "test")}.get(split or "")
    if words is None:
        raise SourceError(f"{folder}: holds IDX files: choose --split train or --split test")
    found = sorted(path for path in folder.iterdir() if _is_idx(path) and any(w in path.name for w in words))
    # Of a plain file and its gzipped twin, the plain one.
    stems = {path.name.removesuffix(".gz"): path for path in reversed(found)}
    if len(stems) != 1:
        names = ", ".join(sorted(stems)) or "none"
        raise SourceError(
            f"{folder}: one images file is needed for split {split}; found: {names}. Name the file itself"
        )
    return Idx(next(iter(stems.values())), class_names)


class Torchvision:
    """A classification data set of torchvision's that lies on disk; nothing is downloaded.

    Images that torchvision reads from files are taken as those files where it lets us choose the loader, and as
    it decoded them elsewhere. `split` is what its constructor calls `split` or `train` (train, test); None: the
    constructor's own default.
    """

    def __init__(self, name: str, root: str, split: str | None = None, class_names: list[str] | None = None) -> None:
        self._arguments = (name, root, split, class_names)  # to open it again in another process
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
        except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
            raise SourceError(
                f"{self._text}: torchvision does not find or open it there ({error}). "
                f"Nothing is downloaded here: put the data set in place first"
            ) from error
        if hasattr(self._data, "loader"):
            self._data.loader = Path
        self.in_memory = isinstance(getattr(self._data, "data", None), (np.ndarray, torch.Tensor))
        own = getattr(self._data, "classes", None) or getattr(self._data, "categories", None)
        self.class_names = class_names or (own and [n if isinstance(n, str) else ", ".join(n) for n in own])

    def _constructor_options(self, kind: type, split: str | None) -> dict[str, Any]:
        parameters = inspect.signature(kind).parameters
        options: dict[str, Any] = {"download": False} if "download" in parameters else {}
        if split is None:
            return options
        if "split" in parameters:
            return {**options, "split": split}
        if "train" in parameters and split in ("train", "test"):
            return {**options, "train": split == "train"}
        known = "only train and test" if "train" in parameters else "no splits"
        raise SourceError(f"{self._text}: it has {known}, not '{split}'")

    def __reduce__(self) -> tuple[type[Torchvision], tuple[Any, ...]]:
        return Torchvision, self._arguments

    def __len__(self) -> int:
        return len(self._data)

    def describe(self) -> dict[str, Any]:
        name, root, split, _ = self._arguments
        return {"kind": "torchvision", "name": name, "path": root, "split": split}

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int, str]:
        name = f"{self._text}[{index}]"
        sample = self._data[index]
        try:
            image, target = sample
            label = operator.index(target)
        except (TypeError, ValueError) as error:
            raise SourceError(f"{name}: not an image and the number of a class: it cannot be converted") from error
        file = image if isinstance(image, Path) else getattr(image, "filename", None)
        if file:
            return Path(file).read_bytes(), label, str(file)
        if not isinstance(image, (Image.Image, np.ndarray)):
            raise SourceError(f"{name}: holds a {type(image).__name__}, not an image: it cannot be converted")
        return image, label, name


def read_class_names(path: Path) -> list[str]:
    """Class names in the order of the labels, one a line. Raises SourceError for a file that holds none."""
    names = path.read_text(encoding="utf-8").splitlines()
    while names and not names[-1].strip():
        names.pop()
    return check_class_names([name.strip() for name in names], str(path))


def check_class_names(names: list[str], where: str) -> list[str]:
    """`names` itself. Raises SourceError, which says `where`, unless each is there and named once."""
    if not names:
        raise SourceError(f"{where}: no class names")
    seen: set[str] = set()
    for line, name in enumerate(names, 1):
        if not name or name in seen:
            raise SourceError(f"{where}, line {line}: " + (f"'{name}' is there twice" if name else "empty"))
        seen.add(name)
    return names


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
        if not _is_idx(path):
            raise SourceError(f"{path}: neither a folder nor an IDX images file (...images...idx3-ubyte[.gz])")
        if split is not None:
            raise SourceError(f"{path}: one file is one split: leave out --split, or name the folder")
        return Idx(path, class_names)
    if path.is_dir() and any(_is_idx(file) for file in path.iterdir()):
        return _open_idx_folder(path, split, class_names)
    folder = path / split if split else path
    if not folder.is_dir():
        raise SourceError(f"{folder}: there is no such folder or file")
    return ImageFolder(folder, class_names)
