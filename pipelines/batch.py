"""What passes between the parts of the pipeline: decoded images from loader to stage, a batch from stage to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fastdeit.kernels.reference import MixedLabels
from fastdeit.pipelines.plan.order import StepSamples
from fastdeit.pipelines.plan.plan import Plan


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


@dataclass(frozen=True)
class Batch:
    """What the network is trained on, or evaluated with.

    images   (B, 3, S, S), or laid out as the stage was asked to; float32, bfloat16 or float16
    label_a, label_b  (B,) int64: a sample's own label and its partner's
    lam      (B,) float32: share of `label_a`
    index    (B,) int64: dataset index
    """

    images: Tensor
    label_a: Tensor
    label_b: Tensor
    lam: Tensor
    index: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.images, self.label_a, self.label_b, self.lam, self.index

    def labels(self, smoothing: float) -> MixedLabels:
        """The true labels, mixed and smoothed, as the objective takes them."""
        return MixedLabels(self.label_a, self.label_b, self.lam, smoothing)

    def targets(self, num_classes: int, smoothing: float) -> Tensor:
        """The same as (B, num_classes) float32 soft targets: see `MixedLabels.dense`."""
        return self.labels(smoothing).dense(num_classes)


class Loader(Protocol):
    """Decodes the images of a step."""

    def decode(
        self,
        samples: StepSamples,
        regions: np.ndarray | None = None,
        *,
        previous: DecodedBatch | None = None,
        following: StepSamples | None = None,
    ) -> DecodedBatch: ...


class Stage(Protocol):
    """Makes a batch of decoded images and the plan of their step."""

    def __call__(self, decoded: DecodedBatch, plan: Plan) -> Batch: ...


def normalized_levels(mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """(3, 256) float32: every level as ToTensor and Normalize make it, to the bit."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    mean32, std32 = np.array(mean, np.float32)[:, None], np.array(std, np.float32)[:, None]
    return (levels - mean32) / std32
