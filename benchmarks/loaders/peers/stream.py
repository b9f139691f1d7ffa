"""The settings of a contender of the loader benchmark, and the stream of batches that it returns."""

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
    """The settings of a contender.

    name     of `contenders.CONTENDERS`
    photos   ImageFolder tree of JPEG files
    beton    the same files converted
    scratch  an empty folder for the contender's own files
    threads  decoding threads or worker processes, and the number of cores that the contender may use
    passes   over the photographs in one epoch of a peer: many, so that few windows contain the end of an epoch; one if
             a window may read no image twice
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
    ahead    batches that may have been prefetched while no one asked
    remarks  notes for a reader of the figure
    synchronize  waits for the device, if batches are made on one
    """

    images: Iterator[torch.Tensor]
    ahead: int
    remarks: tuple[str, ...] = ()
    synchronize: Callable[[], object] | None = None


class Missing(Exception):
    """A contender's software is not installed; the message says what to install."""


def need(module: str, install: str) -> None:
    """Raise Missing unless `module` is installed."""
    try:
        installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        installed = False
    if not installed:
        raise Missing(f"not installed: {install}")


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The items of `loader`, epoch after epoch."""
    while True:
        yield from loader
