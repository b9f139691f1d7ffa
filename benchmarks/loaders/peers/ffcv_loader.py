"""Plain FFCV: its own loader and decoder on the same beton file."""

from pathlib import Path

from benchmarks.loaders.peers.stream import IMG_SIZE, Setting, Stream, endless, need
from fastdeit.pipelines.formats.dataset import open_dataset

_AHEAD = 3


def plain_ffcv(setting: Setting) -> Stream:
    """Decoding, random resized crop and flip: FFCV has no RandAugment of its own."""
    need("ffcv", "pip install 'fastdeit[ffcv]'")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    loader = Loader(
        setting.beton,
        batch_size=setting.batch,
        num_workers=setting.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        batches_ahead=_AHEAD,
        indices=list(range(len(open_dataset(Path(setting.beton))))) * setting.passes,
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
    remarks = ("no RandAugment, no erasing, no mixing, no normalisation; area interpolation in place of bicubic",)
    return Stream((images for images, _ in endless(loader)), _AHEAD, remarks)
