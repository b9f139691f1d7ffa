"""Ours, put together as the trainer does: order, plan, loader, stage and prefetcher."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.loaders.peers.stream import Missing, Setting, Stream, need
from fastdeit.data import TrainingData
from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.loaders.libffcv import find_libffcv
from fastdeit.pipelines.loaders.turbo import find_turbo
from fastdeit.recipes import deit_small


def fastdeit(setting: Setting, loader: str, repeats: int, device: str = "cpu") -> Stream:
    """The recipe of DeiT-S without the model; on a GPU up to where a batch lies there, in the student's bf16."""
    _check_installed(loader)
    recipe = deit_small()
    named: Any = loader
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, loader=named, threads=setting.threads, repeats=repeats),
        run=dataclasses.replace(recipe.run, global_batch=setting.batch, epochs=sys.maxsize),
    ).resolved()
    on_gpu = device == "cuda"
    alone = World(0, 1, 1, torch.device("cuda", 0) if on_gpu else torch.device(device))
    dtype = torch.bfloat16 if on_gpu else torch.float32
    data = TrainingData(recipe, open_dataset(Path(setting.beton)), alone, dtype)
    remarks = (f"every image decoded once for its {repeats} copies in a batch",) if repeats > 1 else ()
    if on_gpu:
        remarks += (f"bf16 on the GPU, made on the {data.stage.name} ({data.stage.reason})",)
    images = (batch.data.images for batch in data.batches())
    return Stream(images, recipe.data.prefetch, remarks, torch.cuda.synchronize if on_gpu else None)


def _check_installed(loader: str) -> None:
    if loader == "dali":
        need("nvidia.dali", "pip install 'fastdeit[dali]'")
    try:
        if loader == "ffcv":
            find_libffcv()
        elif loader == "turbo":
            find_turbo()
    except UserError as error:
        raise Missing(str(error)) from error
