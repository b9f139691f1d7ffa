"""Pixel memory that is used again: the pages of fresh memory cost almost as much as the decoding into them."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_BITS = {torch.float32: np.float32, torch.bfloat16: np.uint16}
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Arenas:
    """Hands out arrays of bytes; an array's memory comes back when it, and every view of it, is gone.

    So a batch stays what it is for as long as anybody holds any part of it, and there is never more memory than was
    held at one time, with an eighth on top for batches that turn out larger.

    pinned  whether the memory is page-locked, for a GPU to copy from in the background. Whoever has it copied so must
            hold on to the array until the copy is done
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """(size,) uint8 of undefined contents, starting at a multiple of 64 bytes."""
        memory = self._fitting(size)
        if memory is None:
            memory = self._new(size + size // 8 + ALIGNMENT)
        start = -memory.ctypes.data % ALIGNMENT
        # NumPy hangs a view of a view on the array that owns the memory; behind a memoryview that is this very
        # array, whose end therefore is the end of all its views.
        array = np.frombuffer(memory.data, np.uint8, size, start)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array

    def _new(self, size: int) -> np.ndarray:
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        # Straight from the system, and back to it: malloc would keep some blocks of this size, and never the same ones.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without large pages refuses
                memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, np.uint8)

    def _fitting(self, size: int) -> np.ndarray | None:
        """The smallest free memory that is large enough; what is too small is let go where there is none."""
        # Memory may come back at any moment, at the end of the list, which moves no other.
        with self._lock:
            large_enough = [i for i, memory in enumerate(self._free) if len(memory) >= size + ALIGNMENT]
            if large_enough:
                return self._free.pop(min(large_enough, key=lambda i: len(self._free[i])))
            self._free.clear()
            return None


def place(height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, int]:
    """Where images of these sizes lie one behind another: (images,) int64 starts at multiples of 64, and the end."""
    size = height.astype(np.int64) * width * 3
    size += -size % ALIGNMENT
    end = np.cumsum(size)
    return end - size, int(size.sum())


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
