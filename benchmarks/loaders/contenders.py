"""The contenders of the loader benchmark: each is an endless stream of training batches in its own process.

`python -m benchmarks.loaders.contenders '{"name": ..., ...}'` runs one; it answers each line of JSON on standard input
with one on standard output, see `serve`.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from benchmarks.loaders.page_cache import evict, resident
from benchmarks.loaders.peers.stream import COMPLETE, IMG_SIZE, Missing, Setting, Stream
from benchmarks.record import timed_window
from fastdeit.pipelines.loaders.choose import LOADERS
from fastdeit.pipelines.parsing import parse_json

REPEATS = (3, 1)
# With a GPU, also our loaders up to the batch on the GPU: a training step would wait for that.
DEVICES = {"": "cpu", "-gpu": "cuda"} if torch.cuda.is_available() else {"": "cpu"}


@dataclass(frozen=True)
class Contender:
    """How to open a contender, the files it reads, the work it does, and for ours the copies of an image in a batch."""

    open: Callable[[Setting], Stream]
    reads: Literal["photos", "beton", "shards"] = "photos"
    work: str = COMPLETE
    repeats: int | None = None


def _peer(module: str, function: str) -> Callable[[Setting], Stream]:
    """A function of `benchmarks.loaders.peers.MODULE`, imported only by the process that calls it."""
    return lambda setting: getattr(importlib.import_module(f"benchmarks.loaders.peers.{module}"), function)(setting)


def _ours(loader: str, repeats: int, device: str, setting: Setting) -> Stream:
    from benchmarks.loaders.peers.ours import fastdeit

    return fastdeit(setting, loader, repeats, device)


CONTENDERS: dict[str, Contender] = {
    **{
        f"fastdeit-{loader}-x{repeats}{end}": Contender(
            partial(_ours, loader, repeats, device), reads="beton", repeats=repeats
        )
        for end, device in DEVICES.items()
        for repeats in REPEATS
        for loader in LOADERS
    },
    "timm": Contender(_peer("timm_loader", "timm")),
    "torchvision": Contender(_peer("torchvision_loader", "torchvision")),
    "webdataset": Contender(_peer("webdataset_loader", "webdataset"), reads="shards"),
    "spdl": Contender(_peer("spdl_loader", "spdl")),
    "dali-plain": Contender(_peer("dali_loader", "plain_dali")),
    "ffcv-plain": Contender(_peer("ffcv_loader", "plain_ffcv"), reads="beton", work="decode, crop, flip only"),
}


def serve(setting: Setting) -> None:
    """Answer {"remarks"} once warm, or {"missing"}; then answer each line {"seconds", "cold"} with a timed window.

    The answer has the images per second, the images so far and, for a cold window, the share of the stored bytes still
    in the page cache. Before each window the batches that were prefetched meanwhile are taken untimed. A cold window
    ends with the first pass over the photographs.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print to standard output
    # Before the libraries count the cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
    try:
        stream = CONTENDERS[setting.name].open(setting)
    except Missing as error:
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    taken = 0

    def take() -> int:
        nonlocal taken
        images = next(stream.images)
        if tuple(images.shape) != (setting.batch, 3, IMG_SIZE, IMG_SIZE):
            raise RuntimeError(f"{setting.name}: a batch has the shape {tuple(images.shape)}")
        taken += len(images)
        return len(images)

    def discard_prefetched() -> None:
        for _ in range(stream.ahead + 1):
            take()

    discard_prefetched()
    stored = _stored(setting)
    photos = len(setting.files())
    taken = 0
    print(json.dumps({"remarks": stream.remarks}), file=answers)
    for line in sys.stdin:
        window = parse_json(line)
        cached, most = None, None
        if window["cold"]:
            evict(stored)
            cached = resident(stored)
            most = photos - (stream.ahead + 1) * setting.batch
        discard_prefetched()
        rate = timed_window(take, window["seconds"], stream.synchronize, most=most)
        print(json.dumps({"rate": rate, "images": taken, "resident": cached}), file=answers)


def _stored(setting: Setting) -> list[Path]:
    """Every file that a contender reads images from."""
    return {
        "photos": lambda: setting.files(),
        "beton": lambda: [Path(setting.beton)],
        "shards": lambda: sorted(Path(setting.scratch).glob("*.tar")),
    }[CONTENDERS[setting.name].reads]()


if __name__ == "__main__":
    serve(Setting(**parse_json(sys.argv[1])))
    # Skip the clean-up: worker processes and compiled pipelines of the peers may not end cleanly.
    sys.stderr.flush()
    os._exit(0)
