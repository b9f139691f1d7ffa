"""Stochastic depth as a function of (seed, step, position in the global batch), without generator state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdeit.kernels.reference import scale_branch
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.jit import compiled
from fastdeit.pipelines.plan.philox import DROP, check_seed, philox, unit


def draw_drop_path(seed: int, step: int, positions: np.ndarray, depth: int, max_rate: float) -> np.ndarray:
    """Factors of the residual branches: 0 where a sample's branch is dropped, else 1 / keep probability.

    step       global step of the run
    positions  (B,) integers: positions of the samples in the global batch, so any number of processes agrees
    max_rate   drop rate of the last block; the rate grows linearly from 0 over the blocks

    Returns (depth, 2, B) float32, the branches in the order attention, MLP. Raises UserError for a rate outside
    [0, 1), ValueError for a step or position of more than 32 bits. Source: paper, Table 9; Huang et al., arXiv
    1603.09382.
    """
    if not 0 <= max_rate < 1:
        raise UserError(f"a drop path rate of {max_rate} is outside [0, 1): choose a smaller model.drop_path")
    if not 0 <= step < 2**32:
        raise ValueError(f"step {step} is not an unsigned 32-bit number")
    wide = np.ascontiguousarray(positions, dtype=np.int64)
    if len(wide) and not (wide.min() >= 0 and wide.max() < 2**32):
        raise ValueError(f"a position in the global batch lies outside 0 to 2**32 - 1: {wide.min()} to {wide.max()}")
    out = np.empty((depth, 2, len(wide)), dtype=np.float32)
    _draw(np.uint64(check_seed(seed)), step, wide, np.linspace(0.0, max_rate, depth), out)
    return out


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


class DropPath(nn.Module):
    """Scale each sample's residual branch by a factor that the model sets before its forward pass.

    `mask` is (B,) float32 or None. It is not a buffer, since it belongs to one batch and no checkpoint should hold it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def forward(self, branch: Tensor) -> Tensor:
        """The scaled branch (B, N, C); in eval mode or without a mask, the branch itself.

        Raises ValueError if the mask has another batch size.
        """
        if self.mask is None or not self.training:
            return branch
        if len(self.mask) != len(branch):
            raise ValueError(
                f"the drop path masks are for {len(self.mask)} samples, but the batch has {len(branch)}: "
                f"call set_drop_path with masks for this batch"
            )
        return scale_branch(branch, self.mask)


class Kept(NamedTuple):
    """The samples of a batch whose residual branch is computed.

    batch   number of samples in the batch
    index   (K,) int64, ascending
    factor  (K,) float32: 1 / keep probability
    """

    batch: int
    index: Tensor
    factor: Tensor


def kept_samples(masks: Tensor, device: torch.device) -> list[Kept | None]:
    """The samples that `masks` keep, one entry per branch; None for a branch that drops none.

    masks  (depth, 2, B) float32 on the CPU, so that sizes are known without waiting for a GPU

    Source: Oquab et al., arXiv 2304.07193, section 5, "Efficient stochastic depth". DINOv2 drops the same number of
    samples in each batch; here each sample has its own draw, so the number varies.
    """
    rows = masks.flatten(0, 1)
    branch, sample = rows.nonzero(as_tuple=True)
    counts = branch.bincount(minlength=len(rows)).tolist()
    factors = rows[branch, sample]
    if device.type == "cuda":
        # The host would wait for a copy from pageable memory.
        sample, factors = sample.pin_memory(), factors.pin_memory()
    index, factor = (t.to(device, non_blocking=True).split(counts) for t in (sample, factors))
    for tensor in (*index, *factor):
        # Sizes change from step to step, and one compiled graph must handle all of them.
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    whole = (rows == 1.0).all(1).tolist()
    return [None if whole[i] else Kept(rows.shape[1], index[i], factor[i]) for i in range(len(rows))]


class SkipPath(nn.Module):
    """Add a residual branch, computed only for the samples that stochastic depth keeps.

    Set `kept` before a forward pass; None keeps all samples. Sum and gradients equal those of `DropPath` up to
    rounding, and are reproducible: no two samples are added to the same element.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: Kept | None = None

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch(x), (B, N, C); in eval mode for every sample.

        Raises ValueError if `kept` has another batch size.
        """
        if self.kept is None or not self.training:
            return x + branch(x)
        batch, index, factor = self.kept
        if batch != len(x):
            raise ValueError(
                f"the drop path masks are for {batch} samples, but the batch has {len(x)}: "
                f"call set_drop_path with masks of this batch"
            )
        scaled = branch(x.index_select(0, index)) * factor.view(-1, *[1] * (x.ndim - 1))
        return x.index_add(0, index, scaled.to(x.dtype))
