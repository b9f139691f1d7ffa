"""The MNIST family's IDX files."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.pipelines.formats.bounds import most_unpacked
from fastdeit.pipelines.sources.base import SourceError, SplitNeededError
from fastdeit.pipelines.sources.files import listing, open_regular

MAX_BYTES = 4 << 30  # of an array, held in memory
MAX_UNZIPPED = 1 << 30  # of an array that a gzipped file announces


class Idx:
    """Images and labels of the MNIST family's IDX files, plain or gzipped.

    Format: http://yann.lecun.com/exdb/mnist, two zero bytes, element type (8: unsigned byte), number of
    dimensions, then each dimension as a big-endian uint32. Classes are named by their digits unless
    `class_names` names them. `left_out` counts the files of the folder that were skipped for their names.
    """

    in_memory = True

    def __init__(self, images: Path, class_names: list[str] | None = None, left_out: int = 0) -> None:
        self.images, self._left_out = images, left_out
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
        files = {"images": str(self.images), "labels": str(self.labels)}
        return {"kind": "idx", **files, "hidden_files": self._left_out}

    def inputs(self) -> list[Path]:
        return [self.images, self.labels]

    def name(self, index: int) -> str:
        return f"{self.images}[{index}]"

    def read(self, index: int) -> tuple[np.ndarray, int, str]:
        return self._pixels[index], int(self._label[index]), self.name(index)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array in an IDX file of unsigned bytes. Raises SourceError for another format or a truncated file."""
    zipped = path.suffix == ".gz"
    try:
        with open_regular(path) as stored, gzip.open(stored) if zipped else stored as file:
            start = 4 + 4 * dimensions
            header = file.read(start)
            if len(header) < start or header[:4] != bytes([0, 0, 8, dimensions]):
                raise SourceError(f"{path}: not an IDX file of unsigned bytes with {dimensions} dimension(s)")
            shape = [int(n) for n in np.frombuffer(header[4:], ">u4")]
            expected = math.prod(shape)
            most = min(MAX_UNZIPPED, most_unpacked(os.fstat(stored.fileno()).st_size)) if zipped else MAX_BYTES
            if expected > most:
                raise SourceError(
                    f"{path}: truncated or damaged (its header announces {expected} bytes, and up to {most} are "
                    f"read{', or more once it is gunzipped' if zipped else ''}). Fetch it again"
                )
            data = file.read(expected + 1)  # bounded: a small gzipped file may unpack to gigabytes
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: truncated or damaged ({error}). Fetch it again") from error
    if len(data) != expected:
        found = f"more than {expected}" if len(data) > expected else len(data)
        raise SourceError(f"{path}: {found} bytes of data, but its header announces {expected}. Fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _labels_file(images: Path) -> Path:
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for suffix in (".gz", "") if images.suffix == ".gz" else ("", ".gz"):
        if os.path.lexists(path := images.with_name(stem + suffix)):
            return path
    raise SourceError(f"{images}: its labels, {stem} or {stem}.gz, are not beside it")


def is_idx(path: Path) -> bool:
    return "images" in path.name and path.name.removesuffix(".gz").endswith(("idx3-ubyte", "idx3"))


def open_idx_folder(folder: Path, split: str | None, class_names: list[str] | None) -> Idx:
    words = {"train": ("train",), "test": ("t10k", "test")}.get(split or "")
    if words is None:
        raise SplitNeededError(f"{folder}: holds IDX files: choose --split train or --split test")
    inside = listing(folder, lambda name: is_idx(Path(name)) and any(word in name for word in words))
    found = [folder / name for name in inside.files]
    # A plain file takes precedence over its gzipped twin.
    stems = {path.name.removesuffix(".gz"): path for path in reversed(found)}
    if len(stems) != 1:
        names = ", ".join(sorted(stems)) or "none"
        raise SourceError(
            f"{folder}: one images file is needed for split {split}; found: {names}. Name the file itself"
        )
    return Idx(next(iter(stems.values())), class_names, inside.left_out)
