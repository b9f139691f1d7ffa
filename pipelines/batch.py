"""The data and interfaces of the pipeline: a loader makes a DecodedBatch, a stage turns it into a Batch."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fastdeit.kernels.reference import MixedLabels
from fastdeit.pipelines.plan.order import StepSamples
from fastdeit.pipelines.plan.plan import Plan


@dataclass(frozen=True)
class DecodedBatch:
    """The images of one step of one rank. Each image is stored once for all its repeats.

    pixels   (bytes,) uint8: the decoded images in sequence, each (height, width, 3) RGB in C order. An array, pinned if
             the loader is; or a tensor if a GPU decodes. The tensor is ready on the stream that was current in the
             thread that called the loader
    offset   (images,) int64: start of an image in `pixels`
    height, width  (images,) int32
    source   (samples,) int32: position of a sample's image in `offset`, `height` and `width`
    index    (samples,) int64: dataset index of a sample
    label    (samples,) int64
    fallbacks  dataset indices that PIL read because the loader's own decoder refused them
    replaced   (bad, used) dataset indices: `bad` does not decode; its samples have the pixels of `used`, resized to the
               size of `bad`, and the label of `used`
    region     (images, 4) int32 top, left, height, width of the decoded part of an image; the rest is undefined.
               None: every image is decoded whole
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
        """`pixels` as an array. Raises ValueError if they are on a GPU."""
        if isinstance(self.pixels, np.ndarray):
            return self.pixels
        if self.pixels.device.type != "cpu":
            raise ValueError(
                f"the pixels of epoch {self.epoch}, step {self.step} are on {self.pixels.device}, but the host needs "
                "them: open the loader without on_device"
            )
        return self.pixels.numpy()


@dataclass(frozen=True)
class Batch:
    """The input of a training or evaluation step.

    images   (B, 3, S, S), or the layout that the stage was built for; float32, bfloat16 or float16
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
        """All fields, in order."""
        return self.images, self.label_a, self.label_b, self.lam, self.index

    def labels(self, smoothing: float) -> MixedLabels:
        """The mixed and smoothed labels, in the form that the objective takes."""
        return MixedLabels(self.label_a, self.label_b, self.lam, smoothing)

    def targets(self, num_classes: int, smoothing: float) -> Tensor:
        """The labels as (B, num_classes) float32 soft targets: see `MixedLabels.dense`."""
        return self.labels(smoothing).dense(num_classes)


class Loader(Protocol):
    """Decodes the images of a step: see `ThreadedLoader.decode`."""

    def decode(
        self,
        samples: StepSamples,
        regions: np.ndarray | None = None,
        *,
        previous: DecodedBatch | None = None,
        following: StepSamples | None = None,
    ) -> DecodedBatch: ...


class Stage(Protocol):
    """Augments decoded images as the plan of their step says."""

    def __call__(self, decoded: DecodedBatch, plan: Plan) -> Batch: ...


def normalized_levels(mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """(3, 256) float32: every level of each channel, bit-identical to torchvision's ToTensor and Normalize."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    mean32, std32 = np.array(mean, np.float32)[:, None], np.array(std, np.float32)[:, None]
    return (levels - mean32) / std32
