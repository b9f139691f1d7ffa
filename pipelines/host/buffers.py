"""Reusable output memory as tensors; `Arenas` explains why and for how long."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastdeit.pipelines.memory import Arenas

_BITS = {torch.float32: np.float32, torch.bfloat16: np.uint16}


class Buffers:
    """Hands out tensors, pinned or not. A tensor's memory returns when the last tensor that shares it is gone."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._arenas = Arenas(pinned=pinned)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
        """A tensor of undefined contents and an array over it: float32, or uint16 for the bits of bfloat16."""
        count = math.prod(shape) * np.dtype(_BITS[dtype]).itemsize
        view = self._arenas.take(count).view(_BITS[dtype]).reshape(shape)
        tensor = torch.from_numpy(view)
        return (tensor if dtype == torch.float32 else tensor.view(torch.bfloat16)), view
