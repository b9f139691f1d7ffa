"""Which loader decodes a run's images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from fastdeit.pipelines.dataset import Dataset
from fastdeit.pipelines.loader_ffcv import FfcvLoader, find_libffcv
from fastdeit.pipelines.loader_torch import TorchLoader
from fastdeit.pipelines.loader_turbo import TurboLoader
from fastdeit.pipelines.order import Order
from fastdeit.pipelines.threaded import OnError, Regions, ThreadedLoader

LOADERS = {loader.name: loader for loader in (TurboLoader, FfcvLoader, TorchLoader)}


def open_loader(
    name: Literal["auto", "turbo", "ffcv", "torch"],
    dataset: Dataset,
    order: Order,
    *,
    pool: ThreadPoolExecutor,
    threads: int,
    regions: Regions | None = None,
    on_error: OnError = "fail",
) -> ThreadedLoader:
    """The loader of that name; `auto` is ffcv where its library can be loaded, else torch, and `reason` says so.

    `regions` and `on_error` are those of `ThreadedLoader`. Raises ValueError for another name, and where what a loader
    needs is not installed, saying what to install.
    """
    options: dict[str, Any] = {"pool": pool, "threads": threads, "regions": regions, "on_error": on_error}
    if name in LOADERS:
        return LOADERS[name](dataset, order, **options)
    if name != "auto":
        raise ValueError(f"loader '{name}' is not one of auto, {', '.join(LOADERS)}")
    try:
        library = find_libffcv()
    except ValueError as error:
        return TorchLoader(dataset, order, **options, reason=f"PIL decodes, since {error}")
    return FfcvLoader(dataset, order, **options, reason=f"libffcv decodes ({library})")
