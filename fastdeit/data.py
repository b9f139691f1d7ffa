"""The batches of a run: order -> plan -> decode -> augment, each one call, in `Pipeline.flow`."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from fastdeit.config import Recipe
from fastdeit.distributed import World
from fastdeit.inputs import epoch_order, repeats
from fastdeit.pipelines.batch import Batch, DecodedBatch
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.loaders.base import OnError
from fastdeit.pipelines.loaders.choose import LOADERS, choose_loader, open_loader
from fastdeit.pipelines.loaders.prefetch import Prefetcher, make_pool, usable_cores
from fastdeit.pipelines.plan.draw import PlanDrawer
from fastdeit.pipelines.plan.order import EpochOrder, EvalOrder, Order, StepSamples, plain_samples
from fastdeit.pipelines.plan.plan import Plan, evaluation_plan
from fastdeit.stage_choice import ChosenStage, Layout, StageName, settle_stage
from fastdeit.subsets import divide

AnyOrder = TypeVar("AnyOrder", bound=Order)


@dataclass(frozen=True)
class TrainBatch:
    """One process's part of a step.

    data       images and labels, on the run's device
    position   (B,) int64: position of each sample in the global batch
    repeat     (B,) int32: which repeat of its image a sample is
    fallbacks  dataset indices that PIL read because the loader's decoder refused them
    replaced   (bad, used) dataset indices: images that do not decode, and their replacements
    """

    data: Batch
    position: np.ndarray
    repeat: np.ndarray
    fallbacks: list[int]
    replaced: list[tuple[int, int]]


class Pipeline(Generic[AnyOrder]):
    """Turns the steps of an order into batches on the run's device, with a loader and a stage that share threads.

    order   gives the samples of each step
    draw    returns the plan of a step's samples
    dtype, layout  of the images
    on_error  that of `ThreadedLoader`
    images  dataset indices of the images that may replace one that does not decode; None: all
    loader, stage  (name, reason) to use for "auto"; None: choose here
    pixels  that of `choose_loader`
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        world: World,
        order: AnyOrder,
        draw: Callable[[StepSamples], Plan],
        dtype: torch.dtype,
        layout: Layout,
        *,
        on_error: OnError,
        images: np.ndarray | None = None,
        loader: tuple[str, str] | None = None,
        stage: tuple[StageName, str] | None = None,
        pixels: tuple[str, str] | None = None,
    ) -> None:
        self.order, self.draw, self._depth = order, draw, recipe.data.prefetch
        threads = recipe.data.threads or max(1, usable_cores() // world.local_size)
        self._pool = make_pool(threads)
        on_gpu = world.device.type == "cuda" and (stage or (recipe.data.stage,))[0] != "host"
        options: dict[str, Any] = {
            "pool": self._pool,
            "threads": threads,
            "on_error": on_error,
            "images": images,
            "pinned": on_gpu,
            "on_device": on_gpu,
            "device_id": world.device.index if world.device.type == "cuda" else None,
            "hw_decoder_load": recipe.data.hw_decoder_load,
        }
        name, reason = recipe.data.loader, "as requested"
        if name == "auto":
            if loader is None and world.main:
                first = self._first_step()
                samples, regions = (first[0], first[1].regions()) if first is not None else (None, None)
                loader = choose_loader(dataset, samples, regions, pixels=pixels, **options)
            name, reason = _agree(world, loader)
        self.loader = open_loader(name, dataset, **options, reason=reason)
        choice = stage or settle_stage(recipe, world.device, decodes_on_device=self.loader.on_device)
        timed = None
        if choice[0] == "auto" and (first := self._first_step()) is not None:
            samples, plan = first
            timed = self.loader.decode(samples, plan.regions()), plan
        self.stage = ChosenStage(
            recipe, world.device, dtype, layout, choice=choice, first=timed, pool=self._pool, threads=threads
        )

    def _first_step(self) -> tuple[StepSamples, Plan] | None:
        """The samples and the plan on which `auto` times its choices; None for an empty share of the data."""
        if not self.order.steps:
            return None
        samples = self.order.step(0, 0)
        return samples, self.draw(samples)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.order.steps

    def flow(self, epoch: int, first_step: int = 0) -> Generator[tuple[StepSamples, DecodedBatch, Batch], None, None]:
        """The batches of an epoch from `first_step` on, each with its samples and decoded images."""
        order, decoded = self.order, None
        following = order.step(epoch, first_step) if first_step < order.steps else None
        while following is not None:
            samples, next_step = following, following.step + 1
            following = order.step(epoch, next_step) if next_step < order.steps else None
            plan = self.draw(samples)
            decoded = self.loader.decode(samples, plan.regions(), previous=decoded, following=following)
            yield samples, decoded, self.stage(decoded, plan)

    def close(self) -> None:
        self.loader.close()
        self._pool.shutdown()


def _agree(world: World, choice: tuple[str, str] | None) -> tuple[Any, str]:
    """The main process's choice of a loader, on every process: loaders differ in their pixels."""
    names = list(LOADERS)
    name, reason = choice or (names[0], "as on the main process")
    if name not in names:
        raise UserError(f"loader '{name}', {reason}: there is no such loader: choose another with --data.loader")
    chosen = torch.tensor([names.index(name)], device=world.device)
    world.broadcast([chosen])
    return names[int(chosen)], reason


class TrainingData(Pipeline[EpochOrder]):
    """Training batches of one process, in the exact order of the recipe.

    dtype, layout  of the images; layout is "nchw" or "patches", see `DeviceStage`
    pixels   that of `choose_loader`
    images   dataset indices of the images to train on
    repeats  repeats in use: the recipe's, or 1 where the released code drops them

    Raises UserError if Mixup or CutMix cannot pair the samples.
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
        self.images = divide(recipe.data, dataset.label).train
        order = epoch_order(recipe, self.images, rank=world.rank, world=world.size)
        self.drawer = _drawer(recipe, dataset)
        if self.drawer.mixes and order.group_size % 2:
            raise UserError(
                f"run.global_batch {recipe.run.global_batch} gives each of {world.size} processes "
                f"{order.rank_batch} samples, but Mixup and CutMix mix pairs: set a multiple of {2 * world.size}"
            )
        self._epochs = recipe.run.epochs
        super().__init__(
            recipe, dataset, world, order, self.drawer.draw, dtype, layout,
            on_error=recipe.data.on_error, images=self.images, pixels=pixels,
        )  # fmt: skip

    def batches(self, epoch: int = 0, first_step: int = 0) -> Prefetcher[TrainBatch]:
        """The batches from a step to the end of the run, prepared ahead, also across epochs."""
        return self.stage.prefetch(self._produce(epoch, first_step), self._depth, lambda batch: batch.data.tensors())

    def _produce(self, first_epoch: int, first_step: int) -> Generator[TrainBatch, None, None]:
        for epoch in range(first_epoch, self._epochs):
            # map keeps no batch alive while the next one is made; a loop would.
            yield from map(_train_batch, self.flow(epoch, first_step if epoch == first_epoch else 0))


def _drawer(recipe: Recipe, dataset: Dataset) -> PlanDrawer:
    return PlanDrawer(
        recipe.augment,
        recipe.run.seed,
        dataset.height,
        dataset.width,
        img_size=recipe.model.img_size,
        curriculum=recipe.parts(),
        cutmix_box="floor" if recipe.departures.cutmix_box == "floor" else "full",
    )


def _train_batch(step: tuple[StepSamples, DecodedBatch, Batch]) -> TrainBatch:
    samples, decoded, batch = step
    return TrainBatch(batch, samples.position, samples.repeat, list(decoded.fallbacks), list(decoded.replaced))


class EvaluationData(Pipeline[EvalOrder]):
    """Evaluation batches of one process. The processes share the images, unless each evaluates all of them.

    images  dataset indices of the images; None: all
    dtype, layout  those of `TrainingData`
    loader, stage  those of `Pipeline`
    replaced   collects the held-out images that were replaced because they do not decode (`data.on_error` "replace")
    fallbacks  collects the dataset indices that PIL read because the loader's decoder refused them
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        world: World,
        dtype: torch.dtype = torch.float32,
        layout: Layout = "nchw",
        *,
        images: np.ndarray | None = None,
        loader: tuple[str, str] | None = None,
        stage: tuple[StageName, str] | None = None,
    ) -> None:
        self.replicate = recipe.run.eval_sharding == "replicate"
        on_error = "fail" if images is None else recipe.data.on_error
        images = np.arange(len(dataset)) if images is None else images
        order = EvalOrder(
            images, batch=recipe.run.eval_batch, rank=world.rank, world=world.size, replicate=self.replicate
        )
        self.fallbacks: set[int] = set()
        self.replaced: set[int] = set()
        # Scores on a validation set must be comparable, so none of its images is ever replaced.
        super().__init__(
            recipe, dataset, world, order, _evaluation_plans(recipe, dataset), dtype, layout,
            on_error=on_error, images=images, loader=loader, stage=stage,
        )  # fmt: skip

    def batches(self) -> Prefetcher[Batch]:
        """All batches, prepared ahead; a context manager."""
        return self.stage.prefetch(self._produce(), self._depth, Batch.tensors)

    def _produce(self) -> Generator[Batch, None, None]:
        yield from map(self._note_fallbacks, self.flow(0))

    def _note_fallbacks(self, step: tuple[StepSamples, DecodedBatch, Batch]) -> Batch:
        _, decoded, batch = step
        self.fallbacks.update(decoded.fallbacks)
        self.replaced.update(bad for bad, _ in decoded.replaced)
        return batch


