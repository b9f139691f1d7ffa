"""Dropout whose pattern depends on the samples, not on the process that computes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_32 = 0xFFFFFFFF


class KeyedDropout(nn.Module):
    """Dropout (Srivastava et al., JMLR 15, 2014) that is a function of each sample's key.

    Whether a value is dropped depends on its sample's key, on its place in the sample and on `place`, which differs
    between the dropouts of a network. `keys` is (B,) int64 of 32 bits, set before a forward pass: see
    `pipelines.plan.dropout`. It is not a buffer, since it belongs to one batch. Without keys, PyTorch's generator
    draws.
    """

    def __init__(self, p: float, place: int) -> None:
        super().__init__()
        self.p, self.place = p, place
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The batch (B, ...) with a share `p` of the values set to 0 and the others divided by 1 - p; in eval mode `x`.

        Raises ValueError if the keys are for another number of samples.
        """
        if not self.training:
            return x
        if self.keys is None:
            return F.dropout(x, self.p)
        if len(self.keys) != len(x):
            raise ValueError(
                f"the dropout keys are for {len(self.keys)} samples, but the batch has {len(x)}: "
                f"call set_dropout with keys for this batch"
            )
        values = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
        keys = _mixed(self.keys ^ _mixed(torch.full_like(self.keys, self.place)))
        drawn = _mixed(keys.view(-1, *[1] * (x.ndim - 1)) ^ _mixed(values))
        return torch.where(drawn >= round(self.p * 2**32), x / (1 - self.p), 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers in int64, one to one: "lowbias32" of Chris Wellons's hash-prospector."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & _32
    x = ((x ^ x >> 15) * 0x846CA68B) & _32
    return x ^ x >> 16
