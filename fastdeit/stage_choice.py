"""Chooses where decoded images are augmented: on the host, on the run's device, or on the faster of the two."""

import os
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fastdeit.config import Recipe
from fastdeit.model.kernel_choice import Kernels
from fastdeit.pipelines.batch import Batch, DecodedBatch, Stage
from fastdeit.pipelines.device.transfer import CopyingStage, StreamPrefetcher
from fastdeit.pipelines.errors import UserError, fact
from fastdeit.pipelines.host.stage import HostStage
from fastdeit.pipelines.loaders.prefetch import Prefetcher
from fastdeit.pipelines.plan.plan import Plan
from fastdeit.precision import Precision
from fastdeit.sections import AugmentConfig

T = TypeVar("T")
Layout = Literal["nchw", "patches"]
StageName = Literal["auto", "device", "host"]

ROUNDS = 3  # timed, after a warm-up


def settle_stage(recipe: Recipe, device: torch.device, *, decodes_on_device: bool) -> tuple[StageName, str]:
    """Name of the stage, and one sentence that says why; the name stays "auto" if `ChosenStage` must time both.

    "auto" becomes "host" without a GPU, and "device" if the loader decodes there.
    """
    if recipe.data.stage == "auto":
        if device.type != "cuda":
            return "host", "there is no GPU"
        if decodes_on_device:
            return "device", "the loader decodes there"
    return recipe.data.stage, "as requested"


class ChosenStage:
    """The stage of a run's batches, and the stream that it runs on.

    Both stages make bit-identical batches, so the choice changes no result, may differ between processes, and is not
    stored in a checkpoint.

    choice  (name, reason) from `settle_stage`; "auto" times both stages
    first   a decoded batch and its plan, to time the stages with
    name    "host" or "device"
    reason  one sentence that says why

    Raises UserError for "device" on a machine that cannot run the kernels.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout,
        *,
        choice: tuple[StageName, str],
        first: tuple[DecodedBatch, Plan] | None,
        pool: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        # One stream for all batches: it orders their use of the stage's work memory.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        options: dict[str, Any] = {"augment": recipe.augment, "device": device, "dtype": dtype, "layout": layout}
        options["patch_size"] = recipe.model.patch_size
        openers: dict[StageName, Callable[[int], Stage]] = {
            "device": lambda size: _device_stage(size, **options),
            "host": lambda size: _host_stage(size, **options, pool=pool, threads=threads),
        }
        self.name: StageName
        self.name, self.reason = choice
        self._size = recipe.model.img_size if first is None else first[1].img_size
        with self._on_stream():
            if self.name == "auto":
                sized: dict[StageName, Callable[[], Stage]] = {
                    name: partial(opener, self._size) for name, opener in openers.items()
                }
                self.name, self.reason, self._stage = choose_stage(sized, first, device)
            else:
                self._stage = openers[self.name](self._size)
        self._open = openers[self.name]

    def __call__(self, decoded: DecodedBatch, plan: Plan) -> Batch:
        """Augment `decoded` to images of the plan's size; the batch is on the device."""
        if plan.img_size != self._size:  # a curriculum's next part
            self._stage, self._size = self._open(plan.img_size), plan.img_size
        return self._stage(decoded, plan)

    def prefetch(
        self, items: Generator[T, None, None], depth: int, tensors: Callable[[T], Iterable[Tensor]]
    ) -> Prefetcher[T]:
        """Prepare `items`, which use this stage's batches, ahead; `tensors` returns the tensors of an item."""
        if self._stream is None:
            return Prefetcher(items, depth)
        return StreamPrefetcher(items, depth, self._stream, tensors)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def choose_stage(
    openers: dict[StageName, Callable[[], Stage]], first: tuple[DecodedBatch, Plan] | None, device: torch.device
) -> tuple[StageName, str, Stage]:
    """Name of the fastest stage, one sentence that says why, and the stage.

    The stages take turns to make the `first` batch: once to compile and allocate, then `ROUNDS` times, of which the
    fastest counts. The time ends when the batch is on the device. A stage that fails is excluded, and the sentence
    names it; if all fail, the first error is raised.
    """
    if first is None:
        name, opener = next(iter(openers.items()))
        return name, "there is no batch to time the stages with", opener()
    stages: dict[StageName, Stage] = {}
    failed: dict[StageName, Exception] = {}
    for name, opener in openers.items():
        try:
            stage = opener()
            _seconds(stage, *first, device)
        except Exception as error:  # a broken stage must not end a run that the other can do
            failed[name] = error
        else:
            stages[name] = stage
    if not stages:
        raise next(iter(failed.values()))
    for error in failed.values():
        error.__traceback__ = None  # its frames keep the failed stage's memory
    seconds = dict.fromkeys(stages, float("inf"))
    for _ in range(ROUNDS):
        for name, stage in stages.items():
            seconds[name] = min(seconds[name], _seconds(stage, *first, device))
    name = min(seconds, key=lambda name: seconds[name])
    rates = [f"{name} {len(first[1]) / spent:,.0f}" for name, spent in seconds.items()]
    excluded = [f"; not {name}: {fact(e)}" for name, e in failed.items()]
    return name, f"samples/s measured: {', '.join(rates)}{''.join(excluded)}", stages[name]


def _seconds(stage: Stage, decoded: DecodedBatch, plan: Plan, device: torch.device) -> float:
    start = time.perf_counter()
    batch = stage(decoded, plan)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del batch
    return time.perf_counter() - start


def _device_stage(
    size: int, augment: AugmentConfig, patch_size: int, device: torch.device, dtype: torch.dtype, layout: Layout
) -> Stage:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise UserError("data.stage device needs a GPU, but this run is on the CPU: set --data.stage host, or auto")
    # Imported late: a machine without a GPU may lack Triton.
    from fastdeit.pipelines.device.stage import DeviceStage

    return DeviceStage(
        size, augment.mean, augment.std, device=device, dtype=dtype, layout=layout, patch_size=patch_size
    )


def _host_stage(
    size: int,
    augment: AugmentConfig,
    patch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout,
    *,
    pool: ThreadPoolExecutor,
    threads: int,
) -> Stage:
    stage = HostStage(
        size, augment.mean, augment.std,
        pool=pool, threads=threads, dtype=dtype if dtype != torch.float16 else torch.float32,
        pinned=device.type == "cuda",
    )  # fmt: skip
    if device.type == "cpu" and layout == "nchw":
        return stage
    return CopyingStage(stage, device, dtype, patch_size=patch_size if layout == "patches" else None)


def image_dtype(recipe: Recipe, precision: Precision, *, teacher: bool) -> torch.dtype:
    """The dtype of a run's images on their device: autocast's if that changes no result, else float32.

    If only a DeiT's patch embedding reads the images, autocast rounds them anyway. A `teacher` in the loop also reads
    them, and normalises them again in float32. On a CPU they stay float32.
    """
    if precision.dtype is None or precision.device.type == "cpu" or recipe.model.arch != "deit" or teacher:
        return torch.float32
    return precision.dtype


def image_layout(recipe: Recipe, kernels: Kernels, *, teacher: bool) -> Layout:
    """The layout of a run's images: "patches" if the DeiT's kernels read patches and there is no `teacher`.

    The layout changes no result: given "nchw", a DeiT with these kernels cuts the images into patches itself. timm's
    models take images.
    """
    patches = recipe.model.arch == "deit" and "assemble_tokens" in kernels.ops and not teacher
    return "patches" if patches else "nchw"
