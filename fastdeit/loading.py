"""Opens a checkpoint as a network that is ready to classify: the model, its transform, its class names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastdeit.checkpoint import read_checkpoint
from fastdeit.cli import recipe_from_dict
from fastdeit.config import Recipe
from fastdeit.inputs import checkpoint_file
from fastdeit.kernels.reference import HEADS, head_log_probabilities
from fastdeit.model.deit import DeiT, StudentOutput
from fastdeit.model.kernel_choice import TORCH, Kernels
from fastdeit.model.networks import ConvnetStudent, build_network
from fastdeit.model.weights import check_described, describe, load_weights, state_dict
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import convnet_teacher, recipe_of
from fastdeit.sections import CurriculumConfig
from fastdeit.training.evaluation import headline_head

Weights = Literal["model", "ema"]


@dataclass(frozen=True)
class OpenedCheckpoint:
    """What a checkpoint file holds: its content, the fields that describe its network, and its recipe.

    The recipe is resolved, and has `model.num_classes` of the checkpoint if that names it.
    """

    path: Path
    stored: dict[str, Any]
    described: dict[str, Any]
    recipe: Recipe

    @property
    def has_average(self) -> bool:
        """Whether it holds the average of its weights, as fastdeit stores it."""
        return bool(self.stored.get("ema"))

    @property
    def trained_on(self) -> object:
        """The content hash of the run's training set; None if the checkpoint does not hold it."""
        effective = self.stored.get("effective")
        return effective.get("data.train") if isinstance(effective, dict) else None

    def network(
        self, num_classes: int, kind: Weights, kernels: Kernels = TORCH, fault: str = "cannot be used"
    ) -> tuple[DeiT | ConvnetStudent, list[str]]:
        """The network with its weights, on the CPU, and a sentence for each adaptation.

        Raises UserError if the weights do not fit, or only with a part that is not trained; `fault` says what follows.
        """
        model = build_network(self.recipe.model, num_classes, kernels)
        messages = load_weights(model, self.stored, ema=kind == "ema")
        untrained = next((message for message in messages if "reset" in message), None)
        if untrained is not None:
            raise UserError(f"{self.path} {fault}: {untrained}")
        return model, messages


def timm_recipe(arch: str) -> tuple[Recipe, list[str]]:
    """A recipe that describes timm's model `arch` and its preprocessing; sentences on what evaluation does otherwise.

    Raises UserError if timm has no configuration for it.
    """
    import timm

    cfg: Any = timm.get_pretrained_cfg(arch) if timm.is_model(arch) else None
    if cfg is None:
        raise UserError(f"--arch {arch} is not a model that timm has a configuration for: see timm.list_models()")
    base, size = convnet_teacher(), cfg.input_size[-1]
    tag = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    said = [f"timm's configuration of {tag}: {size} pixels, crop {cfg.crop_pct}"]
    said += [
        f"timm's configuration of {arch} says {name} '{value}', but evaluation here takes {ours}"
        for name, value, ours in (
            ("interpolation", cfg.interpolation, "bicubic"),
            ("crop_mode", cfg.crop_mode, "center"),
        )
        if value != ours
    ]
    augment = replace(base.augment, mean=tuple(cfg.mean), std=tuple(cfg.std), eval_crop=cfg.crop_pct)
    return replace(base, name=arch, model=replace(base.model, arch=arch, img_size=size), augment=augment), said


def open_checkpoint(path: Path, recipe: str | Recipe | None = None, img_size: int | None = None) -> OpenedCheckpoint:
    """Read a checkpoint of any layout that `load_weights` knows, or the newest one of a run's folder.

    recipe    the recipe that describes its network, or its name; None: the checkpoint holds its own
    img_size  resolution, if it is not the recipe's

    Raises UserError if the file is missing or damaged, has no recipe, or holds another network than its recipe says.
    """
    named = None if recipe is None else recipe_of(recipe)
    path = checkpoint_file(path)
    stored = read_checkpoint(path)
    described = describe(stored, str(path))
    classes = described.get("num_classes")
    if named is not None:
        base = named
    elif isinstance(stored.get("recipe"), dict):
        base = own_recipe(path, stored)
        weights = state_dict(stored, ema=not any(stored.get(key) for key in ("model", "state_dict")), source=str(path))
        check_described(base.model, classes or base.model.num_classes, weights, str(path))
    else:
        raise UserError(f"{path} does not hold its recipe: name it, e.g. --recipe deit_small_distilled")
    size = base.model.img_size if img_size is None else img_size
    model = replace(base.model, init=None, finetune=False, num_classes=classes or base.model.num_classes, img_size=size)
    # A curriculum must end at the model's size, so another size drops it.
    curriculum = base.curriculum if size == base.model.img_size else CurriculumConfig()
    return OpenedCheckpoint(path, stored, described, replace(base, model=model, curriculum=curriculum).resolved())


