"""What a loader hands over: decoded images, each once, and the samples that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class DecodedBatch:
    """The images of one step of one rank, every image once for all its repeats.

    pixels   (bytes,) uint8: the decoded images one behind another, each (height, width, 3) RGB, C order. An array, in
             pinned memory where the loader was asked for that; or a tensor, on a GPU where images are decoded there,
             and there as of the stream that was current in the thread that took the batch from the loader
    offset   (images,) int64: where an image starts in `pixels`
    height, width  (images,) int32
    source   (samples,) int32: which of the images a sample is made of
    index    (samples,) int64: dataset index of a sample
    label    (samples,) int64
    fallbacks  dataset indices that the loader's own decoder could not read and PIL could
    replaced   (bad, used): images that do not decode, and those whose pixels, at the declared size, and label are in
               their place
    region     (images, 4) int32 top, left, height, width of what is decoded of an image, the rest of it being
               undefined; None: all of every image
    """

    epoch: int
    step: int
    pixels: np.ndarray | Tensor
    offset: np.ndarray
    height: np.ndarray
    width: np.ndarray
    source: np.ndarray
    index: np.ndarray
    label: np.ndarray
    fallbacks: list[int] = field(default_factory=list)
    replaced: list[tuple[int, int]] = field(default_factory=list)
    region: np.ndarray | None = None

    def image(self, slot: int) -> Any:
        """View of decoded image `slot`, (height, width, 3) uint8: an array or a tensor, as `pixels` is."""
        h, w, start = int(self.height[slot]), int(self.width[slot]), int(self.offset[slot])
        return self.pixels[start : start + h * w * 3].reshape(h, w, 3)

    def host_pixels(self) -> np.ndarray:
        """`pixels` as an array. Raises ValueError where they are on a GPU."""
        if isinstance(self.pixels, np.ndarray):
            return self.pixels
        if self.pixels.device.type != "cpu":
            raise ValueError(
                f"the pixels of epoch {self.epoch}, step {self.step} are on {self.pixels.device}, and are needed on "
                "the host: open the loader without on_device"
            )
        return self.pixels.numpy()


class Loader(Protocol):
    """Decodes the steps of a run in order, ahead of their use, with bounded memory.

    A loader is opened on a data set and an `Order` (training or evaluation) and is a context manager;
    closing it ends every thread it started, whatever state it is in.
    """

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[DecodedBatch]:
        """The batches of `epoch` from `first_step` on. An exception in a worker is raised here."""
        ...

    def close(self) -> None: ...
