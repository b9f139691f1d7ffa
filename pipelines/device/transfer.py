"""Moves batches to the device, and from the CUDA stream that makes them to the stream that uses them."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from fastdeit.kernels.reference import as_patches
from fastdeit.pipelines.batch import Batch, DecodedBatch, Stage
from fastdeit.pipelines.loaders.prefetch import Prefetcher
from fastdeit.pipelines.plan.plan import Plan

T = TypeVar("T")


class StreamPrefetcher(Prefetcher[T]):
    """A `Prefetcher` that makes items on `stream`; the consumer uses them on its own current stream.

    The consumer's stream waits for an item; the host does not. When an item is freed, its memory is not reused before
    the consumer's stream has done the work queued until then.

    items    a generator; `stream` is current whenever its code runs
    tensors  returns the tensors of an item that are on the stream's device
    """

    def __init__(
        self,
        items: Generator[T, None, None],
        depth: int,
        stream: torch.cuda.Stream,
        tensors: Callable[[T], Iterable[Tensor]],
    ) -> None:
        self._stream, self._tensors = stream, tensors
        self._made: deque[torch.cuda.Event] = deque()
        super().__init__(_on_stream(items, stream, self._made), depth)

    def __next__(self) -> T:
        item = super().__next__()
        consumer = torch.cuda.current_stream(self._stream.device)
        consumer.wait_event(self._made.popleft())
        for tensor in self._tensors(item):
            tensor.record_stream(consumer)
        return item


def _on_stream(
    items: Generator[T, None, None], stream: torch.cuda.Stream, made: deque[torch.cuda.Event]
) -> Generator[T, None, None]:
    """`items`, made on `stream`; records an event for each in `made`."""

    def record(item: T) -> T:
        event = torch.cuda.Event()
        event.record(stream)
        made.append(event)
        return item

    with torch.cuda.stream(stream), closing(items):
        yield from map(record, items)  # a loop variable would keep the last item alive


class CopyingStage:
    """Wraps a host stage: copies its batches to `device`, then casts the images and cuts them into patches.

    Copies to a GPU run in the background. The stage keeps a host batch until its copy is done; the next call waits for
    that.

    stage       should make pinned images if `device` is a GPU
    dtype       of the images on the device
    patch_size  side of a patch, pixels; None: images stay (B, 3, S, S)
    """

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype, patch_size: int | None = None) -> None:
        self._stage, self._device, self._dtype, self._patch_size = stage, device, dtype, patch_size
        self._in_flight: tuple[Batch, torch.cuda.Event] | None = None

    def __call__(self, decoded: DecodedBatch, plan: Plan) -> Batch:
        batch = self._stage(decoded, plan)
        images, *others = (tensor.to(self._device, non_blocking=True) for tensor in batch.tensors())
        if self._device.type == "cuda":
            if self._in_flight is not None:
                self._in_flight[1].synchronize()
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
            self._in_flight = batch, copied
        images = images.to(self._dtype)
        if self._patch_size is not None:
            images = as_patches(images, self._patch_size)
        return Batch(images, *others)
