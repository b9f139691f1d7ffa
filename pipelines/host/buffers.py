"""Output memory that is used again: in a fresh buffer the pages alone cost as much as what is written to them."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_BITS = {torch.float32: np.float32, torch.bfloat16: np.uint16}


class Buffers:
    """Hands out tensors; a tensor's memory comes back when the last tensor that shares it is gone."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
        """A tensor of undefined contents and an array over it: float32, or uint16 for the bits of bfloat16."""
        count = math.prod(shape) * np.dtype(_BITS[dtype]).itemsize
        with self._lock:
            fitting = [i for i, memory in enumerate(self._free) if len(memory) >= count]
            if fitting:
                memory = self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
            else:
                self._free.clear()
                memory = np.empty(count, np.uint8)
        # The tensor keeps this very view alive, whatever is made of the tensor; so its end is the memory's release.
        view = memory[:count].view(_BITS[dtype]).reshape(shape)
        weakref.finalize(view, self._free.append, memory).atexit = False
        tensor = torch.from_numpy(view)
        return (tensor if dtype == torch.float32 else tensor.view(torch.bfloat16)), view
