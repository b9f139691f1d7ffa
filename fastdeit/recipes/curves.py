"""Published curves of top-1 by epoch on ImageNet, and whether a run of the same recipe keeps up with them.

`curves.json` has the logs in the README of DeiT III's authors (README_revenge.md): top-1 of the weights, not of their
average, on the 50,000 validation images, for each fifth epoch.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from fastdeit.pipelines.parsing import read_json

SOURCE = "the authors' run"
_IMAGES, _CLASSES, _VALIDATION = 1_281_167, 1000, 50_000


@functools.cache
def _curves() -> dict[str, list[tuple[float, float]]]:
    return read_json(Path(__file__).with_name("curves.json"))


def is_imagenet(images: int, global_batch: int, classes: int | None, validation: int) -> bool:
    """Whether these are the sizes of ImageNet-1k.

    images  training images of an epoch, of which the last incomplete batch may be missing
    """
    whole = _IMAGES - global_batch < images <= _IMAGES
    return whole and classes in (None, _CLASSES) and validation == _VALIDATION


def curve(recipe: str) -> list[tuple[float, float]]:
    """Epochs and top-1 in percent of a published run of this recipe on ImageNet; empty if there is none."""
    return _curves().get(recipe, [])


def band(recipe: str, epoch: float) -> tuple[float, float] | None:
    """The published top-1 at an epoch, and the least that a run should have there; None without a published run.

    One run says nothing about the spread between runs, so the band is wide: a third of the value, at least 1.5 points
    and at most 4. The authors' four sizes lie within 2.2 points of each other at epoch 10.
    """
    points = curve(recipe)
    if not points:
        return None
    expected = float(np.interp(epoch, [x for x, _ in points], [y for _, y in points]))
    return expected, max(0.0, expected - min(4.0, max(1.5, expected / 3)))
