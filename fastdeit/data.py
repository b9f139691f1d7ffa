"""The batches of a run: data set, order, plan, loader and stage put together from a recipe."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastdeit.config import AugmentConfig, Recipe
from fastdeit.distributed import World
from fastdeit.inputs import check_class_names as check_class_names
from fastdeit.inputs import epoch_order, repeats
from fastdeit.inputs import open_dataset as open_dataset
from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.host.stage import Batch, evaluation_regions
from fastdeit.pipelines.loaders.base import OnError, Regions, ThreadedLoader
from fastdeit.pipelines.loaders.choose import LOADERS, choose_loader, open_loader
from fastdeit.pipelines.loaders.prefetch import Prefetcher, make_pool, usable_cores
from fastdeit.pipelines.plan.draw import PlanDrawer, Policy
from fastdeit.pipelines.plan.order import EvalOrder, Order, StepSamples
from fastdeit.pipelines.plan.plan import Plan
from fastdeit.stage_choice import Layout, Make, Stage, StageName, Staging


@dataclass(frozen=True)
class TrainBatch:
    """A step's share of one process.

    data       images and labels, on the run's device
    position   (B,) int64 place of each sample in the global batch
    repeat     (B,) int32 which copy of its image a sample is
    fallbacks  dataset indices that the loader's decoder refused and PIL read
    replaced   (bad, used) dataset indices: images that do not decode, and those in their place
    """

    data: Batch
    position: np.ndarray
    repeat: np.ndarray
    fallbacks: list[int]
    replaced: list[tuple[int, int]]


def policy(augment: AugmentConfig, img_size: int, cutmix_box: str | None) -> Policy:
    """What the plan is drawn from, out of the recipe."""
    return Policy(
        img_size=img_size,
        policy=augment.policy,
        randaugment=augment.randaugment,
        crop_scale=augment.crop_scale,
        crop_ratio=augment.crop_ratio,
        hflip=augment.hflip,
        interpolation=augment.interpolation,
        color_jitter=augment.color_jitter,
        erase_prob=augment.erase_prob,
        erase_area=augment.erase_area,
        erase_aspect=augment.erase_aspect,
        mixup_alpha=augment.mixup_alpha,
        cutmix_alpha=augment.cutmix_alpha,
        mix_prob=augment.mix_prob,
        cutmix_switch_prob=augment.cutmix_switch_prob,
        cutmix_box="floor" if cutmix_box == "floor" else "full",
    )


def _open(
    recipe: Recipe,
    dataset: Dataset,
    order: Order,
    world: World,
    dtype: torch.dtype,
    layout: Layout,
    *,
    make: Make,
    regions: Regions,
    on_error: OnError,
    loader: tuple[str, str] | None = None,
    pixels: tuple[str, str] | None = None,
    chosen: tuple[StageName, str] | None = None,
) -> tuple[ThreadPoolExecutor, ThreadedLoader, Staging]:
    """A pool of this process's threads, and the loader and the stage that share it.

    `make` is that of `Staging`. `loader` and `chosen` are name and reason of the loader and of the stage that "auto" is
    here, where that is known; `pixels` those of `choose_loader`.
    """
    on_gpu = world.device.type == "cuda" and (chosen or (recipe.data.stage,))[0] != "host"
    threads = recipe.data.threads or max(1, usable_cores() // world.local_size)
    pool = make_pool(threads)
    options: dict[str, Any] = {
        "pool": pool,
        "threads": threads,
        "regions": regions,
        "on_error": on_error,
        "pinned": on_gpu,
        "on_device": on_gpu,
        "device_id": world.device.index if world.device.type == "cuda" else None,
        "hw_decoder_load": recipe.data.hw_decoder_load,
    }
    name, reason = recipe.data.loader, "as asked for"
    if name == "auto":
        if loader is None and world.main:
            loader = choose_loader(dataset, order, pixels=pixels, **options)
        name, reason = _agree(world, loader)
    opened = open_loader(name, dataset, order, **options, reason=reason)
    stage = Staging(
        recipe, world.device, opened, make, pool=pool, threads=threads, dtype=dtype, layout=layout, chosen=chosen
    )
    return pool, opened, stage


def _agree(world: World, choice: tuple[str, str] | None) -> tuple[Any, str]:
    """The main process's name and reason of a loader, on every process: decoders differ in their pixels."""
    names = list(LOADERS)
    name, reason = choice or (names[0], "as on the main process")
    if name not in names:
        raise UserError(f"loader '{name}', {reason}: there is no such loader: choose another with --data.loader")
    chosen = torch.tensor([names.index(name)], device=world.device)
    world.broadcast([chosen])
    return names[int(chosen)], reason


