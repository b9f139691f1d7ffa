"""Which loader decodes a run's images: the one asked for, or the fastest of those with Pillow's pixels."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from fastdeit.pipelines.errors import UserError, fact
from fastdeit.pipelines.formats.beton_layout import BetonError
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.formats.shard_layout import ShardError
from fastdeit.pipelines.loaders.base import DecodeError, OnError, ThreadedLoader, first_appearances
from fastdeit.pipelines.loaders.dali import DaliLoader, find_dali
from fastdeit.pipelines.loaders.libffcv import FfcvLoader, find_libffcv
from fastdeit.pipelines.loaders.pillow import TorchLoader
from fastdeit.pipelines.loaders.turbo import TurboLoader, find_turbo
from fastdeit.pipelines.machine import MachineError
from fastdeit.pipelines.plan.order import StepSamples

LOADERS: dict[str, Any] = {loader.name: loader for loader in (TurboLoader, FfcvLoader, DaliLoader, TorchLoader)}
# What `auto` may choose from, the first where it makes no difference. Each raises UserError where it is missing.
FAST = {"turbo": find_turbo, "ffcv": find_libffcv, "dali": find_dali}

MARGIN = 1.05  # one after the first must be this much faster: less is chance
SECONDS = 2.0  # of timing
ROUNDS = 5
PIXELS = 6_000_000  # that are timed at a time, for each thread: 32 photographs of ImageNet's usual size


def pixels_of(name: str, device_id: int | None = None) -> str:
    """Whose pixels the loader `name` decodes, with a GPU where it is given one: see `ThreadedLoader.pixels`.

    Also of `dali-mixed`, the name that dali has on a GPU. A name that is no loader's is its own pixels' name.
    """
    if name == "dali-mixed" or (name == "dali" and device_id is not None):
        return "nvjpeg"
    return LOADERS[name].pixels if name in LOADERS else name


def open_loader(
    name: str,
    dataset: Dataset,
    *,
    pool: ThreadPoolExecutor,
    threads: int,
    on_error: OnError = "fail",
    pinned: bool = False,
    device_id: int | None = None,
    hw_decoder_load: float = 0.65,
    on_device: bool = False,
    reason: str = "as asked for",
) -> ThreadedLoader:
    """The loader of that name.

    `on_error`, `pinned` and `reason` are those of `ThreadedLoader`; `device_id`, `hw_decoder_load` and `on_device` of
    `DaliLoader`. Raises UserError for another name, and where something that a loader needs is not installed, with
    what to install.
    """
    if name not in LOADERS:
        raise UserError(f"loader '{name}' is not one of auto, {', '.join(LOADERS)}")
    options: dict[str, Any] = {"pool": pool, "threads": threads, "on_error": on_error, "pinned": pinned}
    if name == "dali":
        options |= {"device_id": device_id, "hw_decoder_load": hw_decoder_load, "on_device": on_device}
    return LOADERS[name](dataset, **options, reason=reason)


def choose_loader(
    dataset: Dataset,
    first: StepSamples | None,
    regions: np.ndarray | None = None,
    *,
    pixels: tuple[str, str] | None = None,
    **options: Any,
) -> tuple[str, str]:
    """Name of the fastest loader that can be used here, and one sentence that says why.

    `first` are the samples of the first step, None where there is none, and `regions` what each needs of its image;
    `options` are those of `open_loader` without the reason. Only loaders with equal pixels compete, so the outcome
    changes no result: Pillow's pixels, or `pixels` and a phrase for what has them (a checkpoint, stored labels). Where
    several of `FAST` fit and are installed, they decode the first JPEGs of the step, only as far as the step needs
    them, by turns and for about two seconds, after a round that does not count. Without any of them it is torch.

    Raises UserError where no loader here decodes the `pixels` that are asked for.
    """
    wanted, whose = pixels or ("pillow", None)
    device_id = options.get("device_id")
    fitting = {name: find for name, find in FAST.items() if pixels_of(name, device_id) == wanted}
    chosen, reason = _fastest(dataset, first, regions, fitting, options)
    if pixels_of(chosen, device_id) != wanted:
        raise UserError(
            f"no loader here decodes the pixels of {whose}, which are {wanted}'s ({reason}): "
            f"use a machine that has one, or choose another with --data.loader"
        )
    return chosen, reason if whose is None else f"{reason} (among those with the pixels of {whose}: {wanted})"


def _fastest(
    dataset: Dataset,
    first: StepSamples | None,
    regions: np.ndarray | None,
    fast: dict[str, Any],
    options: dict[str, Any],
) -> tuple[str, str]:
    """As `choose_loader`, of the loaders `fast`."""
    missing: list[str] = []
    there: list[str] = []
    for name, find in fast.items():
        try:
            find()
            there.append(name)
        except UserError as error:
            missing.append(str(error))
    if not there:
        return "torch", f"PIL decodes, since {'; '.join(missing) or 'no other can do so here'}"
    if len(there) == 1:
        return there[0], f"the only one of {', '.join(fast)} that is installed"
    if first is None:
        return there[0], "there are no images to compare them with"
    kept = _first_images(dataset, first, options["threads"])
    if not kept.any():
        return there[0], "the first images are stored raw, which every loader copies alike"
    few = _part(first, kept)
    crops = None if regions is None else regions[kept]
    failed: list[str] = []
    with ExitStack() as stack:
        loaders: dict[str, ThreadedLoader] = {}
        for name in there:
            try:
                loader = stack.enter_context(open_loader(name, dataset, **options))
                loader.decode(few, crops)  # loads libraries, reads the files, takes memory
            except (MachineError, BetonError, ShardError):
                raise  # whatever decodes, the data cannot be read
            except DecodeError as error:
                return there[0], f"not timed, since an image does not decode ({error})"
            except Exception as error:  # one that does not work here must not end a run that others can do
                failed.append(f"; not {name}: {fact(error)}")
            else:
                loaders[name] = loader
        if not loaders:
            return "torch", f"PIL decodes, since no other does{''.join(failed)}"
        rates = _rates(loaders, few, crops)
    best = max(rates, key=lambda name: rates[name])
    preferred = next(iter(rates))
    chosen = best if rates[best] > MARGIN * rates[preferred] else preferred
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    return chosen, f"images/s measured: {measured}: {chosen}{''.join(failed)}"


def _first_images(dataset: Dataset, first: StepSamples, threads: int) -> np.ndarray:
    """(B,) which samples are of the first JPEGs: of `PIXELS` for each thread at most, with all their copies."""
    images, _ = first_appearances(first.index)
    images = images[[dataset.is_jpeg(index) for index in images.tolist()]]
    pixels = np.cumsum(dataset.height[images].astype(np.int64) * dataset.width[images])
    images = images[: max(1, int(np.searchsorted(pixels, PIXELS * threads, side="right")))]
    return np.isin(first.index, images)


def _part(samples: StepSamples, kept: np.ndarray) -> StepSamples:
    fields = {name: getattr(samples, name)[kept] for name in ("index", "repeat", "position", "group")}
    return replace(samples, **fields)


def _rates(loaders: dict[str, ThreadedLoader], samples: StepSamples, regions: np.ndarray | None) -> dict[str, float]:
    """Images per second of every loader in its best round."""
    seconds = dict.fromkeys(loaders, float("inf"))
    images = 0
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        for name, loader in loaders.items():
            start = time.perf_counter()
            images = len(loader.decode(samples, regions).offset)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return {name: images / spent for name, spent in seconds.items()}
