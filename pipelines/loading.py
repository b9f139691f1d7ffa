"""Which loader decodes a run's images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from fastdeit.pipelines.dataset import Dataset
from fastdeit.pipelines.loader_ffcv import FfcvLoader, find_libffcv
from fastdeit.pipelines.loader_torch import TorchLoader
from fastdeit.pipelines.order import Order
from fastdeit.pipelines.threaded import ThreadedLoader


def open_loader(
    name: Literal["auto", "ffcv", "torch"],
    dataset: Dataset,
    order: Order,
    *,
    pool: ThreadPoolExecutor,
    threads: int,
) -> ThreadedLoader:
    """The loader of that name; `auto` is ffcv where its library can be loaded, else torch, and `reason` says so.

    Raises ValueError for another name, and for ffcv where it is not installed, saying what to install.
    """
    if name == "torch":
        return TorchLoader(dataset, order, pool=pool, threads=threads)
    if name == "ffcv":
        return FfcvLoader(dataset, order, pool=pool, threads=threads)
    if name != "auto":
        raise ValueError(f"loader '{name}' is not one of auto, ffcv, torch")
    try:
        library = find_libffcv()
    except ValueError as error:
        return TorchLoader(dataset, order, pool=pool, threads=threads, reason=f"PIL decodes, since {error}")
    return FfcvLoader(dataset, order, pool=pool, threads=threads, reason=f"libffcv decodes ({library})")
