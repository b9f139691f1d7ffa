"""Stochastic depth as a function of (seed, step, position in the global batch): no generator state to save."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor, nn

from fastdeit.pipelines.philox import DROP, check_seed, philox, unit


def draw_drop_path(seed: int, step: int, positions: np.ndarray, depth: int, max_rate: float) -> np.ndarray:
    """Factors of the residual branches: 0 where a sample's branch is dropped, else 1 / keep probability.

    step       global step of the run
    positions  (B,) integers: places of the samples in the global batch, so that any number of processes agrees
    max_rate   drop rate of the last block; it grows linearly from 0 over the blocks

    Returns (depth, 2, B) float32, the branches in the order attention, MLP. Raises ValueError for a rate outside
    [0, 1) or a step or position of more than 32 bits. Source: paper, Table 9; Huang et al., arXiv 1603.09382.
    """
    if not 0 <= max_rate < 1:
        raise ValueError(f"a drop path rate of {max_rate} is outside [0, 1): choose a smaller model.drop_path")
    if not 0 <= step < 2**32:
        raise ValueError(f"step {step} is not an unsigned 32-bit number")
    wide = np.ascontiguousarray(positions, dtype=np.int64)
    if len(wide) and not (wide.min() >= 0 and wide.max() < 2**32):
        raise ValueError(f"a position in the global batch lies outside 0 to 2**32 - 1: {wide.min()} to {wide.max()}")
    out = np.empty((depth, 2, len(wide)), dtype=np.float32)
    _draw(np.uint64(check_seed(seed)), step, wide, np.linspace(0.0, max_rate, depth), out)
    return out


@numba.njit(cache=True, nogil=True)
def _draw(seed: np.uint64, step: int, positions: np.ndarray, rates: np.ndarray, out: np.ndarray) -> None:
    branches = 2 * len(rates)
    for s in range(len(positions)):
        for block in range((branches + 3) // 4):
            words = philox(seed, block, positions[s], step, DROP)
            for w in range(min(4, branches - 4 * block)):
                layer, branch = divmod(4 * block + w, 2)
                keep = 1.0 - rates[layer]
                out[layer, branch, s] = 1.0 / keep if unit(words[w]) < keep else 0.0


class DropPath(nn.Module):
    """Scales a residual branch by a factor a sample, which the model sets before its forward pass.

    `mask` is (B,) float32 or None. It is no buffer: DistributedDataParallel would overwrite the buffers of every
    process with those of the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def forward(self, branch: Tensor) -> Tensor:
        """The scaled branch, (B, N, C) as given; in eval mode or without a mask, the branch itself.

        Raises ValueError where the mask is of another batch.
        """
        if self.mask is None or not self.training:
            return branch
        if len(self.mask) != len(branch):
            raise ValueError(
                f"the drop path masks are of {len(self.mask)} samples, the batch has {len(branch)}: "
                f"call set_drop_path with masks of this batch"
            )
        # In float32, since 1 / keep probability is no number of bf16.
        return (branch * self.mask.view(-1, *[1] * (branch.ndim - 1))).to(branch.dtype)
