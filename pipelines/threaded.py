"""What all loaders on the CPU share: the images of a step decoded once each, by a pool of threads."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType

import numpy as np
from PIL import Image

from fastdeit.pipelines.arena import Arenas, place
from fastdeit.pipelines.dataset import Dataset
from fastdeit.pipelines.decoded import DecodedBatch
from fastdeit.pipelines.order import Order


class DecodeError(ValueError):
    """An image that cannot be decoded; names data set, index, reason and remedy."""


class ThreadedLoader:
    """Decodes every image of a step once for all its copies; a `Loader`.

    dataset  stored images
    order    which samples make up a step
    pool     where images are decoded; it may be shared and stays open
    threads  how many images are decoded at once
    reason   one sentence: why it is this loader

    An image whose copies go on in the next step is copied from there instead of being decoded again, as long as
    steps are taken in order; one batch is kept for that, beside those that the consumer holds. The memory of a batch
    is the decoded size of its images, and serves again once nobody holds any part of the batch (see `Arenas`).

    decoded, reused  images so far that were decoded, and that were copied from the step before
    """

    name: str

    def __init__(
        self, dataset: Dataset, order: Order, *, pool: ThreadPoolExecutor, threads: int, reason: str = "as asked for"
    ) -> None:
        self.dataset, self.order, self.reason = dataset, order, reason
        self.decoded = self.reused = 0
        self._pool, self._threads = pool, threads
        self._arenas = Arenas()
        self._closed = threading.Event()

    def decode(self, index: int, out: np.ndarray) -> bool:
        """Decode JPEG `index` into `out`, (height, width, 3) uint8 RGB, both sides as the data set says.

        False if the loader's own decoder refused it and PIL read it. Raises DecodeError. Called from many threads.
        """
        raise NotImplementedError

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[DecodedBatch]:
        """The batches of `epoch` from `first_step` on; raises DecodeError."""
        previous: DecodedBatch | None = None
        for step in range(first_step, self.order.steps):
            previous = self._batch(epoch, step, previous)
            yield previous

    def close(self) -> None:
        """Stop a step that is being decoded; what it belongs to raises RuntimeError."""
        self._closed.set()

    def __enter__(self) -> ThreadedLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batch(self, epoch: int, step: int, previous: DecodedBatch | None) -> DecodedBatch:
        samples = self.order.step(epoch, step)
        images, source = first_appearances(samples.index)
        height, width = self.dataset.height[images], self.dataset.width[images]
        offset, size = place(height, width)
        batch = DecodedBatch(
            epoch=epoch,
            step=step,
            pixels=self._arenas.take(size),
            offset=offset,
            height=height,
            width=width,
            source=source,
            index=samples.index,
            label=self.dataset.label[samples.index],
        )
        known = _slots(previous) if previous is not None else {}
        to_decode = []
        for slot, index in enumerate(images.tolist()):
            if previous is not None and index in known:
                batch.image(slot)[:] = previous.image(known[index])
            else:
                to_decode.append((index, batch.image(slot)))
        batch.fallbacks.extend(self._decode_all(to_decode))
        self.decoded += len(to_decode)
        self.reused += len(images) - len(to_decode)
        return batch

    def _decode_all(self, images: list[tuple[int, np.ndarray]]) -> list[int]:
        """Decode (index, out) pairs in the pool; the indices that PIL read, in ascending order."""
        remaining = iter(images)  # shared: a thread that is done takes the next image
        stop = threading.Event()

        def work() -> list[int]:
            fallbacks = []
            try:
                for index, out in remaining:
                    if stop.is_set() or self._closed.is_set():
                        break
                    if not self._decode(index, out):
                        fallbacks.append(index)
            except BaseException:
                stop.set()
                raise
            return fallbacks

        futures = [self._pool.submit(work) for _ in range(min(self._threads, len(images)))]
        try:
            wait(futures)
        finally:
            # Also where Ctrl-C interrupts the wait: no thread writes on once this has returned.
            stop.set()
            wait(futures)
        fallbacks = [index for future in futures for index in future.result()]
        if self._closed.is_set():
            raise RuntimeError(f"{self.dataset.path}: the loader was closed while it decoded a batch")
        return sorted(fallbacks)

    def _decode(self, index: int, out: np.ndarray) -> bool:
        if self.dataset.is_jpeg(index):
            return self.decode(index, out)
        stored = self.dataset.read(index)
        if stored.size != out.size:
            raise decode_error(self.dataset, index, f"{stored.size} raw bytes where its size says {out.size}")
        out.reshape(-1)[:] = stored
        return True


def first_appearances(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of `index` (B,) in the order they first appear, and (B,) int32 the place of each among them."""
    values, first, inverse = np.unique(index, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    place = np.empty(len(values), np.int32)
    place[by_appearance] = np.arange(len(values), dtype=np.int32)
    return values[by_appearance], place[inverse]


def read_with_pil(dataset: Dataset, index: int, out: np.ndarray) -> None:
    """Decode JPEG `index` through PIL into `out`, (height, width, 3) uint8. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(dataset.read(index).data)) as image:
            check_size(dataset, index, image.height, image.width)
            out[:] = np.asarray(image.convert("RGB"))
    except DecodeError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything on damaged data
        raise decode_error(dataset, index, f"PIL cannot read it ({type(error).__name__}: {error})") from error


def check_size(dataset: Dataset, index: int, height: int, width: int) -> None:
    """Raise DecodeError unless the JPEG's own size is what the data set says."""
    expected = int(dataset.height[index]), int(dataset.width[index])
    if (height, width) != expected:
        raise decode_error(
            dataset, index, f"the JPEG is {width} x {height} pixels, the data set says {expected[1]} x {expected[0]}"
        )


def decode_error(dataset: Dataset, index: int, reason: str) -> DecodeError:
    """The error for image `index`, with what to do about it."""
    return DecodeError(
        f"{dataset.path}: image {index}: {reason}; replace the image in the source and convert the data set again"
    )


def _slots(batch: DecodedBatch) -> dict[int, int]:
    """Place of every image of `batch` by its dataset index."""
    return dict(zip(batch.index.tolist(), batch.source.tolist(), strict=True))
