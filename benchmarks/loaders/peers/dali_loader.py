"""Plain DALI: its own reader, decoder and automatic augmentations; on the GPU if there is one."""

import importlib
from typing import Any

import torch

from benchmarks.loaders.peers.stream import IMG_SIZE, MEAN, STD, Setting, Stream, endless, need
from benchmarks.loaders.peers.timm_loader import mixed

_QUEUE = 2  # batches DALI prepares ahead, its default


def plain_dali(setting: Setting) -> Stream:
    """The recipe in one pipeline; timm's Mixup in the consumer."""
    need("nvidia.dali", "pip install 'fastdeit[dali]'")
    # Bound as Any: DALI rewrites the function below, and no type checker understands its conditions.
    dali: Any = importlib.import_module("nvidia.dali")
    rand_augment: Any = importlib.import_module("nvidia.dali.auto_aug.rand_augment").rand_augment
    plugin: Any = importlib.import_module("nvidia.dali.plugin.pytorch")
    fn, math, types = dali.fn, dali.math, dali.types
    gpu = torch.cuda.is_available()

    @dali.pipeline_def(enable_conditionals=True)
    def recipe() -> Any:
        files = [str(path) for path in setting.files()]
        folders = sorted({file.rpartition("/")[0] for file in files})
        labels = [folders.index(file.rpartition("/")[0]) for file in files]
        jpegs, label = fn.readers.file(files=files, labels=labels, random_shuffle=True, name="photos")
        image = fn.decoders.image_random_crop(
            jpegs,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        image = fn.resize(image, size=(IMG_SIZE, IMG_SIZE), interp_type=types.INTERP_CUBIC, antialias=True)
        # One operation with probability 1/2, twice: the recipe's RandAugment skips each with probability 1/2.
        if fn.random.coin_flip(dtype=types.BOOL):
            image = rand_augment(image, n=1, m=9)
        if fn.random.coin_flip(dtype=types.BOOL):
            image = rand_augment(image, n=1, m=9)
        image = fn.crop_mirror_normalize(
            image,
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            mirror=fn.random.coin_flip(),
            output_layout="CHW",
        )
        if fn.random.coin_flip(dtype=types.BOOL, probability=0.25):
            area = fn.random.uniform(range=[0.02, 1 / 3])
            ratio = fn.random.uniform(range=[0.3, 3.3])
            shape = fn.stack(math.sqrt(area * ratio), math.sqrt(area / ratio))
            image = fn.erase(
                image,
                anchor=fn.random.uniform(range=[0.0, 1.0], shape=2) * (1.0 - shape),
                shape=shape,
                axis_names="HW",
                normalized=True,
            )
        return image, label

    pipeline = recipe(batch_size=setting.batch, num_threads=setting.threads, device_id=0 if gpu else None)
    iterator = plugin.DALIGenericIterator([pipeline], ["images", "labels"], reader_name="photos", auto_reset=True)
    batches = ((batch[0]["images"], batch[0]["labels"].flatten()) for batch in endless(iterator))
    remarks = (
        "DALI's own RandAugment: 15 operations, magnitude 9 of 31 without deviation; erased boxes are filled with the "
        "mean, not with noise",
    )
    if gpu:
        remarks += ("decoded and augmented on the GPU, where the batches stay",)
    return Stream(mixed(batches), _QUEUE + 1, remarks, torch.cuda.synchronize if gpu else None)