def own_recipe(path: Path, stored: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint's content holds. Raises UserError if it cannot be used."""
    try:
        recipe = recipe_from_dict(stored["recipe"], file=path)
    except UserError as error:
        raise UserError(f"{path} holds no usable recipe: {error}") from error
    for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads"):
        if getattr(recipe.model, name) < 1:
            raise UserError(f"{path}: its recipe says model.{name} {getattr(recipe.model, name)}")
    return recipe


class Loaded(NamedTuple):
    """A network that is ready to classify.

    model        in eval mode, on the CPU; called with (B, 3, S, S) float32, it returns a `StudentOutput`
    transform    turns an upright RGB image, as `encode.decode` opens it, into (3, S, S) float32, as evaluation does
    class_names  in the order of the labels; None if the checkpoint does not name them
    weights      which of the checkpoint's weights these are
    head         the head that decides: "class", or the late fusion of a network with a distillation token
    recipe       describes the network, with its number of classes
    path         of the checkpoint
    """

    model: DeiT | ConvnetStudent
    transform: Callable[[Image.Image], Tensor]
    class_names: list[str] | None
    weights: Weights
    head: str
    recipe: Recipe
    path: Path

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, K) float32: the probability of each class for `images` (B, 3, S, S), on the model's device."""
        return log_probabilities(self.model(images), self.head).exp()


def log_probabilities(output: StudentOutput, head: str) -> Tensor:
    """(B, K) float32 log-probabilities of one of `HEADS`."""
    return head_log_probabilities(output.cls, output.dist)[HEADS.index(head)]


def load(
    path: Path | str,
    *,
    recipe: str | None = None,
    weights: Literal["auto", "model", "ema"] = "auto",
    img_size: int | None = None,
) -> Loaded:
    """The network of a checkpoint, its transform and its class names.

    path      checkpoint of fastdeit, a released DeiT or timm; or a run's folder, for its newest checkpoint
    recipe    name of the recipe that describes its network, if the checkpoint does not hold its own
    weights   "ema": their average; "auto": the average if the checkpoint has it
    img_size  resolution, if it is not the recipe's; the position embedding is resized

    Raises UserError if the file is missing, damaged, or does not fit.
    """
    return load_opened(open_checkpoint(Path(path), recipe, img_size), weights)


def load_opened(opened: OpenedCheckpoint, weights: Literal["auto", "model", "ema"] = "auto") -> Loaded:
    """What `load` returns, for a checkpoint that has already been opened."""
    kind: Weights = weights if weights != "auto" else "ema" if opened.has_average else "model"
    classes = opened.recipe.model.num_classes or _count_classes(opened, kind)
    model, _ = opened.network(classes, kind)
    names = opened.described.get("class_names")
    if names is not None and len(names) != classes:
        raise UserError(f"{opened.path} has {classes} classes, but names {len(names)}")
    # Use all images of any other data set: the two shares apply only to the training set of the run.
    data = replace(opened.recipe.data, hold_out=0.0, fraction=1.0)
    described = replace(opened.recipe, model=replace(opened.recipe.model, num_classes=classes), data=data)
    two_heads = described.model.arch == "deit" and described.model.distilled
    head = headline_head(HEADS if two_heads else HEADS[:1], described.departures.late_fusion)
    return Loaded(model.eval(), evaluation_transform(described), names, kind, head, described, opened.path)


def _count_classes(opened: OpenedCheckpoint, kind: Weights) -> int:
    """The length of the class head's bias."""
    state = state_dict(opened.stored, ema=kind == "ema", source=str(opened.path))
    if "head.bias" not in state:
        raise UserError(f"{opened.path} does not say how many classes it has: no head.bias")
    return len(state["head.bias"])


def evaluation_transform(recipe: Recipe) -> Callable[[Image.Image], Tensor]:
    """Turns an upright RGB image into (3, S, S) float32: timm's evaluation transform, whose bits evaluation has."""
    from timm.data import create_transform

    transform: Any = create_transform(
        recipe.model.img_size,
        is_training=False,
        crop_pct=recipe.augment.eval_crop,
        interpolation="bicubic",
        mean=recipe.augment.mean,
        std=recipe.augment.std,
    )
    return transform
