"""What all loaders share: each image of a step is decoded once, by a pool of threads."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Literal, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.errors import UserError, fact
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.machine import machine_error
from fastdeit.pipelines.memory import Arenas, place
from fastdeit.pipelines.plan.order import StepSamples

Region = tuple[int, int, int, int]  # top, left, height, width in the decoded image, pixels
OnError = Literal["fail", "replace"]

MOST_SKIPPED = 100  # images in a row that may fail where one is to be replaced: more is no damage to single images


_Task = tuple[int, np.ndarray, Region | None]  # index, where it goes, and what of it, if not all


class DecodeError(UserError):
    """An image that is damaged: it cannot be decoded, or fails its checksum; names data set, index, reason, remedy."""


class ThreadedLoader:
    """Decodes every image of a step once for all its copies; a `Loader`.

    dataset  stored images
    pool     where images are decoded; it may be shared and stays open
    threads  how many images are decoded at once
    reason   one sentence: why it is this loader
    on_error  what becomes of an image that neither the loader's decoder nor PIL can decode, or whose bytes are not
             those of its checksum. "fail": DecodeError. "replace": the next image that decodes takes its place, resized
             to its size (PIL, bicubic), with its own label; listed in the batch's `replaced`. All images are decoded
             whole then, so that the replacement depends on nothing but the data. DecodeError after 100 failures in a
             row. Bytes that the machine cannot read are an error in any case: MachineError
    pinned   whether the pixels lie in pinned memory, from which a GPU copies them in the background

    The memory of a batch is the decoded size of its images, and serves again once nobody holds any part of the batch
    (see `Arenas`).

    decoded, reused  images so far that were decoded, and that were copied from the step before
    """

    name: str
    pixels: str  # whose pixels it decodes: loaders of one name of these are equal to the bit
    crops = False  # whether `decode_image` takes a region
    on_device = False  # whether the pixels of a batch are on a GPU

    def __init__(
        self,
        dataset: Dataset,
        *,
        pool: ThreadPoolExecutor,
        threads: int,
        reason: str = "as asked for",
        on_error: OnError = "fail",
        pinned: bool = False,
    ) -> None:
        if on_error not in get_args(OnError):
            raise UserError(f"on_error '{on_error}' is not one of {', '.join(get_args(OnError))}")
        self.dataset, self.reason = dataset, reason
        self._replaces = on_error == "replace"
        self.decoded = self.reused = 0
        self._pool, self._threads = pool, threads
        self._arenas = Arenas(pinned=pinned)
        self._closed = threading.Event()
        self._load()

    def _load(self) -> None:
        """Load what decodes. Raises UserError where it is missing, with what to install."""

    def decode_image(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        """Decode JPEG `index` into `out`, (height, width, 3) uint8 RGB, both sides as the data set says.

        With `region`, which only loaders that crop are given, the rest of `out` is undefined.
        False if the loader's own decoder refused it and PIL read it. Raises DecodeError. Called from many threads.
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
        """The images of one step.

        regions    (B, 4) int32 top, left, height, width of what each sample needs of its image; None: all of it. A
                   loader that `crops` decodes the box around what the samples of an image need together
        previous   the batch of the step before, whose images are copied instead of decoded again
        following  the samples of the step after: an image that goes on there is decoded whole

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
        known = _whole_images(previous) if previous is not None else {}
        to_decode: list[_Task] = []
        for slot, index in enumerate(images.tolist()):
            if previous is not None and index in known:
                batch.image(slot)[:] = previous.image(known[index])
                if batch.region is not None:
                    batch.region[slot] = 0, 0, height[slot], width[slot]
            else:
                region = tuple(batch.region[slot].tolist()) if batch.region is not None else None
                to_decode.append((index, batch.image(slot), region))
        for index, used, own in self._decode_all(to_decode):
            if not own and used not in batch.fallbacks:
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
        """Stop a step that is being decoded; what it belongs to raises RuntimeError."""
        self._closed.set()

    def __enter__(self) -> ThreadedLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _memory(self, size: int) -> np.ndarray | Tensor:
        """(size,) uint8 for the images of a batch."""
        try:
            return self._arenas.take(size)
        except (OSError, MemoryError) as error:
            what = f"{self.dataset.path}: no {size} bytes for the images of a batch"
            raise machine_error(error, what) from error

    def _image_regions(
        self, regions: np.ndarray | None, images: np.ndarray, source: np.ndarray, following: StepSamples | None
    ) -> np.ndarray | None:
        """(images, 4) int32: the region of each image that is to be decoded; None: all of all."""
        if regions is None or not self.crops or self._replaces:
            return None
        region = bounding_boxes(regions, source, len(images))
        if following is not None:
            goes_on = np.isin(images, following.index)
            region[goes_on, :2] = 0
            region[goes_on, 2] = self.dataset.height[images[goes_on]]
            region[goes_on, 3] = self.dataset.width[images[goes_on]]
        return region

    def _decode_all(self, tasks: list[_Task]) -> list[tuple[int, int, bool]]:
        """Decode in the pool; of each image its index, that of the image used, and whether PIL was not needed."""
        remaining = iter(tasks)  # shared: a thread that is done takes the next image
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
            # Also where Ctrl-C interrupts the wait: no thread writes on once this has returned.
            stop.set()
            wait(futures)
        done = [image for future in futures for image in future.result()]
        if self._closed.is_set():
            raise RuntimeError(f"{self.dataset.path}: the loader was closed while it decoded a batch")
        return done

    def _decode(self, index: int, out: np.ndarray, region: Region | None) -> tuple[int, bool]:
        """Decode, or replace; the index of the image used, and whether PIL was not needed."""
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
        following = min(MOST_SKIPPED, len(self.dataset) - 1)
        for distance in range(1, following + 1):
            used = (index + distance) % len(self.dataset)
            pixels = np.empty((self.dataset.height[used], self.dataset.width[used], 3), np.uint8)
            try:
                own = self._decode_stored(used, pixels)
            except DecodeError:
                continue
            out[:] = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
            return used, own
        raise DecodeError(
            f"{error}. None of the {following} images after it decodes either, to replace it: "
            f"look at the whole with fastdeit-convert --verify {self.dataset.path}"
        ) from error

    def _decode_stored(self, index: int, out: np.ndarray, region: Region | None = None) -> bool:
        if self.dataset.is_jpeg(index):
            return self.decode_image(index, out) if region is None else self.decode_image(index, out, region)
        stored = read_stored(self.dataset, index)
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


def bounding_boxes(boxes: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """(count, 4) int32: the smallest box around all `boxes` (B, 4) top, left, height, width of each `group` (B,)."""
    first = np.full((count, 2), np.iinfo(np.int32).max, np.int32)
    end = np.zeros((count, 2), np.int32)
    np.minimum.at(first, group, boxes[:, :2])
    np.maximum.at(end, group, boxes[:, :2] + boxes[:, 2:])
    return np.concatenate([first, end - first], axis=1)


def read_stored(dataset: Dataset, index: int) -> np.ndarray:
    """The stored bytes of image `index`, compared with their checksum when this process first reads them.

    Raises DecodeError where they are not those that were written, MachineError where they cannot be read.
    """
    try:
        stored = dataset.read(index)
    except OSError as error:
        raise machine_error(error, f"{dataset.path}: image {index}: cannot be read") from error
    if dataset.checksums is not None and not dataset.checksums.fits(index, stored):
        raise DecodeError(
            f"{dataset.path}: image {index}: its bytes are not those that were written (crc32); copy the data set "
            "again, or convert it again"
        )
    return stored


def read_with_pil(dataset: Dataset, index: int, out: np.ndarray) -> None:
    """Decode JPEG `index` through PIL into `out`, (height, width, 3) uint8. Raises DecodeError."""
    stored = read_stored(dataset, index)
    try:
        # Of others of PIL's readers some start programs (EPS), and a data set may be anybody's.
        with Image.open(io.BytesIO(stored.data), formats=["JPEG"]) as image:
            check_size(dataset, index, image.height, image.width)
            out[:] = np.asarray(image.convert("RGB"))
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # PIL's plugins raise almost anything on damaged data
        raise decode_error(dataset, index, f"PIL cannot read it ({type(error).__name__}: {fact(error)})") from error


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


def _whole_images(batch: DecodedBatch) -> dict[int, int]:
    """Place of every image of `batch` that is decoded whole, by its dataset index."""
    places = dict(zip(batch.index.tolist(), batch.source.tolist(), strict=True))
    if batch.region is None:
        return places
    whole = (batch.region[:, 2] == batch.height) & (batch.region[:, 3] == batch.width)
    return {index: slot for index, slot in places.items() if whole[slot]}
