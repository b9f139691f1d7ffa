"""Which loader decodes a run's images: the one asked for, or the fastest of those with Pillow's pixels."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fastdeit.pipelines.errors import UserError, fact
from fastdeit.pipelines.formats.beton_layout import BetonError
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.formats.shard_layout import ShardError
from fastdeit.pipelines.loaders.base import DecodeError, OnError, Regions, ThreadedLoader, first_appearances
from fastdeit.pipelines.loaders.dali import DaliLoader, find_dali
from fastdeit.pipelines.loaders.libffcv import FfcvLoader, find_libffcv
from fastdeit.pipelines.loaders.pillow import TorchLoader
from fastdeit.pipelines.loaders.turbo import TurboLoader, find_turbo
from fastdeit.pipelines.machine import MachineError
from fastdeit.pipelines.plan.order import Order, StepSamples

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
    name: Literal["auto", "turbo", "ffcv", "dali", "torch"],
    dataset: Dataset,
    order: Order,
    *,
    pool: ThreadPoolExecutor,
    threads: int,
    regions: Regions | None = None,
    on_error: OnError = "fail",
    pinned: bool = False,
    device_id: int | None = None,
    hw_decoder_load: float = 0.65,
    on_device: bool = False,
    reason: str = "as asked for",
) -> ThreadedLoader:
    """The loader of that name; `auto` is the one that `choose_loader` says, and `reason` what it says.

    `regions`, `on_error` and `pinned` are those of `ThreadedLoader`; `device_id`, `hw_decoder_load` and `on_device` of
    `DaliLoader`. Raises UserError for another name, and where what a loader needs is not installed, saying what to
    install.
    """
    options: dict[str, Any] = {
        "pool": pool, "threads": threads, "regions": regions, "on_error": on_error, "pinned": pinned
    }  # fmt: skip
    gpu: dict[str, Any] = {"device_id": device_id, "hw_decoder_load": hw_decoder_load, "on_device": on_device}
    if name == "auto":
        chosen, reason = choose_loader(dataset, order, **options, **gpu)
    elif name in LOADERS:
        chosen = name
    else:
        raise UserError(f"loader '{name}' is not one of auto, {', '.join(LOADERS)}")
    return LOADERS[chosen](dataset, order, **options, **(gpu if chosen == "dali" else {}), reason=reason)


def choose_loader(
    dataset: Dataset,
    order: Order,
    *,
    device_id: int | None = None,
    hw_decoder_load: float = 0.65,
    on_device: bool = False,
    pixels: tuple[str, str] | None = None,
    **options: Any,
) -> tuple[str, str]:
    """Name of the fastest loader that can be used here, and one sentence: why it is that.

    `options` are the other ones of `open_loader`, without the reason. Only loaders with equal pixels compete, so the
    outcome changes no result: Pillow's pixels, or `pixels` and a phrase for what has them (a checkpoint, stored
    labels). Where several of `FAST` fit and are installed, they decode the first JPEGs of the order, as much of them as
    the first step needs, by turns and for about two seconds, after a round that does not count. An order is a function
    of its numbers, so that training sees nothing of this. Without any of them it is torch.

    Raises UserError where no loader here decodes the `pixels` that are asked for.
    """
    gpu: dict[str, Any] = {"device_id": device_id, "hw_decoder_load": hw_decoder_load, "on_device": on_device}
    wanted, whose = pixels or ("pillow", None)
    fitting = {name: find for name, find in FAST.items() if pixels_of(name, device_id) == wanted}
    chosen, reason = _fastest(dataset, order, fitting, gpu, options)
    if pixels_of(chosen, device_id) != wanted:
        raise UserError(
            f"no loader here decodes the pixels of {whose}, which are {wanted}'s ({reason}): "
            f"use a machine that has one, or choose another with --data.loader"
        )
    return chosen, reason if whose is None else f"{reason} (among those with the pixels of {whose}: {wanted})"


def _fastest(
    dataset: Dataset, order: Order, fast: dict[str, Any], gpu: dict[str, Any], options: dict[str, Any]
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
    few = _first_images(dataset, order, options["threads"])
    if few is None:
        return there[0], "the first images are stored raw, which every loader copies alike"
    if options.get("regions") is not None:
        crops = options["regions"](0, 0, order.step(0, 0))[few.kept]
        options["regions"] = lambda *_: crops
    failed: list[str] = []
    with ExitStack() as stack:
        loaders: dict[str, ThreadedLoader] = {}
        for name in there:
            try:
                loader = LOADERS[name](dataset, few, **options, **(gpu if name == "dali" else {}))
                stack.enter_context(loader)
                next(loader.batches(0))  # loads libraries, reads the files, takes memory
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
        rates = _rates(loaders)
    best = max(rates, key=lambda name: rates[name])
    first = next(iter(rates))
    chosen = best if rates[best] > MARGIN * rates[first] else first
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    return chosen, f"images/s measured: {measured}: {chosen}{''.join(failed)}"


@dataclass(frozen=True)
class _Few:
    """An order of one step: those `samples` of another's first step that `kept` (B,) marks."""

    samples: StepSamples
    kept: np.ndarray
    steps: int = 1

    def step(self, epoch: int, step: int) -> StepSamples:
        return self.samples


def _first_images(dataset: Dataset, order: Order, threads: int) -> _Few | None:
    """The first JPEGs of an order, of `PIXELS` for each thread at most, with all their copies; None: there is none."""
    if order.steps == 0:
        return None
    samples = order.step(0, 0)
    images, _ = first_appearances(samples.index)
    images = images[[dataset.is_jpeg(index) for index in images.tolist()]]
    pixels = np.cumsum(dataset.height[images].astype(np.int64) * dataset.width[images])
    images = images[: max(1, int(np.searchsorted(pixels, PIXELS * threads, side="right")))]
    kept = np.isin(samples.index, images)
    if not kept.any():
        return None
    fields = {name: getattr(samples, name)[kept] for name in ("index", "repeat", "position", "group")}
    return _Few(replace(samples, **fields), kept)


def _rates(loaders: dict[str, ThreadedLoader]) -> dict[str, float]:
    """Images per second of every loader in its best round."""
    seconds = dict.fromkeys(loaders, float("inf"))
    images = 0
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        for name, loader in loaders.items():
            start = time.perf_counter()
            images = len(next(loader.batches(0)).offset)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return {name: images / spent for name, spent in seconds.items()}
