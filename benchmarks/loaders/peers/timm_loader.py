"""timm's `create_loader` with the recipe, as its train script calls it on a CPU."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset, Mixup, auto_augment, create_loader, create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder

from benchmarks.loaders.peers.stream import CLASSES, IMG_SIZE, Setting, Stream, endless

AUGMENTATION = {
    "is_training": True,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "interpolation": "bicubic",
    "re_prob": 0.25,
    "re_mode": "pixel",
}
POSTERIZE_REMARK = "timm's posterize patched to return a black image for 0 bits, which Pillow 13 raises on"


def timm(setting: Setting) -> Stream:
    """Decoding and augmentation in worker processes, Mixup and CutMix in the consumer."""
    patch_posterize()
    reader = ReaderImageFolder(setting.photos)
    reader.samples = list(reader.samples) * setting.passes
    loader = create_loader(
        ImageDataset(setting.photos, reader=reader),
        input_size=(3, IMG_SIZE, IMG_SIZE),
        batch_size=setting.batch,
        num_workers=setting.threads,
        persistent_workers=True,
        use_prefetcher=False,
        **AUGMENTATION,
    )
    return Stream(mixed(endless(loader)), 2 * setting.threads, (POSTERIZE_REMARK,))


def transform() -> Any:
    """The recipe for one PIL image, without mixing: timm's training transforms, (3, 224, 224) float."""
    patch_posterize()
    return create_transform(IMG_SIZE, **AUGMENTATION)


def mixed(batches: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The images of (images, labels) batches after timm's Mixup and CutMix."""
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    return (mixup(images, labels)[0] for images, labels in batches)


def patch_posterize() -> None:
    """At the recipe's magnitudes timm asks Pillow for 0 bits, which recent versions of Pillow refuse."""
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's operation as it was when the recipe was published: keeping 0 bits gives black."""
    if bits_to_keep >= 8:
        return image
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits_to_keep)
