"""The interface of a data set: stored images by index, in one of two formats."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastdeit.pipelines.formats.checksums import Checksums
from fastdeit.pipelines.machine import machine_error


class Dataset(Protocol):
    """Stored images with their sizes, read by index, in any order and by many threads; pickled by its path.

    path           the .beton file, or the folder of shards
    height, width  (N,) int32, pixels
    label          (N,) int64
    num_classes    length of class_names, or the largest label + 1
    class_names    in the order of the labels; None if the data set has none
    content_hash   over every sample in order, whatever the format; None without a sidecar
    sidecar        the JSON file beside the data, see `sidecar`; None without one
    checksums      of the stored bytes; None without a sidecar
    """

    path: Path
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray
    num_classes: int
    class_names: list[str] | None
    content_hash: str | None
    sidecar: dict[str, Any] | None
    checksums: Checksums | None

    def __len__(self) -> int: ...

    def is_jpeg(self, index: int) -> bool:
        """Whether sample `index` is stored as a JPEG file; if not, as raw RGB (height, width, 3)."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Stored bytes of sample `index`: (size,) uint8, read-only; not compared with `checksums`.

        Raises MachineError where the machine cannot read them.
        """
        ...

    def check(self) -> list[str]:
        """Problems outside the samples' own bytes, a sentence each; empty if there are none."""
        ...

    def close(self) -> None: ...


def open_dataset(path: Path) -> Dataset:
    """The data set at `path`: a .beton file, or a folder of shards that fastdeit-convert wrote.

    Raises FileNotFoundError for a missing file, UserError naming file, sample, reason and remedy for a damaged file or
    one of another kind, and MachineError where the machine cannot read it.
    """
    try:
        folder = path.is_dir()
    except OSError as error:
        raise machine_error(error, f"{path}: cannot be opened") from error
    if folder:
        from fastdeit.pipelines.formats.shards import ShardDataset

        return ShardDataset(path)
    from fastdeit.pipelines.formats.beton import BetonDataset

    return BetonDataset(path)
