"""torchvision: `decode_jpeg` and transforms v2 on tensors, in a DataLoader's worker processes."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2

from benchmarks.loaders.peers.stream import CLASSES, IMG_SIZE, MEAN, STD, Setting, Stream, endless

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
OPERATIONS_REMARK = "torchvision's own RandAugment: 14 operations, magnitude 9 of 31 without deviation"


class Photos(Dataset[tuple[torch.Tensor, int]]):
    """JPEG files as augmented float tensors, with the number of their folder."""

    def __init__(self, files: list[Path]) -> None:
        folders = sorted({path.parent for path in files})
        self.samples = [(str(path), folders.index(path.parent)) for path in files]
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(
                    IMG_SIZE, CROP_SCALE, CROP_RATIO, interpolation=InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(),
                after_crop(),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(decode_jpeg(read_file(path), mode=ImageReadMode.RGB)), label


def after_crop() -> v2.Transform:
    """The recipe from a flipped crop, (3, 224, 224) uint8, to a normalised float image."""
    fill: Any = [round(255 * mean) for mean in MEAN]
    # One operation with probability 1/2, twice: the recipe's RandAugment skips each with probability 1/2.
    operation = v2.RandomApply([v2.RandAugment(num_ops=1, magnitude=9, fill=fill)], p=0.5)
    return v2.Compose(
        [
            operation,
            operation,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(p=0.25, scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value="random"),  # type: ignore
        ]
    )


def mixed(batches: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The images of (images, labels) batches after v2's MixUp or CutMix, either with probability 1/2."""
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=CLASSES), v2.CutMix(alpha=1.0, num_classes=CLASSES)])
    return (mix(images, labels)[0] for images, labels in batches)


def torchvision(setting: Setting) -> Stream:
    """Decoding and augmentation in worker processes, MixUp and CutMix in the consumer."""
    loader = DataLoader(
        Photos(setting.files()),
        batch_size=setting.batch,
        shuffle=True,
        drop_last=True,
        num_workers=setting.threads,
        persistent_workers=True,
    )
    return Stream(mixed(endless(loader)), 2 * setting.threads, (OPERATIONS_REMARK,))
