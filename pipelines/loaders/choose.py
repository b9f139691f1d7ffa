"""Opens a loader by name, or benchmarks the ones with equal pixels and names the fastest."""

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
# What `auto` chooses from, in order of preference. Each function raises UserError if its library is missing.
FAST = {"turbo": find_turbo, "ffcv": find_libffcv, "dali": find_dali}

MARGIN = 1.05  # how much faster another loader must be to beat the preferred one: less is noise
SECONDS = 2.0  # time to spend on the benchmark
ROUNDS = 5
PIXELS = 6_000_000  # decoded per thread and round: 32 photographs of ImageNet's usual size


def pixels_of(name: str, device_id: int | None = None) -> str:
    """`ThreadedLoader.pixels` of the loader `name`; `device_id` is the GPU that it decodes on, if any.

    `dali-mixed` is dali's name on a GPU. An unknown name is returned as it is.
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
    images: np.ndarray | None = None,
    pinned: bool = False,
    device_id: int | None = None,
    hw_decoder_load: float = 0.65,
    on_device: bool = False,
    reason: str = "as requested",
) -> ThreadedLoader:
    """Open the loader `name`.

    `ThreadedLoader` explains `on_error`, `images`, `pinned` and `reason`; `DaliLoader` explains `device_id`,
    `hw_decoder_load` and `on_device`. Raises UserError for an unknown name, or if the loader's library is missing, with
    what to install.
    """
    if name not in LOADERS:
        raise UserError(f"loader '{name}' is not one of auto, {', '.join(LOADERS)}")
    options: dict[str, Any] = {
        "pool": pool,
        "threads": threads,
        "on_error": on_error,
        "images": images,
        "pinned": pinned,
    }
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
    """Name of the fastest loader that works here, and one sentence that says why.

    first    samples of the first step; None if the order has no steps
    regions  (B, 4) int32: the part of its image that each sample needs
    pixels   the pixels that the loader must decode (`ThreadedLoader.pixels`), and a phrase for
             what was made with them, such as "the checkpoint ...". None: Pillow's
    options  those of `open_loader`, without the reason

    Only loaders with equal pixels compete, so the choice changes no result. If several of `FAST` are installed, they
    take turns to decode the needed regions of the step's first JPEGs, for about two seconds after a warm-up round. If
    none is installed, the choice is torch.

    Raises UserError if no loader here decodes `pixels`.
    """
    wanted, required_by = pixels or ("pillow", None)
    device_id = options.get("device_id")
    fitting = {name: find for name, find in FAST.items() if pixels_of(name, device_id) == wanted}
    chosen, reason = _fastest(dataset, first, regions, fitting, options)
    if pixels_of(chosen, device_id) != wanted:
        raise UserError(
            f"no loader here decodes {wanted} pixels ({reason}), as used for {required_by}: "
            f"use a machine that has such a loader, or choose another with --data.loader"
        )
    if required_by is None:
        return chosen, reason
    return chosen, f"{reason} (among loaders with {wanted} pixels, as used for {required_by})"


def _fastest(
    dataset: Dataset,
    first: StepSamples | None,
    regions: np.ndarray | None,
    fast: dict[str, Any],
    options: dict[str, Any],
) -> tuple[str, str]:
    """As `choose_loader`, among the loaders `fast`."""
    missing: list[str] = []
    installed: list[str] = []
    for name, find in fast.items():
        try:
            find()
            installed.append(name)
        except UserError as error:
            missing.append(str(error))
    if not installed:
        return "torch", f"PIL decodes, since {'; '.join(missing) or 'no other loader can do so here'}"
    if len(installed) == 1:
        return installed[0], f"the only one of {', '.join(fast)} that is installed"
    if first is None:
        return installed[0], "there are no images to time the loaders with"
    kept = _first_images(dataset, first, options["threads"])
    if not kept.any():
        return installed[0], "the first images are stored raw, which every loader only copies"
    few = _part(first, kept)
    crops = None if regions is None else regions[kept]
    failed: list[str] = []
    with ExitStack() as stack:
        loaders: dict[str, ThreadedLoader] = {}
        for name in installed:
            try:
                loader = stack.enter_context(open_loader(name, dataset, **options))
                loader.decode(few, crops)  # warm-up: loads libraries, reads the files, allocates memory
            except (MachineError, BetonError, ShardError):
                raise  # no loader can read the data
            except DecodeError as error:
                return installed[0], f"not timed, since an image does not decode ({error})"
            except Exception as error:  # a broken loader must not end a run that another can do
                failed.append(f"; not {name}: {fact(error)}")
            else:
                loaders[name] = loader
        if not loaders:
            return "torch", f"PIL decodes, since no other loader works{''.join(failed)}"
        rates = _rates(loaders, few, crops)
    best = max(rates, key=lambda name: rates[name])
    preferred = next(iter(rates))
    chosen = best if rates[best] > MARGIN * rates[preferred] else preferred
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    return chosen, f"images/s measured: {measured}: {chosen}{''.join(failed)}"


def _first_images(dataset: Dataset, first: StepSamples, threads: int) -> np.ndarray:
    """(B,) bool: the samples, with all repeats, of the first JPEGs, up to `PIXELS` pixels per thread."""
    images, _ = first_appearances(first.index)
    images = images[[dataset.is_jpeg(index) for index in images.tolist()]]
    pixels = np.cumsum(dataset.height[images].astype(np.int64) * dataset.width[images])
    images = images[: max(1, int(np.searchsorted(pixels, PIXELS * threads, side="right")))]
    return np.isin(first.index, images)


def _part(samples: StepSamples, kept: np.ndarray) -> StepSamples:
    fields = {name: getattr(samples, name)[kept] for name in ("index", "repeat", "position", "group")}
    return replace(samples, **fields)


def _rates(loaders: dict[str, ThreadedLoader], samples: StepSamples, regions: np.ndarray | None) -> dict[str, float]:
    """Images per second of each loader in its best round."""
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
