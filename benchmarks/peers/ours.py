"""Ours, put together as the trainer does: order, plan, loader, host stage and prefetcher."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.stream import Missing, Setting, Stream, need
from fastdeit.data import TrainingData
from fastdeit.distributed import World
from fastdeit.pipelines.dataset import open_dataset
from fastdeit.pipelines.loader_ffcv import find_libffcv
from fastdeit.pipelines.loader_turbo import find_turbo
from fastdeit.recipes import deit_small


def fastdeit(setting: Setting, loader: str, repeats: int) -> Stream:
    """The recipe of DeiT-S without the model."""
    _check_installed(loader)
    recipe = deit_small()
    named: Any = loader
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, loader=named, threads=setting.threads, repeats=repeats),
        run=dataclasses.replace(recipe.run, global_batch=setting.batch, epochs=sys.maxsize),
    ).resolved()
    alone = World(0, 1, 1, torch.device("cpu"))
    data = TrainingData(recipe, open_dataset(Path(setting.beton)), alone)
    remarks = (f"every image decoded once for its {repeats} copies in a batch",) if repeats > 1 else ()
    return Stream((batch.data.images for batch in data.batches()), recipe.data.prefetch, remarks)


def _check_installed(loader: str) -> None:
    if loader == "dali":
        need("nvidia.dali", "pip install 'fastdeit[dali]'")
    try:
        if loader == "ffcv":
            find_libffcv()
        elif loader == "turbo":
            find_turbo()
    except ValueError as error:
        raise Missing(str(error)) from error
