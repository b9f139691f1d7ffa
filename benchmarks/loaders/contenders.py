"""The competitors of the loader benchmark, each an endless stream of training batches in a process of its own.

Run as `python -m benchmarks.loaders.contenders '{"name": ..., ...}'` it answers on standard output,
a line of JSON for each line of standard input; see `serve`.
"""

from __future__ import annotations

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

REPEATS = (3, 1)
# Ours on the GPU besides, where there is one: what a training step would wait for.
DEVICES = {"": "cpu", "-gpu": "cuda"} if torch.cuda.is_available() else {"": "cpu"}


@dataclass(frozen=True)
class Contestant:
    """A side: what opens it, which of the files it reads, what work it does; of ours, copies of an image in a batch."""

    open: Callable[[Setting], Stream]
    reads: Literal["photos", "beton", "shards"] = "photos"
    work: str = COMPLETE
    repeats: int | None = None


def _peer(module: str, function: str) -> Callable[[Setting], Stream]:
    """The function of `benchmarks.loaders.peers.MODULE`, imported by the process that calls it only."""
    return lambda setting: getattr(importlib.import_module(f"benchmarks.loaders.peers.{module}"), function)(setting)


def _ours(loader: str, repeats: int, device: str, setting: Setting) -> Stream:
    from benchmarks.loaders.peers.ours import fastdeit

    return fastdeit(setting, loader, repeats, device)


SIDES: dict[str, Contestant] = {
    **{
        f"fastdeit-{loader}-x{repeats}{end}": Contestant(
            partial(_ours, loader, repeats, device), reads="beton", repeats=repeats
        )
        for end, device in DEVICES.items()
        for repeats in REPEATS
        for loader in LOADERS
    },
    "timm": Contestant(_peer("timm_loader", "timm")),
    "torchvision": Contestant(_peer("torchvision_loader", "torchvision")),
    "webdataset": Contestant(_peer("webdataset_loader", "webdataset"), reads="shards"),
    "spdl": Contestant(_peer("spdl_loader", "spdl")),
    "dali-plain": Contestant(_peer("dali_loader", "plain_dali")),
    "ffcv-plain": Contestant(_peer("ffcv_loader", "plain_ffcv"), reads="beton", work="decode, crop, flip only"),
}


def serve(setting: Setting) -> None:
    """Answer {"remarks"} once warm, or {"missing"}; then, for each line {"seconds", "cold"}, a window.

    A window is answered by its images per second, the images so far, and, where it was to be cold, the share of the
    stored bytes that was in the page cache nevertheless. Before a window its first batches are taken untimed: those
    that have been made ahead while nobody asked. A cold window ends with the first pass over the photographs.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print where they like
    # Before the libraries count the cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
    try:
        stream = SIDES[setting.name].open(setting)
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

    def take_ahead() -> None:
        for _ in range(stream.ahead + 1):
            take()

    take_ahead()
    stored = _stored(setting)
    photos = len(setting.files())
    taken = 0
    print(json.dumps({"remarks": stream.remarks}), file=answers)
    for line in sys.stdin:
        window = json.loads(line)
        left, most = None, None
        if window["cold"]:
            evict(stored)
            left = resident(stored)
            most = photos - (stream.ahead + 1) * setting.batch
        take_ahead()
        rate = timed_window(take, window["seconds"], stream.synchronize, most=most)
        print(json.dumps({"rate": rate, "images": taken, "resident": left}), file=answers)


def _stored(setting: Setting) -> list[Path]:
    """Every file that a side reads images from."""
    return {
        "photos": lambda: setting.files(),
        "beton": lambda: [Path(setting.beton)],
        "shards": lambda: sorted(Path(setting.scratch).glob("*.tar")),
    }[SIDES[setting.name].reads]()


if __name__ == "__main__":
    serve(Setting(**json.loads(sys.argv[1])))
    # Worker processes and compiled pipelines of the peers need not end well.
    sys.stderr.flush()
    os._exit(0)
