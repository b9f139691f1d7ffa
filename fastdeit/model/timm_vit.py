"""What a vision transformer of timm has in common with a DeiT."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import Block, VisionTransformer

from fastdeit.sections import ModelConfig


def size_option(arch: str, img_size: int | None) -> dict[str, Any]:
    """The option that builds timm's `arch` for a resolution; none for a network that takes any size."""
    cfg = timm.get_pretrained_cfg(arch)
    return {"img_size": img_size} if img_size is not None and cfg is not None and cfg.fixed_input_size else {}


@functools.cache
def as_deit(cfg: ModelConfig) -> ModelConfig | None:
    """The DeiT that has the shape of timm's vision transformer `cfg.arch`; None for any other network.

    Checks of kernels and the table of their times go by shapes, which are those of this DeiT.
    """
    if not timm.is_model(cfg.arch):
        return None
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(cfg.arch, pretrained=False, **size_option(cfg.arch, cfg.img_size))
    except (RuntimeError, TypeError, AssertionError):  # it needs real values, or another size
        return None
    if not isinstance(network, VisionTransformer) or type(network.blocks[0]) is not Block:
        return None
    block: Any = network.blocks[0]
    grid, patch = network.patch_embed.grid_size, network.patch_embed.patch_size
    if grid[0] != grid[1] or patch[0] != patch[1]:
        return None
    return replace(
        cfg,
        arch="deit",
        img_size=grid[0] * patch[0],
        patch_size=patch[0],
        embed_dim=network.embed_dim,
        depth=len(network.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / network.embed_dim if hasattr(block.mlp, "fc1") else cfg.mlp_ratio,
        layer_scale=1e-5 if isinstance(block.ls1, LayerScale) else 0.0,
        no_embed_class=network.no_embed_class,
    )