class TrainingData:
    """Training batches of one process, in the exact order of the recipe.

    `repeats` is the number of copies in use: the recipe's, or 1 where the released code would drop them. `pixels`
    are those that "auto" must decode, and whose they are; None: Pillow's. `dtype` and `layout` ("nchw", or "patches" as
    of `DeviceStage`) are those of the images.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        world: World,
        dtype: torch.dtype = torch.float32,
        layout: Layout = "nchw",
        *,
        pixels: tuple[str, str] | None = None,
    ) -> None:
        self.repeats = repeats(recipe, world.size)
        self.order = epoch_order(recipe, len(dataset), rank=world.rank, world=world.size)
        self.drawer = PlanDrawer(
            policy(recipe.augment, recipe.model.img_size, recipe.departures.cutmix_box),
            recipe.run.seed,
            dataset.height,
            dataset.width,
        )
        if self.drawer.mixes and self.order.group_size % 2:
            raise UserError(
                f"run.global_batch {recipe.run.global_batch} gives each of {world.size} processes "
                f"{self.order.rank_batch} samples, but Mixup and CutMix mix pairs: set a multiple of {2 * world.size}"
            )
        self._drawn: tuple[tuple[int, int], Plan] | None = None
        self._pool, self.loader, self.stage = _open(
            recipe,
            dataset,
            self.order,
            world,
            dtype,
            layout,
            make=self._make,
            regions=self._crops,
            on_error=recipe.data.on_error,
            pixels=pixels,
        )
        self._depth, self._epochs = recipe.data.prefetch, recipe.run.epochs

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.order.steps

    def _plan(self, epoch: int, step: int, samples: StepSamples) -> Plan:
        """The plan of a step, drawn once for the decoder and the stage."""
        if self._drawn is None or self._drawn[0] != (epoch, step):
            self._drawn = (epoch, step), self.drawer.draw(epoch, step, samples)
        return self._drawn[1]

    def _crops(self, epoch: int, step: int, samples: StepSamples) -> np.ndarray:
        return self._plan(epoch, step, samples).crop

    def _make(self, stage: Stage, decoded: DecodedBatch) -> Batch:
        samples = self.order.step(decoded.epoch, decoded.step)
        return stage(decoded, self._plan(decoded.epoch, decoded.step, samples))

    def _produce(self, first_epoch: int, first_step: int) -> Generator[TrainBatch, None, None]:
        for epoch in range(first_epoch, self._epochs):
            for decoded in self.loader.batches(epoch, first_step if epoch == first_epoch else 0):
                samples = self.order.step(epoch, decoded.step)
                yield TrainBatch(
                    self.stage(decoded),
                    samples.position,
                    samples.repeat,
                    list(decoded.fallbacks),
                    list(decoded.replaced),
                )

    def batches(self, epoch: int = 0, first_step: int = 0) -> Prefetcher[TrainBatch]:
        """The batches from a step on to the end of the run, prepared ahead, also over the end of an epoch."""
        return self.stage.prefetch(self._produce(epoch, first_step), self._depth, lambda batch: batch.data.tensors())

    def close(self) -> None:
        self.loader.close()
        self._pool.shutdown()


class EvaluationData:
    """Evaluation batches of one process: every image once over all processes, unless replicated.

    `fallbacks` collects the dataset indices that the loader's decoder refused and PIL read. `dtype` and `layout` are
    those of `TrainingData`; `loader` and `stage`, name and reason, are what "auto" is, None: the faster.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        world: World,
        dtype: torch.dtype = torch.float32,
        layout: Layout = "nchw",
        *,
        loader: tuple[str, str] | None = None,
        stage: tuple[StageName, str] | None = None,
    ) -> None:
        self.replicate = recipe.run.eval_sharding == "replicate"
        self.order = EvalOrder(
            len(dataset),
            batch=recipe.run.eval_batch,
            rank=world.rank,
            world=world.size,
            replicate=self.replicate,
        )
        size, self._crop = recipe.model.img_size, recipe.augment.eval_crop

        def regions(epoch: int, step: int, samples: StepSamples) -> np.ndarray:
            height, width = dataset.height[samples.index], dataset.width[samples.index]
            return evaluation_regions(height, width, size, self._crop)

        # A score with an image replaced would be one of another data set.
        self._pool, self.loader, self.stage = _open(
            recipe,
            dataset,
            self.order,
            world,
            dtype,
            layout,
            make=self._make,
            regions=regions,
            on_error="fail",
            loader=loader,
            chosen=stage,
        )
        self.fallbacks: set[int] = set()
        self._depth = recipe.data.prefetch

    @property
    def steps(self) -> int:
        return self.order.steps

    def batches(self) -> Prefetcher[Batch]:
        """All batches, prepared ahead; a context manager."""
        return self.stage.prefetch(self._produce(), self._depth, Batch.tensors)

    def _make(self, stage: Stage, decoded: DecodedBatch) -> Batch:
        return stage.evaluate(decoded, self._crop)

    def _produce(self) -> Generator[Batch, None, None]:
        for decoded in self.loader.batches(0):
            self.fallbacks.update(decoded.fallbacks)
            yield self.stage(decoded)

    def close(self) -> None:
        self.loader.close()
        self._pool.shutdown()


