"""The competitors of the loader benchmark, each an endless stream of training batches in a process of its own.

Run as `python -m benchmarks.loader_sides '{"name": ..., ...}'` it answers on standard output, a line of JSON for each
line of standard input; see `serve`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image, ImageOps

from benchmarks.record import timed_window

IMG_SIZE = 224
_PASSES = 100  # over the photographs that make an epoch of a peer, so that few windows hold an epoch's end
_AHEAD = 2  # batches that ours prepares ahead, as in a training run


@dataclass(frozen=True)
class Setting:
    """What a side is run with.

    name     of `SIDES`
    photos   ImageFolder tree of JPEG files
    beton    the same files converted
    """

    name: str
    photos: str
    beton: str
    batch: int
    threads: int


@dataclass(frozen=True)
class Stream:
    """An endless stream of batches.

    images   (batch, 3, 224, 224) float tensors
    ahead    batches that may be ready, or nearly, when nobody has asked for a while
    remarks  what a reader of the figure should know
    """

    images: Iterator[torch.Tensor]
    ahead: int
    remarks: tuple[str, ...] = ()


def fastdeit(setting: Setting, loader: Literal["ffcv", "torch"], repeats: int) -> Stream:
    """Ours, put together as the trainer does: loader, plan, host stage and prefetcher; the complete recipe."""
    from fastdeit.config import IMAGENET_MEAN, IMAGENET_STD
    from fastdeit.pipelines.beton import BetonDataset
    from fastdeit.pipelines.draw import PlanDrawer, Policy
    from fastdeit.pipelines.host.stage import HostStage
    from fastdeit.pipelines.loading import open_loader
    from fastdeit.pipelines.order import EpochOrder
    from fastdeit.pipelines.pool import Prefetcher, make_pool

    dataset = BetonDataset(setting.beton)
    pool = make_pool(setting.threads)
    order = EpochOrder(len(dataset), global_batch=setting.batch, repeats=repeats)
    drawer = PlanDrawer(Policy(img_size=IMG_SIZE), 0, dataset.height, dataset.width)
    opened = open_loader(loader, dataset, order, pool=pool, threads=setting.threads)
    stage = HostStage(IMG_SIZE, IMAGENET_MEAN, IMAGENET_STD, pool=pool, threads=setting.threads)

    def produce() -> Iterator[torch.Tensor]:
        for epoch in itertools.count():
            for decoded in opened.batches(epoch):
                plan = drawer.draw(epoch, decoded.step, order.step(epoch, decoded.step))
                yield stage(decoded, plan).images

    remarks = (f"every image decoded once for its {repeats} copies in a batch",) if repeats > 1 else ()
    return Stream(Prefetcher(produce(), _AHEAD), _AHEAD, remarks)


def timm(setting: Setting) -> Stream:
    """timm's `create_loader` with the recipe, as its train script calls it on a CPU; Mixup follows in the consumer."""
    from timm.data import ImageDataset, Mixup, auto_augment, create_loader
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    # With the recipe's own magnitudes timm asks Pillow for 0 bits, which Pillow refuses in recent versions.
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize
    reader = ReaderImageFolder(setting.photos)
    reader.samples = list(reader.samples) * _PASSES
    loader = create_loader(
        ImageDataset(setting.photos, reader=reader),
        input_size=(3, IMG_SIZE, IMG_SIZE),
        batch_size=setting.batch,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        num_workers=setting.threads,
        persistent_workers=True,
        use_prefetcher=False,
    )
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    remark = "timm's posterize patched to return a black image for 0 bits, which Pillow 13 raises on"
    return Stream((mixup(images, target)[0] for images, target in _endless(loader)), 2 * setting.threads, (remark,))


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's operation as it was when the recipe was published: no bits kept is black."""
    if bits_to_keep >= 8:
        return image
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits_to_keep)


def plain_ffcv(setting: Setting) -> Stream:
    """FFCV's own loader: decoding, random resized crop and flip only."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    from fastdeit.pipelines.beton import BetonDataset

    ahead = 3
    loader = Loader(
        setting.beton,
        batch_size=setting.batch,
        num_workers=setting.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        batches_ahead=ahead,
        indices=list(range(len(BetonDataset(setting.beton)))) * _PASSES,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((IMG_SIZE, IMG_SIZE)),
                RandomHorizontalFlip(),
                ToTensor(),
                ToTorchImage(),
            ],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    remark = "decoding, random resized crop and flip only: no RandAugment, no erasing, no Mixup, no normalisation"
    return Stream((images for images, _ in _endless(loader)), ahead, (remark,))


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


SIDES: dict[str, Callable[[Setting], Stream]] = {
    "fastdeit-ffcv-x3": lambda s: fastdeit(s, "ffcv", 3),
    "fastdeit-torch-x3": lambda s: fastdeit(s, "torch", 3),
    "fastdeit-ffcv-x1": lambda s: fastdeit(s, "ffcv", 1),
    "fastdeit-torch-x1": lambda s: fastdeit(s, "torch", 1),
    "timm": timm,
    "ffcv-plain": plain_ffcv,
}


def serve(setting: Setting) -> None:
    """Answer {"remarks"} once warm; then, for each line {"seconds"}, images per second of one window and images so far.

    Before a window its first batches are taken untimed: those that have been made ahead while nobody asked.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print where they like
    stream = SIDES[setting.name](setting)
    taken = 0

    def take() -> int:
        nonlocal taken
        images = next(stream.images)
        if tuple(images.shape) != (setting.batch, 3, IMG_SIZE, IMG_SIZE):
            raise RuntimeError(f"{setting.name}: a batch has the shape {tuple(images.shape)}")
        taken += len(images)
        return len(images)

    def take_ahead() -> None:
        for _ in range(stream.ahead + 1):
            take()

    take_ahead()
    taken = 0
    print(json.dumps({"remarks": stream.remarks}), file=answers)
    for line in sys.stdin:
        take_ahead()
        rate = timed_window(take, json.loads(line)["seconds"])
        print(json.dumps({"rate": rate, "images": taken}), file=answers)


if __name__ == "__main__":
    serve(Setting(**json.loads(sys.argv[1])))
    # Worker processes and compiled pipelines of the peers need not end well.
    sys.stderr.flush()
    os._exit(0)
