"""Batches from the thread that makes them to the thread that uses them, each on a CUDA stream of its own."""

from __future__ import annotations

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
    """A `Prefetcher` whose items are made on `stream`, and used on the stream that is current where they are asked for.

    That stream waits for an item, the host does not. Memory of an item's tensors that is given back is not given out
    again before what the using stream had to do by then.

    items    a generator; the stream is current wherever its code runs
    tensors  those of an item, on the stream's device
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
        using = torch.cuda.current_stream(self._stream.device)
        using.wait_event(self._made.popleft())
        for tensor in self._tensors(item):
            tensor.record_stream(using)
        return item


def _on_stream(
    items: Generator[T, None, None], stream: torch.cuda.Stream, made: deque[torch.cuda.Event]
) -> Generator[T, None, None]:
    """`items`, made on `stream`; `made` gets an event for each."""

    def record(item: T) -> T:
        event = torch.cuda.Event()
        event.record(stream)
        made.append(event)
        return item

    with torch.cuda.stream(stream), closing(items):
        yield from map(record, items)  # which, unlike a loop, holds on to no item


class CopyingStage:
    """A host stage whose images are copied to `device`, and there cast and cut into patches; each where asked for.

    On a GPU the copies are in the background: a batch of the host's is held until its copy is done, which the next
    one waits for.

    stage       its images should be pinned where `device` is a GPU
    dtype       of the images on the device
    patch_size  side of a patch; None: images stay (B, 3, S, S)
    """

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype, patch_size: int | None = None) -> None:
        self._stage, self._device, self._dtype, self._patch_size = stage, device, dtype, patch_size
        self._under_way: tuple[Batch, torch.cuda.Event] | None = None

    def __call__(self, decoded: DecodedBatch, plan: Plan) -> Batch:
        batch = self._stage(decoded, plan)
        images, *others = (tensor.to(self._device, non_blocking=True) for tensor in batch.tensors())
        if self._device.type == "cuda":
            if self._under_way is not None:
                self._under_way[1].synchronize()
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
            self._under_way = batch, copied
        images = images.to(self._dtype)
        if self._patch_size is not None:
            images = as_patches(images, self._patch_size)
        return Batch(images, *others)