@dataclass(frozen=True)
class _Once:
    """An order of one step: the images `index` (B,)."""

    index: np.ndarray
    steps: int = 1

    def step(self, epoch: int, step: int) -> StepSamples:
        zeros = np.zeros(len(self.index), np.int32)
        return StepSamples(index=self.index, repeat=zeros, position=self.index, group=zeros, first_group=0)


@contextmanager
def evaluation_batch(recipe: Recipe, dataset: Dataset, world: World, index: np.ndarray) -> Generator[Batch, None, None]:
    """The images `index` (B,) int64 of a data set as an evaluation makes them: a float32 batch of this process alone.

    An image that does not decode is replaced by the next, with that one's label.
    """

    def regions(epoch: int, step: int, samples: StepSamples) -> np.ndarray:
        height, width = dataset.height[samples.index], dataset.width[samples.index]
        return evaluation_regions(height, width, recipe.model.img_size, recipe.augment.eval_crop)

    def make(stage: Stage, decoded: DecodedBatch) -> Batch:
        return stage.evaluate(decoded, recipe.augment.eval_crop)

    recipe = replace(recipe, data=replace(recipe.data, loader="auto", stage="host"))
    alone = World(0, 1, world.local_size, world.device)
    pool, loader, stage = _open(
        recipe,
        dataset,
        _Once(index),
        alone,
        torch.float32,
        "nchw",
        make=make,
        regions=regions,
        on_error="replace",
        loader=("torch", "a few images"),
        chosen=("host", "a few images"),
    )
    try:
        with stage.prefetch((stage(decoded) for decoded in loader.batches(0)), 1, Batch.tensors) as batches:
            yield next(batches)
    finally:
        loader.close()
        pool.shutdown()
