"""The base of all loaders: a pool of threads decodes each image of a step once."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Literal, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.closing import Closing
from fastdeit.pipelines.errors import UserError, fact
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.machine import machine_error
from fastdeit.pipelines.memory import Arenas, place
from fastdeit.pipelines.plan.order import StepSamples

Region = tuple[int, int, int, int]  # top, left, height, width in the decoded image, pixels
OnError = Literal["fail", "replace"]

# Consecutive images that may fail when one is replaced: more means that the whole data set is damaged.
MOST_SKIPPED = 100

_Task = tuple[int, np.ndarray, Region | None]  # dataset index, output, region (None: the whole image)


class DecodeError(UserError):
    """A damaged image: it does not decode, or its checksum differs. Names data set, index, reason and remedy."""


class ThreadedLoader(Closing):
    """Decodes every image of a step once for all its repeats; a `Loader`.

    dataset  stored images
    pool     threads that decode; it may be shared, and `close` leaves it open
    threads  images decoded at once
    reason   one sentence: why the run uses this loader
    on_error  applies to an image that neither the loader's decoder nor PIL can decode, or whose checksum differs.
             "fail": raise DecodeError. "replace": use the next image that decodes, resized to the bad one's size (PIL,
             bicubic), and its label; the batch's `replaced` lists both. All images are then decoded whole, so that the
             replacement depends only on the data. Raises DecodeError after 100 failures in a row. Bytes that the
             machine cannot read always raise MachineError
    images   (N,) dataset indices, ascending, of the images that may replace others; None: all
    pinned   decode into pinned memory, from which a GPU can copy in the background

    A batch takes the decoded size of its images. Its memory is reused once nothing refers to it (see `Arenas`).

    decoded, reused  images decoded so far, and images copied from the previous step
    """

    name: str
    pixels: str  # names the exact output: loaders with the same `pixels` decode bit-identically
    crops = False  # whether `decode_image` accepts a region
    on_device = False  # whether a batch's pixels are on a GPU

    def __init__(
        self,
        dataset: Dataset,
        *,
        pool: ThreadPoolExecutor,
        threads: int,
        reason: str = "as requested",
        on_error: OnError = "fail",
        images: np.ndarray | None = None,
        pinned: bool = False,
    ) -> None:
        if on_error not in get_args(OnError):
            raise UserError(f"on_error '{on_error}' is not one of {', '.join(get_args(OnError))}")
        self.dataset, self.reason = dataset, reason
        self._replaces = on_error == "replace"
        self._images = np.arange(len(dataset)) if images is None else images
        self.decoded = self.reused = 0
        self._pool, self._threads = pool, threads
        self._arenas = Arenas(pinned=pinned)
        self._closed = threading.Event()
        self._load()

    def _load(self) -> None:
        """Load the decoder's library. Raises UserError if it is missing, with what to install."""

    def decode_image(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        """Decode JPEG `index` into `out`, (height, width, 3) uint8 RGB of the size that the data set records.

        Only loaders that crop get a `region`; the rest of `out` is then undefined. Returns False if PIL read the image
        because the loader's own decoder refused it. Raises DecodeError. Many threads call this at once.
        """
        raise NotImplementedError

    def decode(
        self,
        samples: StepSamples,
        regions: np.ndarray | None = None,
        *,
        previous: DecodedBatch | None = None,
        following: StepSamples | None = None,
    ) -> DecodedBatch:
        """Decode the images of one step.

        regions    (B, 4) int32 top, left, height, width of the part that each sample needs; None: the whole image. A
                   loader that `crops` decodes the bounding box of the parts that an image's samples need
        previous   the batch of the previous step: images that it holds whole are copied, not decoded again
        following  the samples of the next step: images that it shares with this step are decoded whole

        Raises DecodeError and MachineError.
        """
        images, source = first_appearances(samples.index)
        height, width = self.dataset.height[images], self.dataset.width[images]
        offset, size = place(height, width)
        batch = DecodedBatch(
            epoch=samples.epoch,
            step=samples.step,
            pixels=self._memory(size),
            offset=offset,
            height=height,
            width=width,
            source=source,
            index=samples.index,
            label=self.dataset.label[samples.index],
            region=self._image_regions(regions, images, source, following),
        )
        reusable = _whole_images(previous) if previous is not None else {}
        to_decode: list[_Task] = []
        for slot, index in enumerate(images.tolist()):
            if previous is not None and index in reusable:
                batch.image(slot)[:] = previous.image(reusable[index])
                if batch.region is not None:
                    batch.region[slot] = 0, 0, height[slot], width[slot]
            else:
                region = tuple(batch.region[slot].tolist()) if batch.region is not None else None
                to_decode.append((index, batch.image(slot), region))
        for index, used, native in self._decode_all(to_decode):
            if not native and used not in batch.fallbacks:
                batch.fallbacks.append(used)
            if used != index:
                batch.replaced.append((index, used))
        if previous is not None:
            batch.replaced.extend(pair for pair in previous.replaced if pair[0] in images)
        batch.fallbacks.sort()
        batch.replaced.sort()
        for bad, used in batch.replaced:
            batch.label[batch.index == bad] = self.dataset.label[used]
        self.decoded += len(to_decode)
        self.reused += len(images) - len(to_decode)
        return batch

    def close(self) -> None:
        """Stop a `decode` that is running in another thread, which then raises RuntimeError."""
        self._closed.set()

    def _memory(self, size: int) -> np.ndarray | Tensor:
        """(size,) uint8 for the images of a batch. Raises MachineError."""
        try:
            return self._arenas.take(size)
        except (OSError, MemoryError) as error:
            raise machine_error(
                error, f"{self.dataset.path}: cannot allocate {size} bytes for the images of a batch"
            ) from error

    def _image_regions(
        self, regions: np.ndarray | None, images: np.ndarray, source: np.ndarray, following: StepSamples | None
    ) -> np.ndarray | None:
        """(images, 4) int32: the region to decode of each image; None: decode every image whole."""
        if regions is None or not self.crops or self._replaces:
            return None
        region = bounding_boxes(regions, source, len(images))
        if following is not None:
            shared = np.isin(images, following.index)
            region[shared, :2] = 0
            region[shared, 2] = self.dataset.height[images[shared]]
            region[shared, 3] = self.dataset.width[images[shared]]
        return region

    def _decode_all(self, tasks: list[_Task]) -> list[tuple[int, int, bool]]:
        """Decode in the pool. Returns (index, index of the image used, whether the loader's own decoder read it)."""
        remaining = iter(tasks)  # shared: each thread takes the next image
        stop = threading.Event()

        def work() -> list[tuple[int, int, bool]]:
            done = []
            try:
                for task in remaining:
                    if stop.is_set() or self._closed.is_set():
                        break
                    done.append((task[0], *self._decode(*task)))
            except BaseException:
                stop.set()
                raise
            return done

        futures = [self._pool.submit(work) for _ in range(min(self._threads, len(tasks)))]
        try:
            wait(futures)
        finally:
            # Also after Ctrl-C: no thread may write to the batch once this returns.
            stop.set()
            wait(futures)
        done = [image for future in futures for image in future.result()]
        if self._closed.is_set():
            raise RuntimeError(f"{self.dataset.path}: the loader was closed while it decoded a batch")
        return done

    def _decode(self, index: int, out: np.ndarray, region: Region | None) -> tuple[int, bool]:
        """Decode or replace. Returns the index of the image used, and whether the loader's own decoder read it."""
        try:
            try:
                return index, self._decode_stored(index, out, region)
            except DecodeError as error:
                if not self._replaces:
                    raise
                return self._replace(index, out, error)
        except MemoryError as error:
            raise machine_error(error, f"{self.dataset.path}: image {index}: cannot be decoded") from error

    def _replace(self, index: int, out: np.ndarray, error: DecodeError) -> tuple[int, bool]:
        height, width, _ = out.shape
        following = min(MOST_SKIPPED, len(self._images) - 1)
        place = int(np.searchsorted(self._images, index))
        for distance in range(1, following + 1):
            used = int(self._images[(place + distance) % len(self._images)])
            pixels = np.empty((self.dataset.height[used], self.dataset.width[used], 3), np.uint8)
            try:
                native = self._decode_stored(used, pixels)
            except DecodeError:
                continue
            out[:] = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
            return used, native
        raise DecodeError(
            f"{error}. The next {following} images do not decode either, so none can replace it: "
            f"check the data set with fastdeit-convert --verify {self.dataset.path}"
        ) from error

    def _decode_stored(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        if self.dataset.is_jpeg(index):
            return self.decode_image(index, out) if region is None else self.decode_image(index, out, region)
        stored = read_stored(self.dataset, index)
        if stored.size != out.size:
            raise decode_error(self.dataset, index, f"it has {stored.size} raw bytes, but its size needs {out.size}")
        out.reshape(-1)[:] = stored
        return True


def first_appearances(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of `index` (B,) in order of first appearance, and (B,) int32 the position of each among them."""
    values, first, inverse = np.unique(index, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    position = np.empty(len(values), np.int32)
    position[by_appearance] = np.arange(len(values), dtype=np.int32)
    return values[by_appearance], position[inverse]


def bounding_boxes(boxes: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """(count, 4) int32: the bounding box of each group's `boxes` (B, 4) top, left, height, width; `group` (B,)."""
    first = np.full((count, 2), np.iinfo(np.int32).max, np.int32)
    end = np.zeros((count, 2), np.int32)
    np.minimum.at(first, group, boxes[:, :2])
    np.maximum.at(end, group, boxes[:, :2] + boxes[:, 2:])
    return np.concatenate([first, end - first], axis=1)


def read_stored(dataset: Dataset, index: int) -> np.ndarray:
    """The stored bytes of image `index`, (size,) uint8. The first read in a process compares their checksum.

    Raises DecodeError if the checksum differs, MachineError if the bytes cannot be read.
    """
    try:
        stored = dataset.read(index)
    except OSError as error:
        raise machine_error(error, f"{dataset.path}: image {index}: cannot be read") from error
    if dataset.checksums is not None and not dataset.checksums.fits(index, stored):
        raise DecodeError(
            f"{dataset.path}: image {index}: its checksum (crc32) does not match; copy the data set again, or "
            "convert it again"
        )
    return stored


def read_with_pil(dataset: Dataset, index: int, out: np.ndarray) -> None:
    """Decode JPEG `index` through PIL into `out`, (height, width, 3) uint8. Raises DecodeError."""
    stored = read_stored(dataset, index)
    try:
        # JPEG only: some of PIL's readers start programs (EPS), and a data set may be untrusted.
        with Image.open(io.BytesIO(stored.data), formats=["JPEG"]) as image:
            check_size(dataset, index, image.height, image.width)
            out[:] = np.asarray(image.convert("RGB"))
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # PIL's plugins raise almost anything on damaged data
        raise decode_error(dataset, index, f"PIL cannot read it ({type(error).__name__}: {fact(error)})") from error


def check_size(dataset: Dataset, index: int, height: int, width: int) -> None:
    """Raise DecodeError unless the JPEG has the size, in pixels, that the data set records."""
    expected = int(dataset.height[index]), int(dataset.width[index])
    if (height, width) != expected:
        raise decode_error(
            dataset,
            index,
            f"the JPEG is {width} x {height} pixels, but the data set says {expected[1]} x {expected[0]}",
        )


def decode_error(dataset: Dataset, index: int, reason: str) -> DecodeError:
    """The error for image `index`, with its remedy."""
    return DecodeError(
        f"{dataset.path}: image {index}: {reason}; replace the image in the source and convert the data set again"
    )


def _whole_images(batch: DecodedBatch) -> dict[int, int]:
    """Slot of every image that `batch` holds whole, by dataset index."""
    slots = dict(zip(batch.index.tolist(), batch.source.tolist(), strict=True))
    if batch.region is None:
        return slots
    whole = (batch.region[:, 2] == batch.height) & (batch.region[:, 3] == batch.width)
    return {index: slot for index, slot in slots.items() if whole[slot]}
