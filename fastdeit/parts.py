"""A recipe's network and loss for anyone's training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fastdeit.config import Recipe
from fastdeit.model.deit import StudentOutput
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import recipe_of
from fastdeit.training.objective import build_objective


def create_model(
    recipe: str | Recipe = "deit_small", *, num_classes: int = 1000, img_size: int | None = None
) -> VisionTransformer:
    """timm's network with a recipe's shape, stochastic depth and dropout, and timm's initial weights.

    recipe    name of a recipe, or a recipe with `model.arch` "deit"
    img_size  side of the images, pixels; None: the recipe's

    If the recipe has `curriculum.sizes`, the network accepts all of them.

    In training mode a distilled network returns the logits (B, K) of both heads, as `objective` takes them, and in eval
    mode their mean. `fastdeit.fuse(model.cuda())` puts in the kernels. Raises UserError for an unknown recipe, another
    arch, and a size that is not a multiple of the patches'.
    """
    made = recipe_of(recipe)
    cfg = made.model
    if cfg.arch != "deit":
        raise UserError(f"recipe {made.name} trains a {cfg.arch}: timm.create_model('{cfg.arch}') makes it")
    size = img_size or cfg.img_size
    if size % cfg.patch_size:
        raise UserError(f"img_size {size} is not a multiple of the recipe's patches of {cfg.patch_size} pixels")
    shape: dict[str, Any] = {
        "img_size": size,
        "patch_size": cfg.patch_size,
        "embed_dim": cfg.embed_dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_ratio": cfg.mlp_ratio,
        "num_classes": num_classes,
        "init_values": cfg.layer_scale or None,
        "drop_path_rate": cfg.drop_path,
        "proj_drop_rate": cfg.drop_rate,
        "pos_drop_rate": cfg.drop_rate,
        **({"no_embed_class": True} if cfg.no_embed_class else {}),
        **({"dynamic_img_size": True} if made.curriculum.sizes else {}),
    }
    if cfg.distilled and cfg.no_embed_class:
        raise UserError("timm has no network with a distillation token without a position: set distilled to False")
    model = (VisionTransformerDistilled if cfg.distilled else VisionTransformer)(**shape)
    if cfg.drop_path and cfg.drop_path_uniform:
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = (DropPath(cfg.drop_path) for _ in range(2))
    model.set_grad_checkpointing(cfg.grad_checkpointing)
    if isinstance(model, VisionTransformerDistilled):
        model.set_distilled_training(True)
    return model


def objective(recipe: str | Recipe = "deit_small") -> Callable[..., Tensor]:
    """A recipe's loss: a function of (output, targets, teacher) that returns a float32 scalar.

    output   logits (B, K), or the pair of both heads' logits that a distilled network of timm or fastdeit returns
    targets  (B,) integers or (B, K) distributions, as `create_loader` gives them
    teacher  the teacher's logits (B, K), or for hard distillation also its labels (B,); None without distillation

    Raises UserError for an unknown recipe; the function raises ValueError for inputs that do not fit the recipe.
    """
    made = recipe_of(recipe).resolved()
    loss = build_objective(made.objective, made.model.distilled, made.departures)
    hard = made.objective.distillation == "hard"

    def compute(output: Tensor | tuple[Tensor, Tensor], targets: Tensor, teacher: Tensor | None = None) -> Tensor:
        student = StudentOutput(output, None) if isinstance(output, Tensor) else StudentOutput(*output)
        if targets.ndim == 1:
            targets = F.one_hot(targets, student.cls.shape[-1]).float()
        if hard and teacher is not None and teacher.is_floating_point():
            teacher = teacher.argmax(1)
        return loss(student, targets, teacher).loss

    return compute
