"""Reusable pixel memory: faulting in fresh pages costs almost as much as decoding into them."""

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
    """Hands out arrays of bytes and reuses an array's memory once the array and all its views are gone.

    A batch therefore stays intact as long as anything refers to part of it. The total never exceeds the peak in use,
    plus an eighth so that slightly larger batches fit.

    pinned  page-lock the memory, so that a GPU can copy from it in the background. The caller must keep the array
            until such a copy is done
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """(size,) uint8, uninitialized, aligned to 64 bytes. Raises OSError or MemoryError."""
        memory = self._take_free(size)
        if memory is None:
            memory = self._new(size + size // 8 + ALIGNMENT)
        start = -memory.ctypes.data % ALIGNMENT
        # The base of a NumPy view is the array that owns the memory. Built on a memoryview, `array` is that owner, so
        # it is finalized only after its last view.
        array = np.frombuffer(memory.data, np.uint8, size, start)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array

    def _new(self, size: int) -> np.ndarray:
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        # mmap returns freed blocks to the system; malloc would keep some blocks of this size.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without large pages refuses
                memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, np.uint8)

    def _take_free(self, size: int) -> np.ndarray | None:
        """The smallest free block that is large enough; if there is none, drop all free blocks and return None."""
        # A finalizer may append a block at any moment, which does not move the other blocks.
        with self._lock:
            large_enough = [i for i, memory in enumerate(self._free) if len(memory) >= size + ALIGNMENT]
            if large_enough:
                return self._free.pop(min(large_enough, key=lambda i: len(self._free[i])))
            self._free.clear()
            return None


def place(height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, int]:
    """Offsets of images of these sizes: (images,) int64 starts, aligned to 64 bytes, and the total size in bytes."""
    size = height.astype(np.int64) * width * 3
    size += -size % ALIGNMENT
    end = np.cumsum(size)
    return end - size, int(size.sum())


class Buffers:
    """Hands out tensors, pinned or not, and reuses a tensor's memory once nothing refers to it."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._arenas = Arenas(pinned=pinned)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
        """An uninitialized float32 or bfloat16 tensor, and the same memory as a float32 or uint16 array."""
        count = math.prod(shape) * np.dtype(_BITS[dtype]).itemsize
        view = self._arenas.take(count).view(_BITS[dtype]).reshape(shape)
        tensor = torch.from_numpy(view)
        return (tensor if dtype == torch.float32 else tensor.view(torch.bfloat16)), view
