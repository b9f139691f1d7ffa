"""The order of copies and launches on streams that only write down what is asked of them.

The judge is the happens-before relation (Lamport, 1978): each stream, and the host, has a vector clock. A read must
come after the write before it, and a write after every read and write before it, whatever the machine's pace.
"""

import contextlib
import types
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch

from fastdeit.pipelines.device import workspace
from fastdeit.pipelines.device.workspace import Uploads

GPU = torch.device("cuda", 0)


class Machine:
    """Streams by name, "host" among them; `races` is what came in no certain order."""

    def __init__(self):
        self.clocks = defaultdict(lambda: defaultdict(int))
        self.writes, self.reads = {}, defaultdict(list)
        self.races = []
        self.current = "stage"

    def run(self, stream, *, reads=(), writes=()):
        """Something that the host asks of a stream, or does itself."""
        clock = self.clocks[stream]
        self.merge(stream, self.clocks["host"])
        clock[stream] += 1
        for place in reads:
            self.after(clock, stream, place, [self.writes.get(place)])
            self.reads[place].append((stream, clock[stream]))
        for place in writes:
            self.after(clock, stream, place, [self.writes.get(place), *self.reads.pop(place, [])])
            self.writes[place] = stream, clock[stream]

    def after(self, clock, stream, place, before):
        for other, time in filter(None, before):
            if clock[other] < time:
                self.races.append(f"{stream} does not wait for {other} at {place}")

    def merge(self, stream, clock):
        for name, time in clock.items():
            self.clocks[stream][name] = max(self.clocks[stream][name], time)


class Event:
    def __init__(self, machine):
        self.machine, self.clock = machine, {}

    def record(self, stream=None):
        self.clock = dict(self.machine.clocks[stream.name if stream else self.machine.current])

    def synchronize(self):
        self.machine.merge("host", self.clock)


class Stream:
    def __init__(self, machine, name):
        self.machine, self.name = machine, name

    def wait_event(self, event):
        self.machine.merge(self.name, event.clock)

    def wait_stream(self, other):
        self.machine.merge(self.name, self.machine.clocks[other.name])


class Bytes:
    """Memory of a name: on the host, pinned or not, or on the device."""

    def __init__(self, machine, name, size, device=torch.device("cpu"), pinned=True):  # noqa: B008
        self.machine, self.name, self.size, self.device, self.pinned = machine, name, size, device, pinned

    def __len__(self):
        return self.size

    def is_pinned(self):
        return self.pinned

    def copy_(self, source, non_blocking=False):
        stream = self.machine.current if non_blocking else "host"
        self.machine.run(stream, reads=[source.name], writes=[self.name])
        return self


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    count = iter(range(10_000))

    class Memory:
        """As the real one; what PyTorch gives out may be in use by what is queued on the current stream."""

        def __init__(self, device, pinned=False):
            self.growths, self.device, self.held = 0, device, {}

        def take(self, name, shape):
            held = self.held.get(name)
            if held is None or len(held) < shape[0]:
                self.growths += 1
                held = self.held[name] = Bytes(machine, f"{name} {next(count)}", shape[0], self.device)
                if self.device == GPU:
                    machine.run(machine.current, reads=[held.name])
            return held

    @contextlib.contextmanager
    def stream(entered):
        before, machine.current = machine.current, entered.name
        yield
        machine.current = before

    cuda = types.SimpleNamespace(
        Stream=lambda device: Stream(machine, "copies"),
        Event=lambda: Event(machine),
        current_stream=lambda device: Stream(machine, machine.current),
        stream=stream,
    )
    fake = types.SimpleNamespace(
        cuda=cuda, device=torch.device, empty=torch.empty, uint8=torch.uint8, from_numpy=lambda array: array
    )
    monkeypatch.setattr(workspace, "torch", fake)
    monkeypatch.setattr(workspace, "Memory", Memory)
    return machine


@pytest.mark.parametrize("sizes", [[64] * 12, [64, 64, 64, 65, 65, 80, 10, 90, 90, 90]], ids=["alike", "larger"])
@pytest.mark.parametrize("kind", ["pinned", "not pinned", "on the device"])
def test_no_byte_is_overwritten_before_it_was_read(machine, kind, sizes):
    uploads: Any = Uploads(GPU)
    device = GPU if kind == "on the device" else torch.device("cpu")

    free = []  # as in an arena: what nobody holds any more is decoded into again, at once
    for number, size in enumerate(sizes):
        name = free.pop() if free else f"arena {number}"
        machine.run("stage" if device == GPU else "host", writes=[name])
        pixels = Bytes(machine, name, size, device, pinned=kind == "pinned")
        weakref.finalize(pixels, free.append, name)
        table = uploads.begin(size)
        machine.run("host", writes=[table.name])
        on_device = uploads.send(pixels)
        assert all(part.device == GPU for part in on_device)
        machine.run("stage", reads=[part.name for part in on_device])
        del pixels, on_device
        uploads.end()
        assert machine.races == []
    assert uploads.passed_on == (len(sizes) if kind == "not pinned" else 0)


def test_two_batches_are_under_way_at_most(machine):
    uploads: Any = Uploads(GPU)
    copied = []
    for _ in range(8):
        uploads.begin(64)
        waited = machine.clocks["host"]["copies"]
        assert waited == (copied[-2] if len(copied) > 1 else 0)  # for the last but one, not for the last
        uploads.send(Bytes(machine, f"arena {len(copied)}", 64))
        copied.append(machine.clocks["copies"]["copies"])
        uploads.end()
