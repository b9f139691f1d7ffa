"""Draws the keys of dropout: a sample's key decides which of its values are dropped, on any number of processes."""

from __future__ import annotations

import numpy as np

from fastdeit.pipelines.jit import compiled
from fastdeit.pipelines.plan.drop_path import counters
from fastdeit.pipelines.plan.philox import DROPOUT, check_seed, philox


def draw_dropout_keys(seed: int, step: int, positions: np.ndarray) -> np.ndarray:
    """(B,) int64, each a random number of 32 bits, for the samples at `positions` of the global batch.

    step  global step of the run

    Raises ValueError for a step or position of more than 32 bits.
    """
    out = np.empty(len(positions), dtype=np.int64)
    _draw(np.uint64(check_seed(seed)), *counters(step, positions), out)
    return out


@compiled
def _draw(seed: np.uint64, step: int, positions: np.ndarray, out: np.ndarray) -> None:
    for s in range(len(positions)):
        out[s] = philox(seed, 0, positions[s], step, DROPOUT)[0]
