"""Batches between threads and streams, with streams that only write down what is asked of them."""

import contextlib
import threading

import numpy as np
import pytest
import torch

from fastdeit.kernels.reference import as_patches
from fastdeit.pipelines.device import transfer
from fastdeit.pipelines.device.transfer import StreamPrefetcher


class FakeCuda:
    """What `StreamPrefetcher` uses of `torch.cuda`. Streams are names; `done` is what happened, in order."""

    def __init__(self):
        self.done, self._current = [], threading.local()
        cuda = self

        class Event:
            def record(self, stream):
                self.after = [step for step in cuda.done if step[0] == stream]

        self.Event = Event

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._current.name = self.current(), stream.name
        yield
        self._current.name = before

    def current(self):
        return getattr(self._current, "name", "default")

    def current_stream(self, device):
        return FakeStream(self, self.current())


class FakeStream(str):
    device = torch.device("cuda", 0)

    def __new__(cls, cuda, name):
        self = super().__new__(cls, name)
        self.cuda, self.name = cuda, name
        return self

    def wait_event(self, event):
        self.cuda.done.append((self.name, "waits for", event.after[-1]))


class FakeTensor:
    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number

    def record_stream(self, stream):
        self.cuda.done.append((stream.name, "holds", self.number))


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(transfer.torch, "cuda", fake)
    return fake


def items(cuda, count, closed):
    try:
        for number in range(count):
            cuda.done.append((cuda.current(), "makes", number))
            yield FakeTensor(cuda, number)
    finally:
        closed.append(cuda.current())


def test_the_using_stream_waits_for_each_item_and_holds_it(cuda):
    closed = []
    with StreamPrefetcher(items(cuda, 5, closed), 2, FakeStream(cuda, "side"), lambda item: [item]) as prefetcher:
        assert [item.number for item in prefetcher] == list(range(5))
    used = [step for step in cuda.done if step[0] == "default"]
    assert used == [
        step
        for number in range(5)
        for step in (("default", "waits for", ("side", "makes", number)), ("default", "holds", number))
    ]
    assert closed == ["side"]


def test_closing_early_ends_the_items_on_their_stream(cuda):
    closed = []
    prefetcher = StreamPrefetcher(items(cuda, 50, closed), 1, FakeStream(cuda, "side"), lambda item: [item])
    assert next(prefetcher).number == 0
    prefetcher.close()
    assert closed == ["side"]
    assert not any(step[0] == "default" and step[1] == "makes" for step in cuda.done)


def test_an_error_comes_after_the_items_before_it(cuda):
    def failing():
        yield from items(cuda, 2, [])
        raise ValueError("image 2")

    with StreamPrefetcher(failing(), 3, FakeStream(cuda, "side"), lambda item: [item]) as prefetcher:
        assert [next(prefetcher).number for _ in range(2)] == [0, 1]
        with pytest.raises(ValueError, match="image 2"):
            next(prefetcher)


def test_patches_are_those_of_a_convolution():
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    ours = as_patches(images, 4) @ weight.flatten(1).T
    theirs = torch.nn.functional.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
