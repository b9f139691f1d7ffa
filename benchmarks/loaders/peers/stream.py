"""What a side of the loader benchmark is run with, and what it gives."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IMG_SIZE = 224
CLASSES = 1000
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
COMPLETE = "complete recipe"


@dataclass(frozen=True)
class Setting:
    """What a side is run with.

    name     of `loader_sides.SIDES`
    photos   ImageFolder tree of JPEG files
    beton    the same files converted
    scratch  an empty folder, for what a side makes of the photographs itself
    threads  decoding threads or worker processes, and the cores that all of the side is kept on
    passes   over the photographs that make an epoch of a peer: many, so that few windows hold an epoch's end; one,
             where no image may be read twice in a window
    """

    name: str
    photos: str
    beton: str
    scratch: str
    batch: int
    threads: int
    passes: int

    def files(self) -> list[Path]:
        """The JPEG files of an epoch, in the order of their names, `passes` times."""
        return sorted(Path(self.photos).glob("*/*.jpg")) * self.passes


@dataclass(frozen=True)
class Stream:
    """An endless stream of batches.

    images   (batch, 3, 224, 224) float tensors
    ahead    batches that may be ready, or nearly, when nobody has asked for a while
    remarks  what a reader of the figure should know
    synchronize  waits for the device, where batches are made on one
    """

    images: Iterator[torch.Tensor]
    ahead: int
    remarks: tuple[str, ...] = ()
    synchronize: Callable[[], object] | None = None


class Missing(Exception):
    """A side whose software is not here; says what to install."""


def need(module: str, install: str) -> None:
    """Raise Missing unless `module` is installed."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it is in
        found = False
    if not found:
        raise Missing(f"not installed: {install}")


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The items of `loader`, epoch after epoch."""
    while True:
        yield from loader
