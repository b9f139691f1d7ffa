"""Batches for anyone's training loop: the pipeline without the trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdeit.config import Recipe
from fastdeit.data import EvaluationData, TrainingData
from fastdeit.distributed import World
from fastdeit.inputs import open_dataset
from fastdeit.on_demand import converted
from fastdeit.pipelines.batch import Batch
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import recipe_of
from fastdeit.subsets import divide


class ImageLoader:
    """The batches of a data set, decoded, augmented and mixed as a recipe says: an iterable over one epoch at a time.

    Each batch is (images, targets) on the loader's device: `images` (B, 3, S, S) normalised; `targets` (B,) int64, or
    (B, num_classes) float32 where the recipe mixes images or smooths labels. With a curriculum, S depends on the epoch.
    The loss is then `torch.nn.functional.cross_entropy(output, targets)`.

    Iterating goes from (`epoch`, `step`) to the end of that epoch. Both always name the batch that comes next, so
    `state_dict` at any moment resumes after the last batch that was given out, with the same bits, and a loop that was
    left goes on where it stopped. With several processes (`torch.distributed`), each has its own part of every step.

    epoch, step   of the next batch, from 0
    num_classes   of the data set
    class_names   in the order of the labels; None if the data set has none
    """

    def __init__(
        self,
        path: str | Path,
        recipe: str | Recipe = "deit_small",
        *,
        batch_size: int,
        train: bool = True,
        epoch: int = 0,
        step: int = 0,
        seed: int | None = None,
        img_size: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        threads: int = 0,
    ) -> None:
        """Open a data set that fastdeit-convert wrote, or a folder or archive of images, which is converted once.

        recipe      name of a recipe, or a recipe: its augmentation, repeats, decoder and order count
        batch_size  images of a batch of this process. A multiple of 64 keeps the groups of the paper whose images mix
                    among themselves, on any number of processes; with any other, a batch is one group
        train       False: the evaluation transform, every image once; the last batch may be smaller. With the
                    recipe's `data.hold_out`, only the images that it holds out
        seed        None: the recipe's
        img_size    None: the recipe's. Another size turns off the recipe's `curriculum.sizes`
        device      None: the current GPU, or the CPU without one
        dtype       of the images: float32 or bfloat16
        threads     that decode; 0: this process's share of the cores

        Raises UserError for a data set, a recipe or a batch that cannot be used.
        """
        recipe = recipe_of(recipe)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give at least 1")
        path = converted(Path(path), recipe.data.cache_dir)
        dataset, world = open_dataset(path), _world(device)
        self.recipe = _with(recipe, path, world, batch_size, seed, img_size, threads, train=train)
        self.num_classes, self.class_names = dataset.num_classes, dataset.class_names
        self.epoch, self.step, self._train = epoch, step, train
        self._data: TrainingData | EvaluationData
        if train:
            self._data = TrainingData(self.recipe, dataset, world, dtype)
        else:
            held_out = divide(self.recipe.data, dataset.label).held_out if self.recipe.data.hold_out else None
            self._data = EvaluationData(self.recipe, dataset, world, dtype, images=held_out)
        self._soft = isinstance(self._data, TrainingData) and (
            self._data.drawer.mixes or self.recipe.augment.label_smoothing > 0
        )
        self._check_position(epoch, step)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._data.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        flow = (batch for *_, batch in self._data.flow(self.epoch, self.step))
        with self._data.stage.prefetch(flow, self.recipe.data.prefetch, Batch.tensors) as batches:
            for batch in batches:
                later = self.step + 1
                self.epoch, self.step = (self.epoch, later) if later < len(self) else (self.epoch + 1, 0)
                yield batch.images, self._targets(batch)

    def _targets(self, batch: Batch) -> Tensor:
        if not self._soft:
            return batch.label_a
        return batch.targets(self.num_classes, self.recipe.augment.label_smoothing)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, and what the order of the batches depends on."""
        return {"epoch": self.epoch, "step": self.step, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a state. Raises UserError if it is of other data, another seed or batch."""
        former = {"data.hold_out": 0.0, "data.fraction": 1.0}  # what a state without these fields means
        for name, value in self._order().items():
            if (held := state.get(name, former.get(name))) != value:
                raise UserError(f"the state is of another {name}: {held!s:.40}, not {value}")
        self._check_position(state.get("epoch"), state.get("step"))
        self.epoch, self.step = state["epoch"], state["step"]

    def _order(self) -> dict[str, Any]:
        run = self.recipe.run
        return {
            "data": self._data.loader.dataset.content_hash,
            "global_batch": run.global_batch if self._train else run.eval_batch,
            "seed": run.seed,
            "data.hold_out": self.recipe.data.hold_out,
            **({"data.fraction": self.recipe.data.fraction} if self._train else {}),
        }

    def _check_position(self, epoch: Any, step: Any) -> None:
        if not (type(epoch) is int and type(step) is int and epoch >= 0 and 0 <= step < len(self)):
            raise UserError(f"epoch {epoch!s:.40}, step {step!s:.40}: an epoch has {len(self)} steps, counted from 0")

    def close(self) -> None:
        """End the loader's threads."""
        self._data.close()

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _world(device: str | torch.device | None) -> World:
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not dist.is_initialized():
        return World(0, 1, local, torch.device(device))
    return World(dist.get_rank(), dist.get_world_size(), local, torch.device(device))


def _with(
    recipe: Recipe,
    path: Path,
    world: World,
    batch_size: int,
    seed: int | None,
    img_size: int | None,
    threads: int,
    *,
    train: bool,
) -> Recipe:
    """The recipe for one loader."""
    recipe = recipe.filled()
    run = replace(recipe.run, seed=recipe.run.seed if seed is None else seed)
    run = replace(run, global_batch=batch_size * world.size) if train else replace(run, eval_batch=batch_size)
    group = recipe.departures.mix_group or batch_size
    resized = img_size is not None and img_size != recipe.model.img_size
    return replace(
        recipe,
        model=replace(recipe.model, img_size=recipe.model.img_size if img_size is None else img_size),
        curriculum=replace(recipe.curriculum, sizes=()) if resized else recipe.curriculum,
        data=replace(recipe.data, train=path, val=None, threads=threads),
        departures=replace(recipe.departures, mix_group=0 if batch_size % group else group),
        run=run,
    )


create_loader = ImageLoader  # the name that timm's users look for
