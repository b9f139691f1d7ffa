"""Evaluates a run's checkpoint for the page: samples, confusion matrix, worst classes, the two tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fastdeit import checkpoint
from fastdeit.config import Recipe
from fastdeit.data import evaluation_batch, first_samples
from fastdeit.distributed import World
from fastdeit.inputs import check_class_names, check_classes, open_runs_set
from fastdeit.loading import Loaded, load_opened, open_checkpoint
from fastdeit.memory import enough_for, moved
from fastdeit.model.deit import DeiT
from fastdeit.pipelines.console import progress_bar
from fastdeit.pipelines.errors import UserError, os_sentence
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.report.pictures import Missing, Picture, as_pixels, described
from fastdeit.report.runs import Run
from fastdeit.report.tokens import look_at_tokens
from fastdeit.setup import set_up
from fastdeit.subsets import divide, spaced
from fastdeit.training.best import best_names

T = TypeVar("T")

SAMPLES, WORST, MISTAKES, TOKENS = 16, 5, 6, 64  # training samples, worst classes, mistakes of each, images
MOST_CLASSES = 50  # in a confusion matrix
IMAGES, _MINUTE = 1000, 5e12  # to evaluate by default; operations that take two cores a minute


@dataclass(frozen=True)
class WorstClass:
    """A class: how many images were evaluated, how many of them classified correctly, and some mistakes."""

    name: str
    images: int
    hits: int
    mistakes: list[Picture]


@dataclass(frozen=True)
class Judged:
    """How a checkpoint classifies validation images.

    of           number of validation images
    index        (N,) int64: dataset indices of those that were evaluated
    label, decision  (N,) int64: their true and predicted classes
    names        of the K classes
    cosines      of the two tokens by layer, over `token_images` images
    maps         for a few images each: the image itself, and an attention map for each token
    """

    loaded: Loaded
    device: str
    of: int
    index: np.ndarray
    label: np.ndarray
    decision: np.ndarray
    names: list[str]
    worst: list[WorstClass]
    token_images: int
    cosines: list[float] | Missing
    maps: list[list[Picture]] | Missing

    @property
    def top1(self) -> float:
        return 100 * float((self.label == self.decision).mean())

    def confusion(self) -> np.ndarray:
        """(K, K) int64 counts: rows are true classes, columns predicted classes."""
        counts = np.zeros((len(self.names), len(self.names)), np.int64)
        np.add.at(counts, (self.label, self.decision), 1)
        return counts

    def confused(self, most: int) -> list[tuple[str, str, int, int]]:
        """The most confused pairs: true class, predicted class, count, and evaluated images of the true class."""
        wrong = self.label != self.decision
        pairs, counts = np.unique(np.stack([self.label, self.decision])[:, wrong], axis=1, return_counts=True)
        rows = sorted(zip((-counts).tolist(), *pairs.tolist(), strict=True))[:most]
        return [(self.names[a], self.names[b], -count, int((self.label == a).sum())) for count, a, b in rows]


@dataclass(frozen=True)
class Findings:
    """What the page shows of a run besides its log."""

    samples: list[Picture] | Missing
    judged: Judged | Missing


def look(run: Run, world: World, *, images: int | None, batch: int) -> Findings:
    """Make the run's first training samples, and evaluate its best checkpoint, or its newest if it keeps no best.

    images  the most validation images to evaluate; None: as many as `affordable` says
    batch   images evaluated at once

    A part that cannot be shown is a `Missing`, for example if the data are on another machine.
    """
    try:
        path, weights = chosen_checkpoint(run)
        opened = open_checkpoint(path)
        loaded = load_opened(opened, weights)
    except (UserError, OSError) as error:
        return Findings(Missing(_why(error)), Missing(_why(error)))
    data = replace(opened.recipe.data, threads=0, cache_dir=None)  # these suit the machine that trained
    recipe = replace(opened.recipe, data=data, run=replace(opened.recipe.run, precision="fp32"))
    loaded = loaded._replace(recipe=replace(recipe, model=loaded.recipe.model))
    set_up(recipe, world)
    folder = run.last_start.get("folder")
    started = Path(folder) if isinstance(folder, str) else None

    def samples() -> list[Picture]:
        with closing(open_runs_set(data.train, "data.train", started, opened.trained_on)) as train:
            return samples_of(run, recipe, train)

    def judged() -> Judged:
        if data.hold_out:
            with closing(open_runs_set(data.train, "data.train", started, opened.trained_on)) as train:
                return judge(loaded, train, divide(data, train.label).held_out, world, images, batch)
        with closing(open_runs_set(data.val, "data.val", started)) as val:
            return judge(loaded, val, np.arange(len(val)), world, images, batch)

    return Findings(_or_missing(samples), _or_missing(judged))


def chosen_checkpoint(run: Run) -> tuple[Path, Any]:
    """The run's best checkpoint, or its newest, and the kind of weights to load. Raises UserError if it has none."""
    folder = run.folder / "checkpoints"
    found = checkpoint.found(folder)
    if not found:
        raise UserError(f"{folder}: there is no checkpoint yet")
    names = best_names(folder)
    path = next((path for path in found if path.name in names), found[0])
    kind = run.best["weights"] if run.best is not None and run.best.get("checkpoint") == path.name else "auto"
    return path, kind if kind in ("auto", "model", "ema") else "auto"


