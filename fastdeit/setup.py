"""What training, evaluation and labelling set up in their process before they compute."""

from __future__ import annotations

import os

import torch

from fastdeit.config import Recipe
from fastdeit.distributed import World
from fastdeit.pipelines.loaders.prefetch import usable_cores
from fastdeit.precision import Precision, allow_tf32, resolve


def set_up(recipe: Recipe, world: World) -> Precision:
    """Set threads and TF32 as the recipe's precision needs them, for the whole process; the precision.

    Raises UserError for a precision that the device does not have.
    """
    set_compute_threads(world)
    precision = resolve(recipe, world.device)
    allow_tf32(precision)
    return precision


def set_compute_threads(world: World) -> None:
    """Give PyTorch's CPU operators this process's share of the cores, unless OMP_NUM_THREADS says otherwise.

    torchrun sets OMP_NUM_THREADS to 1 by itself, which does not count.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or (given == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(max(1, usable_cores() // world.local_size))
