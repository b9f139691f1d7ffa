"""The class and the distillation token of a checkpoint: how alike they are, and where they look."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdeit.loading import Loaded
from fastdeit.memory import enough_for
from fastdeit.model.deit import DeiT, token_cosines
from fastdeit.report.pictures import Missing, Picture, as_pixels
from fastdeit.subsets import spaced

MAPS = 6  # images
_ORANGE = (255.0, 130.0, 20.0)


def look_at_tokens(
    loaded: Loaded, images: Tensor, names: list[str]
) -> tuple[list[float] | Missing, list[list[Picture]] | Missing]:
    """Mean cosine of the two tokens by layer over `images` (B, 3, S, S), and attention maps for a few of them.

    names  of the images' classes
    """
    model, missing = loaded.model, Missing(f"a {loaded.recipe.model.arch} has no tokens")
    if not isinstance(model, DeiT):
        return missing, missing
    one = Missing("the network has no distillation token")
    with enough_for("looking at", images, "--batch", images.device):
        cosine = token_cosines(model.tokens_by_layer(images)) if model.distilled else one
        chosen = spaced(len(images), MAPS)
        weights = attention_maps(model, images[chosen]).cpu().numpy()  # (T, B, rows, columns)
    pixels, out = as_pixels(images[chosen], loaded.recipe), []
    for at, image in enumerate(pixels):
        row = [Picture(image, f"validation image of class {names[chosen[at]]}", names[chosen[at]])]
        for token, attention in zip(("class token", "distillation token"), weights[:, at], strict=False):
            top, left = np.unravel_index(attention.argmax(), attention.shape)
            where = f"highest at patch row {top + 1}, column {left + 1} of {attention.shape[0]} x {attention.shape[1]}"
            shows = f"attention of the {token} over that image: {where}"
            row.append(Picture(heated(image, attention), shows, token))
        out.append(row)
    return cosine, out


@torch.inference_mode()
def attention_maps(model: DeiT, images: Tensor) -> Tensor:
    """Attention of the class token, and of the distillation token, over the patches in the last block, mean over heads.

    (T, B, rows, columns) float32 for `images` (B, 3, S, S). A token's map sums to less than 1: the rest
    of its attention goes to the tokens themselves.
    """
    seen: list[Tensor] = []
    attention: Any = model.blocks[-1].attn  # pyright: ignore[reportAttributeAccessIssue]
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        hook.remove()
    batch, count, _ = seen[0].shape
    q, k, _ = attention.qkv(seen[0]).reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (attention.q_norm(q) * attention.scale @ attention.k_norm(k).transpose(-2, -1)).softmax(-1).mean(1)
    tokens = model.num_prefix_tokens
    return weights[:, :tokens, tokens:].unflatten(-1, model.patch_embed.grid_size).transpose(0, 1).float()


def heated(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """`image` (S, S, 3) uint8 in grey, with patches as orange as `attention` (rows, columns) is high."""
    patch = np.ones((image.shape[0] // attention.shape[0], image.shape[1] // attention.shape[1], 1))
    heat = 0.8 * np.kron(attention[..., None] / max(float(attention.max()), 1e-12), patch)
    grey = 0.7 * image.mean(2, keepdims=True)
    return (grey * (1 - heat) + np.array(_ORANGE) * heat).astype(np.uint8)
