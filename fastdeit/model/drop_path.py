"""Stochastic depth in a model: branches are multiplied by factors, or computed without the dropped samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdeit.kernels.reference import Kept, add_branch, scale_branch, select_kept


def check_batch(masks: Tensor, x: Tensor) -> None:
    """Raises ValueError unless the factors `masks` (B,) are for the batch `x` (B, ...)."""
    if len(masks) != len(x):
        raise ValueError(
            f"the drop path masks are for {len(masks)} samples, but the batch has {len(x)}: "
            f"call set_drop_path with masks for this batch"
        )


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
        check_batch(self.mask, branch)
        return scale_branch(branch, self.mask)


def kept_samples(masks: Tensor, kept: Sequence[int]) -> list[Kept | None]:
    """The samples that each branch computes; None for a branch that computes all.

    masks  (branches, B) float32, on any device
    kept   (branches,) how many factors of each branch are not 0. The host needs these numbers for tensor sizes; to
           count the factors, it would have to wait for the GPU

    Raises ValueError if `masks` are on the CPU and do not keep these numbers.
    """
    keep = masks != 0
    if masks.device.type == "cpu" and keep.sum(1).tolist() != list(kept):
        raise ValueError(f"the drop path masks keep {keep.sum(1).tolist()} samples in the branches, not {list(kept)}")
    slots = keep.cumsum(1, dtype=torch.int32) * keep - 1
    whole = masks.shape[1]
    return [None if n == whole else Kept(mask, own, n) for mask, own, n in zip(masks, slots, kept, strict=True)]


class SkipPath(nn.Module):
    """Add a residual branch, computed only for the samples that stochastic depth keeps.

    Set `mask` before a forward pass; None keeps all samples. Sum and gradients equal those of `DropPath` up to
    rounding, and are reproducible: no two samples are added to the same element.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Kept | None = None

    def of(self, x: Tensor) -> Kept | None:
        """The samples of `x` (B, N, C) that the branch computes; None for all, as in eval mode.

        Raises ValueError if `mask` is for another batch size.
        """
        if self.mask is None or not self.training:
            return None
        check_batch(self.mask.mask, x)
        return self.mask

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch(x), (B, N, C); in eval mode for every sample. Raises ValueError as `of` does."""
        kept = self.of(x)
        return add_branch(x, branch(select_kept(x, kept)), kept)
