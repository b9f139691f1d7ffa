"""Curves of top-1 by epoch, and whether a run of the same recipe keeps up with them.

`curves.json` has top-1 of the weights, not of their average, of the class head. For DeiT III they are the logs in the
README of its authors (README_revenge.md), for each fifth epoch on ImageNet; for Fashion-MNIST, our own runs in
`benchmarks/results`, without the first epochs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdeit.pipelines.parsing import read_json


class _Sizes(NamedTuple):
    """The sizes by which a data set is known."""

    images: int
    classes: int
    validation: int


_IMAGENET, _FASHION_MNIST = _Sizes(1_281_167, 1000, 50_000), _Sizes(60_000, 10, 10_000)


@functools.cache
def _curves() -> dict[str, list[tuple[float, float]]]:
    return read_json(Path(__file__).with_name("curves.json"))


def has_its_data(recipe: str, images: int, global_batch: int, classes: int | None, validation: int | None) -> bool:
    """Whether these are the sizes of the data set of this recipe's curve; ImageNet-1k's if it has none.

    images      training images of an epoch, of which the last incomplete batch may be missing
    classes     None: not known
    validation  images; None: not known
    """
    known = _FASHION_MNIST if _is_ours(recipe) else _IMAGENET
    whole = known.images - global_batch < images <= known.images
    return whole and classes in (None, known.classes) and validation in (None, known.validation)


def whose(recipe: str) -> str:
    """Whose run the curve of this recipe is."""
    return "our run" if _is_ours(recipe) else "the authors' run"


def _is_ours(recipe: str) -> bool:
    return recipe.startswith("fashion_mnist_")


def curve(recipe: str) -> list[tuple[float, float]]:
    """Epochs and top-1 in percent of one run of this recipe; empty if none is known."""
    return _curves().get(recipe, [])


def band(recipe: str, epoch: float) -> tuple[float, float] | None:
    """The top-1 of the known run at an epoch, and the least that another should have there.

    None if no run is known, or none at so early an epoch.

    One run says nothing about the spread between runs, so the band is wide: a third of the value, at least 1.5 points
    and at most 4. The authors' four sizes lie within 2.2 points of each other at epoch 10.
    """
    points = curve(recipe)
    if not points or epoch < points[0][0]:
        return None
    expected = float(np.interp(epoch, [x for x, _ in points], [y for _, y in points]))
    return expected, max(0.0, expected - min(4.0, max(1.5, expected / 3)))
