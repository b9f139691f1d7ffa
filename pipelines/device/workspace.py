"""Reusable memory of the device stage, and double-buffered uploads from the host to the device."""

import math

import numpy as np
import torch
from torch import Tensor


class Memory:
    """Named buffers that grow as needed, each time to an eighth more than was requested.

    growths  how often a buffer was allocated or grew
    """

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self.growths = 0
        self._device, self._pinned = device, pinned
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        """The buffer `name`: uninitialized, contiguous, and aligned for any kernel."""
        count = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < count:
            self.growths += 1
            room = max(count + count // 8, 1)
            held = self._held[name] = torch.empty(room, dtype=dtype, device=self._device, pin_memory=self._pinned)
        return held[:count].view(shape)


class _Slot:
    """The memory and events of one of the two batches in flight."""

    def __init__(self, device: torch.device) -> None:
        self.host = Memory(torch.device("cpu"), pinned=device.type == "cuda")
        self.device = Memory(device)
        self.table = torch.empty(0, dtype=torch.uint8)
        self.source: Tensor | None = None
        if device.type == "cuda":
            self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()


class Uploads:
    """Copies a batch's table and pixels to the device on a separate stream, while the GPU works on the previous batch.

    For each batch, on one stream: call `begin`, fill the table, call `send`, launch the kernels that read it, call
    `end`. At most two batches are in flight: in `begin` the host waits for the copy of the batch before last.

    passed_on  batches whose pixels were not pinned, so that the CPU copied them once more
    """

    def __init__(self, device: torch.device) -> None:
        self.passed_on = 0
        self._device = device
        self._slots = (_Slot(device), _Slot(device))
        self._turn = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def growths(self) -> int:
        return sum(memory.growths for slot in self._slots for memory in (slot.host, slot.device))

    def begin(self, size: int) -> Tensor:
        """(size,) uint8 on the host, for the caller to fill with the table."""
        self._turn = 1 - self._turn
        slot = self._slots[self._turn]
        if self._stream is not None:
            slot.copied.synchronize()
        slot.source = None
        slot.table = slot.host.take("table", (size,))
        return slot.table

    def send(self, pixels: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """The table and the pixels on the device, (bytes,) uint8 each, ready for launches on the current stream."""
        slot = self._slots[self._turn]
        source = pixels if isinstance(pixels, Tensor) else torch.from_numpy(pixels)
        if self._stream is None:
            return slot.table, source
        growths = slot.device.growths
        table = slot.device.take("table", (len(slot.table),))
        on_device = source if source.device == self._device else slot.device.take("pixels", (len(source),))
        current = torch.cuda.current_stream(self._device)
        if slot.device.growths > growths:
            # PyTorch may have returned memory that work queued on the current stream still reads.
            self._stream.wait_stream(current)
        self._stream.wait_event(slot.used)
        if on_device is not source and not source.is_pinned():
            self.passed_on += 1
            source = slot.host.take("pixels", (len(source),)).copy_(source)
        with torch.cuda.stream(self._stream):
            table.copy_(slot.table, non_blocking=True)
            if on_device is not source:
                on_device.copy_(source, non_blocking=True)
            slot.copied.record()
        slot.source = source
        current.wait_event(slot.copied)
        return table, on_device

    def end(self) -> None:
        """Mark the table and the pixels as free once the launches so far on the current stream are done."""
        if self._stream is not None:
            self._slots[self._turn].used.record(torch.cuda.current_stream(self._device))
