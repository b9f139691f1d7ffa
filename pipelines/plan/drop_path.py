"""Draws stochastic depth (Huang et al., arXiv 1603.09382; paper, Table 9), without generator state.

Each draw is a table of factors, (depth, 2, B) float32: 0 where a sample's branch is dropped, otherwise 1 / the fraction
of samples kept. The branches of a block are attention and MLP, in this order.
"""

from __future__ import annotations

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.jit import compiled
from fastdeit.pipelines.plan.philox import DROP, DROP_GROUP, check_seed, philox, unit


def draw_drop_path(seed: int, step: int, positions: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Factors of the residual branches, each sample drawn on its own.

    step       global step of the run
    positions  (B,) integers: positions in the global batch, so the draw is the same on any number of processes
    rates      (depth,) drop rates of the blocks, from `drop_path_rates`

    Raises ValueError for a step or position of more than 32 bits.
    """
    out = np.empty((len(rates), 2, len(positions)), dtype=np.float32)
    _draw(np.uint64(check_seed(seed)), *counters(step, positions), rates, out)
    return out


def dropped_samples(rates: np.ndarray, group: int) -> np.ndarray:
    """(depth,) int64: how many of `group` samples each branch of a block drops: its rate times `group`, rounded.

    rates  (depth,) drop rates of the blocks, from `drop_path_rates`

    Raises UserError if no block drops a sample, or one drops all.
    """
    dropped = np.floor(rates * group + 0.5).astype(np.int64)
    max_rate = rates.max()
    if not dropped.any():
        raise UserError(
            f"model.drop_path {max_rate} drops none of a group's {group} samples in any block "
            f"(model.drop_path_mode 'skip'): set a larger model.drop_path or departures.mix_group, or "
            f"model.drop_path_mode 'mask'"
        )
    if dropped.max() == group:
        raise UserError(
            f"model.drop_path {max_rate} drops all of a group's {group} samples in the last block "
            f"(model.drop_path_mode 'skip'): set a smaller model.drop_path or a larger departures.mix_group, or "
            f"model.drop_path_mode 'mask'"
        )
    return dropped


def draw_fixed_drop_path(seed: int, step: int, positions: np.ndarray, dropped: np.ndarray, group: int) -> np.ndarray:
    """Factors of the residual branches, where a branch drops the same number of every `group` samples.

    positions  (B,) integers: positions of whole groups in the global batch
    dropped    (depth,) integers: how many samples of a group each branch of a block drops, from `dropped_samples`

    Each set of that many samples is equally likely. Raises ValueError if `positions` are not whole groups, or if
    `draw_drop_path` would. Source: Oquab et al., arXiv 2304.07193, section 5, where a fixed number of a whole batch is
    dropped.
    """
    step, wide = counters(step, positions)
    groups = wide[::group] // group
    if not np.array_equal(wide, (groups[:, None] * group + np.arange(group)).ravel()):
        raise ValueError(f"the {len(wide)} positions are not those of whole groups of {group} samples")
    if not (len(dropped) <= 2**11 and group <= 2**20):
        raise ValueError(f"a depth of {len(dropped)} or a group of {group} does not fit the random counter")
    out = np.empty((len(dropped), 2, len(groups), group), dtype=np.float32)
    _draw_fixed(np.uint64(check_seed(seed)), step, groups, np.asarray(dropped), out)
    return out.reshape(len(dropped), 2, len(wide))


def drop_path_rates(depth: int, max_rate: float, *, uniform: bool = False) -> np.ndarray:
    """(depth,) float64: drop rates of the blocks, which grow linearly from 0 to `max_rate`, or all are `max_rate`.

    Raises UserError for a rate outside [0, 1).
    """
    if not 0 <= max_rate < 1:
        raise UserError(f"a drop path rate of {max_rate} is outside [0, 1): choose a smaller model.drop_path")
    return np.full(depth, max_rate) if uniform else np.linspace(0.0, max_rate, depth)


def counters(step: int, positions: np.ndarray) -> tuple[int, np.ndarray]:
    """Step and positions in the global batch as counters of Philox. Raises ValueError for one of more than 32 bits."""
    if not 0 <= step < 2**32:
        raise ValueError(f"step {step} is not an unsigned 32-bit number")
    wide = np.ascontiguousarray(positions, dtype=np.int64)
    if len(wide) and not (wide.min() >= 0 and wide.max() < 2**32):
        raise ValueError(f"a position in the global batch lies outside 0 to 2**32 - 1: {wide.min()} to {wide.max()}")
    return step, wide


@compiled
def _draw(seed: np.uint64, step: int, positions: np.ndarray, rates: np.ndarray, out: np.ndarray) -> None:
    branches = 2 * len(rates)
    for s in range(len(positions)):
        for block in range((branches + 3) // 4):
            words = philox(seed, block, positions[s], step, DROP)
            for w in range(min(4, branches - 4 * block)):
                layer, branch = divmod(4 * block + w, 2)
                keep = 1.0 - rates[layer]
                out[layer, branch, s] = 1.0 / keep if unit(words[w]) < keep else 0.0


@compiled
def _draw_fixed(seed: np.uint64, step: int, groups: np.ndarray, dropped: np.ndarray, out: np.ndarray) -> None:
    """Choose `count` out of `size` samples by Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987)."""
    size = out.shape[3]
    for layer in range(len(dropped)):
        count = dropped[layer]
        for branch in range(2):
            for g in range(len(groups)):
                factors = out[layer, branch, g]
                factors[:] = size / (size - count)
                for block in range((count + 3) // 4):
                    words = philox(seed, (2 * layer + branch) << 20 | block, groups[g], step, DROP_GROUP)
                    for w in range(min(4, count - 4 * block)):
                        last = size - count + 4 * block + w
                        chosen = int(unit(words[w]) * (last + 1))
                        factors[last if factors[chosen] == 0.0 else chosen] = 0.0
