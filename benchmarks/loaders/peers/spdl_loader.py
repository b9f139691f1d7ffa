"""SPDL: FFmpeg decodes, crops, scales and flips in a pipeline's threads; torchvision v2 does the rest there."""

import random
from collections.abc import Iterator

import torch

from benchmarks.loaders.peers.stream import IMG_SIZE, Missing, Setting, Stream, need
from benchmarks.loaders.peers.torchvision_loader import CROP_RATIO, CROP_SCALE, OPERATIONS_REMARK, after_crop, mixed

_BUFFER = 3  # batches in the sink, SPDL's default


def spdl(setting: Setting) -> Stream:
    """Threads of one process, as SPDL intends; MixUp and CutMix in the consumer."""
    need("spdl", "pip install 'fastdeit[peers]'")
    import spdl.io
    from spdl.pipeline import PipelineBuilder
    from torchvision.transforms import v2

    try:
        spdl.io.demux_config()
    except RuntimeError as error:
        raise Missing("SPDL finds no FFmpeg libraries: apt-get install ffmpeg") from error

    files = setting.files()
    folders = sorted({path.parent for path in files})
    samples = [(str(path), folders.index(path.parent)) for path in files]
    rest = after_crop()
    # The pipeline's threads already run in parallel; each would start its own team of torch threads.
    torch.set_num_threads(1)

    def shuffled() -> Iterator[tuple[str, int]]:
        while True:
            yield from random.sample(samples, len(samples))

    def load(sample: tuple[str, int]) -> tuple[torch.Tensor, int]:
        path, label = sample
        packets = spdl.io.demux_image(path)
        size = torch.empty(0, packets.height, packets.width)
        top, left, height, width = v2.RandomResizedCrop.get_params(size, list(CROP_SCALE), list(CROP_RATIO))
        filters = [f"crop={width}:{height}:{left}:{top}:exact=1", f"scale={IMG_SIZE}:{IMG_SIZE}:flags=bicubic"]
        filters += ["hflip"] * (random.random() < 0.5) + ["format=pix_fmts=rgb24"]
        frames = spdl.io.decode_packets(packets, filter_desc=",".join(filters))
        pixels = spdl.io.to_torch(spdl.io.convert_frames(frames))
        return rest(pixels.permute(2, 0, 1)), label

    def collate(loaded: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*loaded, strict=True)
        return torch.stack(images), torch.tensor(labels)

    pipeline = (
        PipelineBuilder()
        .add_source(shuffled())
        .pipe(load, concurrency=setting.threads)
        .aggregate(setting.batch)
        .pipe(collate)
        .add_sink(_BUFFER)
        .build(num_threads=setting.threads, max_failures=0)
    )

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with pipeline.auto_stop():
            yield from pipeline

    remark = "FFmpeg scales bicubically in its own way and from YCbCr"
    return Stream(mixed(batches()), _BUFFER + 2, (OPERATIONS_REMARK, remark))
