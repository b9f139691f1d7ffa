"""Chooses images of a data set: to train on, to hold out for validation, or a few to stand for all."""

from dataclasses import dataclass

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.sections import DataConfig

_SEED = 0x5EED  # not the run's: runs with other seeds use the same images


@dataclass(frozen=True)
class Subsets:
    """Dataset indices of the training set, ascending int64: those to train on, and those held out for validation."""

    train: np.ndarray
    held_out: np.ndarray


def left_out(cfg: DataConfig) -> dict[str, float]:
    """Those of `data.hold_out` and `data.fraction` that leave images out; empty if a run trains on all images."""
    return {
        f"data.{name}": getattr(cfg, name)
        for name in ("hold_out", "fraction")
        if getattr(cfg, name) != getattr(DataConfig(), name)
    }


def divide(cfg: DataConfig, labels: np.ndarray) -> Subsets:
    """Divide the images with these `labels` (N,) class by class, by `data.hold_out` and `data.fraction`.

    The choice is random and depends only on the labels and the two fields: it is the same in every run, and the images
    of a smaller share are among those of a larger one. With `data.hold_out`, a class of two or more images
    has at least one in each part. Raises UserError if `data.hold_out` leaves nothing for validation.
    """
    if not cfg.hold_out and cfg.fraction == 1:
        return Subsets(np.arange(len(labels)), np.arange(0))
    keys = np.random.Philox(key=_SEED).random_raw(len(labels))  # NumPy keeps these bits across versions
    order = np.lexsort((keys, labels))  # by class, and at random within a class
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(first, count)
    held = np.clip(np.rint(cfg.hold_out * count), 1, count - 1) if cfg.hold_out else 0 * count
    if cfg.hold_out and not held.any():
        raise UserError(
            f"data.hold_out {cfg.hold_out:g} keeps no image for validation: no class has two images; give --data.val"
        )
    kept = np.maximum(1, np.rint(cfg.fraction * (count - held)))
    held_of, last = np.repeat(held, count), np.repeat(held + kept, count)
    return Subsets(np.sort(order[(place >= held_of) & (place < last)]), np.sort(order[place < held_of]))


def spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` positions, evenly spaced from the first to the last, int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
