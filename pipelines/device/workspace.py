"""Memory of the device stage that is used again, and the way of a batch's bytes from the host to the device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Memory:
    """Buffers by name. One grows when it is asked for more than ever before, to an eighth more than that.

    growths  how often that happened: once for every buffer, then ever more rarely
    """

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self.growths = 0
        self._device, self._pinned = device, pinned
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        """The buffer `name`, of undefined contents, contiguous and aligned for any kernel."""
        count = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < count:
            self.growths += 1
            room = max(count + count // 8, 1)
            held = self._held[name] = torch.empty(room, dtype=dtype, device=self._device, pin_memory=self._pinned)
        return held[:count].view(shape)


class _Place:
    """What one batch of two under way occupies."""

    def __init__(self, device: torch.device) -> None:
        self.host = Memory(torch.device("cpu"), pinned=device.type == "cuda")
        self.device = Memory(device)
        self.table = torch.empty(0, dtype=torch.uint8)
        self.source: Tensor | None = None
        if device.type == "cuda":
            self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()


class Uploads:
    """Copies a batch's table and pixels to the device, on a stream of its own, while the one before is worked on.

    A batch is `begin`, what fills the table, `send`, the launches that read it, and `end`, all on one stream. Two
    batches are under way at most: `begin` waits, on the host, for the copy of the last but one.

    passed_on  batches whose pixels were not in pinned memory, and so were copied once more by the CPU
    """

    def __init__(self, device: torch.device) -> None:
        self.passed_on = 0
        self._device = device
        self._places = (_Place(device), _Place(device))
        self._turn = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def growths(self) -> int:
        return sum(memory.growths for place in self._places for memory in (place.host, place.device))

    def begin(self, size: int) -> Tensor:
        """(size,) uint8 on the host, to be filled with the table."""
        self._turn = 1 - self._turn
        place = self._places[self._turn]
        if self._stream is not None:
            place.copied.synchronize()
        place.source = None
        place.table = place.host.take("table", (size,))
        return place.table

    def send(self, pixels: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """The table and the pixels, uint8, on the device; what is launched on the current stream finds them there."""
        place = self._places[self._turn]
        source = pixels if isinstance(pixels, Tensor) else torch.from_numpy(pixels)
        if self._stream is None:
            return place.table, source
        growths = place.device.growths
        table = place.device.take("table", (len(place.table),))
        here = source if source.device == self._device else place.device.take("pixels", (len(source),))
        current = torch.cuda.current_stream(self._device)
        if place.device.growths > growths:
            # PyTorch may have given out memory that what is queued on this stream still reads.
            self._stream.wait_stream(current)
        self._stream.wait_event(place.used)
        if here is not source and not source.is_pinned():
            self.passed_on += 1
            source = place.host.take("pixels", (len(source),)).copy_(source)
        with torch.cuda.stream(self._stream):
            table.copy_(place.table, non_blocking=True)
            if here is not source:
                here.copy_(source, non_blocking=True)
            place.copied.record()
        place.source = source
        current.wait_event(place.copied)
        return table, here

    def end(self) -> None:
        """What has been launched on the current stream is all that reads the table and the pixels."""
        if self._stream is not None:
            self._places[self._turn].used.record(torch.cuda.current_stream(self._device))
