"""Smaller images and weaker augmentation first: what each epoch of a run trains on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

from fastdeit.pipelines.errors import UserError

MOST = 100  # parts


class Curriculum:
    """A run in parts that take equal computation, as in EfficientTrain++ (Wang et al., arXiv 2405.08768, section 4).

    Computation is counted in pixels: a part with images of half the side has four times as many epochs. Without
    `sizes` and `magnitudes`, the whole run is one part.

    epochs      of the run
    img_size    side of the model's images, pixels
    sizes       side of the training images in each part, pixels; empty: `img_size` in all of them
    magnitudes  of RandAugment (timm's "m") in each part; empty: the policy's own
    starts      first epoch of each part, and the end of the run

    Raises UserError if the parts do not fit each other or the run.
    """

    def __init__(self, epochs: int, img_size: int, sizes: Sequence[int] = (), magnitudes: Sequence[float] = ()) -> None:
        if sizes and magnitudes and len(sizes) != len(magnitudes):
            raise UserError(
                f"curriculum.sizes has {len(sizes)} parts, but curriculum.magnitudes has {len(magnitudes)}: "
                f"give both the same number, or leave one of them empty"
            )
        count = max(len(sizes), len(magnitudes), 1)
        if count > MOST:
            raise UserError(f"the curriculum has {count} parts: it may have at most {MOST}")
        if img_size < 1 or epochs < 1:
            raise UserError(f"model.img_size is {img_size} and run.epochs {epochs}: both must be at least 1")
        if not all(1 <= size <= max(img_size, sizes[-1]) for size in sizes):
            raise UserError(
                f"curriculum.sizes are {', '.join(map(str, sizes))}: each must be from 1 to model.img_size, {img_size}"
            )
        if sizes and sizes[-1] != img_size:
            raise UserError(
                f"curriculum.sizes end with {sizes[-1]}, but model.img_size is {img_size}: the last part must train on "
                f"images of the model's size"
            )
        if not all(0 <= magnitude <= 10 for magnitude in magnitudes):
            raise UserError(f"curriculum.magnitudes are {', '.join(map(str, magnitudes))}: each must be from 0 to 10")
        self.epochs, self.count = epochs, count
        self.sizes = tuple(sizes) or (img_size,) * count
        self.magnitudes = tuple(magnitudes)
        shares = [Fraction(1, size * size) for size in self.sizes]
        self._ends = [end / sum(shares) for end in itertools.accumulate(shares)]
        self.starts = self._starts(epochs)
        if not _each_has_epochs(self.starts):
            enough = next((n for n in range(epochs + 1, 10_000) if _each_has_epochs(self._starts(n))), None)
            longer = "" if enough is None else f"set --run.epochs {enough} or more, or "
            raise UserError(
                f"run.epochs {epochs} is too short for the {count} parts of the curriculum: {longer}"
                f"leave curriculum.sizes and curriculum.magnitudes empty"
            )

    def _starts(self, epochs: int) -> list[int]:
        return [0, *(round(end * epochs) for end in self._ends)]

    @property
    def plain(self) -> bool:
        """Whether all epochs have the model's size and the policy's own magnitude."""
        return not self.magnitudes and set(self.sizes) == {self.sizes[-1]}

    def part(self, epoch: int) -> int:
        """The part that an epoch is in; the last one for all epochs after the run."""
        return next((part for part in range(self.count) if epoch < self.starts[part + 1]), self.count - 1)

    def size(self, epoch: int) -> int:
        """Side of the training images, pixels."""
        return self.sizes[self.part(epoch)]

    def magnitude(self, epoch: int) -> float | None:
        """RandAugment's magnitude; None: the policy's own."""
        return self.magnitudes[self.part(epoch)] if self.magnitudes else None

    def elapsed(self, time: float) -> float:
        """The computation done after `time` epochs, in epochs of a run without curriculum: `epochs` at the end."""
        if self.count == 1:
            return time
        part = self.part(int(time))
        first, end = self.starts[part], self.starts[part + 1]
        return self.epochs * (part + (time - first) / (end - first)) / self.count

    def work(self, epoch: int) -> float:
        """Cost of one image in this epoch, relative to an image of the model's size."""
        return (self.size(epoch) / self.sizes[-1]) ** 2

    def epochs_by_size(self) -> dict[int, int]:
        """The number of epochs that train on images of each size, in the order of the parts."""
        epochs = dict.fromkeys(self.sizes, 0)
        for size, (first, end) in zip(self.sizes, itertools.pairwise(self.starts), strict=True):
            epochs[size] += end - first
        return epochs

    def sentence(self) -> str | None:
        """What the parts train on, for the log; None if that is the same as without a curriculum."""
        if self.plain:
            return None
        spans = zip(self.sizes, itertools.pairwise(self.starts), strict=True)
        counts = [
            (size, sum(end - first for _, (first, end) in parts))
            for size, parts in itertools.groupby(spans, key=lambda span: span[0])
        ]
        images = ", ".join(f"{size} pixels in {count} epoch{'s' if count > 1 else ''}" for size, count in counts)
        magnitudes = ", ".join(f"{magnitude:g}" for magnitude in self.magnitudes)
        return (
            f"curriculum in {self.count} part{'s' if self.count > 1 else ''} of equal computation: images of {images}"
            f"{magnitudes and f'; RandAugment of magnitude {magnitudes}'}. Warm-up and learning rate follow the "
            f"computation"
        )


def _each_has_epochs(starts: list[int]) -> bool:
    return all(first < end for first, end in itertools.pairwise(starts))