def _evaluation_plans(recipe: Recipe, dataset: Dataset) -> Callable[[StepSamples], Plan]:
    size, crop = recipe.model.img_size, recipe.augment.eval_crop

    def plan(samples: StepSamples) -> Plan:
        index = samples.index
        return evaluation_plan(index, dataset.height[index], dataset.width[index], size, crop)

    return plan


@dataclass(frozen=True)
class _Once:
    """An order of one step."""

    samples: StepSamples
    steps: int = 1

    def step(self, epoch: int, step: int) -> StepSamples:
        return self.samples


@contextmanager
def evaluation_batch(
    recipe: Recipe, dataset: Dataset, world: World, index: np.ndarray, on_error: OnError = "replace"
) -> Generator[Batch, None, None]:
    """A float32 batch of the images `index` (B,) int64, processed as for evaluation, on this process only.

    The next image that decodes replaces one that does not, and its label counts. With `on_error` "fail", an image that
    does not decode is an error.
    """
    plans = _evaluation_plans(recipe, dataset)
    with _one_batch(recipe, dataset, world, plain_samples(index), plans, on_error) as batch:
        yield batch


@contextmanager
def first_samples(
    recipe: Recipe, dataset: Dataset, world: World, *, processes: int, least: int
) -> Generator[tuple[Plan, Batch], None, None]:
    """The first samples that a run on `processes` processes trains on: their plan, and a float32 batch of them.

    They are whole mixing groups with at least `least` samples, or the whole first batch if it has fewer. Only this
    process makes them.
    """
    images = divide(recipe.data, dataset.label).train
    samples = epoch_order(recipe, images, world=processes).step(0, 0)
    rows = samples.group <= samples.group[:least][-1]
    arrays = {name: getattr(samples, name)[rows] for name in ("index", "repeat", "position", "group")}
    samples, drawer = replace(samples, **arrays), _drawer(recipe, dataset)
    with _one_batch(recipe, dataset, world, samples, drawer.draw, recipe.data.on_error, images) as batch:
        yield drawer.draw(samples), batch


@contextmanager
def _one_batch(
    recipe: Recipe,
    dataset: Dataset,
    world: World,
    samples: StepSamples,
    draw: Callable[[StepSamples], Plan],
    on_error: OnError,
    images: np.ndarray | None = None,
) -> Generator[Batch, None, None]:
    recipe = replace(recipe, data=replace(recipe.data, loader="auto"))
    pipeline = Pipeline(
        recipe,
        dataset,
        World(0, 1, world.local_size, world.device),
        _Once(samples),
        draw,
        torch.float32,
        "nchw",
        on_error=on_error,
        images=images,
        loader=("torch", "a few images"),
        stage=("host", "a few images"),
    )
    try:
        with pipeline.stage.prefetch((batch for *_, batch in pipeline.flow(0)), 1, Batch.tensors) as batches:
            yield next(batches)
    finally:
        pipeline.close()
