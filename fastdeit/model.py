"""The DeiT vision transformer, in timm's layers and timm's parameter names."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastdeit.config import ModelConfig
from fastdeit.drop_path import DropPath
from fastdeit.kernels.reference import assemble_tokens


class StudentOutput(NamedTuple):
    """Logits of a student: `cls` (B, K) of the class token, `dist` (B, K) of the distillation token or None."""

    cls: Tensor
    dist: Tensor | None


class DeiT(nn.Module):
    """A DeiT with or without distillation token (paper, section 4, Figure 2).

    Its state dict is that of timm's `deit_*_patch16_*` or `deit_*_distilled_patch16_*`. Initial weights are the
    released code's: normal of deviation 0.02 for linear layers, tokens and positions, zero biases, PyTorch's own
    for the patch projection. (timm 1.0 differs in `cls_token` alone: deviation 1e-6.)
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        distilled: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        """`drop_rate` is that of the tokens after the position embedding and of both branches' outputs."""
        super().__init__()
        self.num_classes, self.distilled = num_classes, distilled
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans=3, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + self.num_prefix_tokens, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, proj_drop=drop_rate, norm_layer=norm)
            for _ in range(depth)
        )
        self._drop_paths = [(DropPath(), DropPath()) for _ in range(depth)]
        for block, (attention, mlp) in zip(self.blocks, self._drop_paths, strict=True):
            block.drop_path1, block.drop_path2 = attention, mlp
        self.norm = norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        self._init_weights()

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1, or 2 with the distillation token."""
        return 2 if self.distilled else 1

    def _init_weights(self) -> None:
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def set_drop_path(self, masks: Tensor | None) -> None:
        """Stochastic depth of the coming forward passes in training mode; None: none.

        masks  (depth, 2, B) float32 on the model's device, as `draw_drop_path` returns; it is kept by reference.
        Raises ValueError for another shape.
        """
        if masks is not None and (masks.ndim != 3 or masks.shape[:2] != (len(self.blocks), 2)):
            raise ValueError(
                f"drop path masks of shape {tuple(masks.shape)}: {len(self.blocks)} blocks need "
                f"({len(self.blocks)}, 2, batch)"
            )
        for layer, branches in enumerate(self._drop_paths):
            for branch, module in enumerate(branches):
                module.mask = None if masks is None else masks[layer, branch]

    def _embed(self, images: Tensor) -> Tensor:
        tokens = assemble_tokens(self.patch_embed(images), self.cls_token, self.dist_token, self.pos_embed)
        return self.pos_drop(tokens)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens (B, N, C) after the last block, of images (B, 3, S, S)."""
        tokens = self._embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, images: Tensor) -> StudentOutput:
        """Logits of images (B, 3, S, S). The heads' outputs are never averaged here: see `objective.fuse`."""
        tokens = self.forward_features(images)
        dist = None if self.head_dist is None else self.head_dist(tokens[:, 1])
        return StudentOutput(self.head(tokens[:, 0]), dist)

    @torch.no_grad()
    def tokens_by_layer(self, images: Tensor) -> list[Tensor]:
        """Class and distillation token at the input of the first block and after each block: depth + 1 times (B, 2, C).

        Their cosine is the paper's check: 0.06 at the input, 0.93 at the last layer (section 4). Raises ValueError
        for a model without distillation token.
        """
        if not self.distilled:
            raise ValueError("this model has no distillation token: build it with model.distilled")
        tokens = self._embed(images)
        out = [tokens[:, :2]]
        for block in self.blocks:
            tokens = block(tokens)
            out.append(tokens[:, :2])
        return out


def build_model(cfg: ModelConfig, num_classes: int) -> DeiT:
    """A freshly initialised DeiT of the shape that `cfg` names; weights come from PyTorch's global generator.

    Stochastic depth is no part of the model: see `drop_path.draw_drop_path` and `DeiT.set_drop_path`.
    """
    return DeiT(
        img_size=cfg.img_size,
        patch_size=cfg.patch_size,
        embed_dim=cfg.embed_dim,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_ratio=cfg.mlp_ratio,
        num_classes=num_classes,
        distilled=cfg.distilled,
        drop_rate=cfg.drop_rate,
    )