def _or_missing(find: Callable[[], T]) -> T | Missing:
    try:
        return find()
    except (UserError, OSError) as error:
        return Missing(_why(error))


def _why(error: Exception) -> str:
    return (os_sentence(error) if isinstance(error, OSError) else None) or str(error)


def samples_of(run: Run, recipe: Recipe, dataset: Dataset) -> list[Picture]:
    """The run's first training samples, as the network saw them."""
    here, processes = World(0, 1, 1, torch.device("cpu")), int(run.starts[0]["world"])
    with first_samples(recipe, dataset, here, processes=processes, least=SAMPLES) as (plan, batch):
        names = _names(dataset.class_names, dataset.num_classes)
        pixels = as_pixels(batch.images[:SAMPLES], recipe)
        first, second = batch.label_a.tolist(), batch.label_b.tolist()
    out = []
    for at, image in enumerate(pixels):
        classes, operations = names[first[at]], described(plan, at)
        if plan.mixed[at]:
            classes += f" + {names[second[at]]}"
        out.append(Picture(image, f"training sample of {classes}; {operations}", f"{classes}: {operations}"))
    return out


def judge(loaded: Loaded, val: Dataset, every: np.ndarray, world: World, images: int | None, batch: int) -> Judged:
    """Evaluate the network on `images` of the validation images, evenly spaced.

    val, every  the data set that holds the validation images, and their dataset indices

    Raises UserError if checkpoint and data set do not match, and MachineError if the memory is too small.
    """
    classes = loaded.recipe.model.num_classes or val.num_classes
    check_classes(val, classes)
    check_class_names(str(loaded.path), loaded.class_names, str(val.path), val.class_names)
    if not len(every):
        raise UserError(f"{val.path}: holds no images")
    moved(loaded.model, world.device)
    index = every[spaced(len(every), affordable(loaded, world.device) if images is None else images)]
    decision, sure = np.zeros(len(index), np.int64), np.zeros(len(index))
    with progress_bar([], total=len(index), desc="evaluate", leave=False) as bar:
        for start in range(0, len(index), batch):
            part = slice(start, start + batch)
            with evaluation_batch(loaded.recipe, val, world, index[part], on_error="fail") as data:
                with enough_for("evaluating", data.images, "--batch", world.device):
                    best = loaded.probabilities(data.images).max(1)
                decision[part], sure[part] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            bar.update(len(index[part]))
    names = _names(loaded.class_names or val.class_names, classes)
    few = index[spaced(len(index), min(TOKENS, batch))]
    with evaluation_batch(loaded.recipe, val, world, few, on_error="fail") as data:
        cosine, maps = look_at_tokens(loaded, data.images, [names[each] for each in val.label[few]])
    return Judged(
        loaded=loaded,
        device=world.device.type,
        of=len(every),
        index=index,
        label=val.label[index],
        decision=decision,
        names=names,
        worst=_worst(loaded, val, world, names, index, decision, sure),
        token_images=len(few),
        cosines=cosine,
        maps=maps,
    )


def affordable(loaded: Loaded, device: torch.device) -> int:
    """How many validation images to evaluate: 1,000, but on a CPU no more than two cores do in about a minute."""
    model, size = loaded.model, loaded.recipe.model.img_size
    positions = model.pos_embed.shape[1] if isinstance(model, DeiT) else (size // 16) ** 2
    operations = 2 * positions * sum(each.numel() for each in model.parameters())
    return IMAGES if device.type == "cuda" else min(IMAGES, max(1, round(_MINUTE / max(1, operations))))


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    return [str(each) for each in range(count)] if names is None else list(names)


def _worst(
    loaded: Loaded,
    val: Dataset,
    world: World,
    names: list[str],
    index: np.ndarray,
    decision: np.ndarray,
    sure: np.ndarray,
) -> list[WorstClass]:
    """The classes with the lowest accuracy, with some of their mistakes."""
    label = val.label[index]
    hit = decision == label
    shares = [(hit[label == one].mean(), int(one)) for one in np.unique(label)]
    out = []
    for share, one in sorted(shares)[:WORST]:
        if share == 1:
            break
        wrong = np.flatnonzero((label == one) & ~hit)[:MISTAKES]
        with evaluation_batch(loaded.recipe, val, world, index[wrong], on_error="fail") as data:
            pixels = as_pixels(data.images, loaded.recipe)
        pictures = []
        for image, at in zip(pixels, wrong, strict=True):
            taken = f"{names[decision[at]]}, {100 * sure[at]:.0f}%"
            shows = f"validation image {index[at]} of class {names[one]}, predicted as {taken}"
            pictures.append(Picture(image, shows, f"predicted as {taken}"))
        here = label == one
        out.append(WorstClass(names[one], int(here.sum()), int(hit[here].sum()), pictures))
    return out
