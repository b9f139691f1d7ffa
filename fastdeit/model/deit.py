"""The DeiT vision transformer, in timm's layers and timm's parameter names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdeit.kernels.reference import Kept, assemble_tokens, select_kept
from fastdeit.model.drop_path import DropPath, SkipPath, kept_samples
from fastdeit.model.dropout import KeyedDropout
from fastdeit.sections import ModelConfig


class StudentOutput(NamedTuple):
    """Logits of a student: `cls` (B, K) of the class token, `dist` (B, K) of the distillation token or None."""

    cls: Tensor
    dist: Tensor | None


class NarrowLayerScale(LayerScale):
    """LayerScale whose result has the dtype of its input, as a residual stream in bf16 needs."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gamma).to(x.dtype)


class SkippingBlock(Block):
    """A block whose branches skip the samples that stochastic depth drops."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("a block that skips samples has no attention mask: set model.drop_path_mode 'mask'")
        x = self.drop_path1(x, lambda kept: self.ls1(self.attn(self.norm1(kept))))
        return self.drop_path2(x, lambda kept: self.ls2(self.mlp(self.norm2(kept))))


class DeiT(nn.Module):
    """A DeiT with or without distillation token (paper, section 4, Figure 2), or a DeiT III (arXiv 2204.07118).

    Its state dict matches timm's `deit_*_patch16_*` or `deit_*_distilled_patch16_*`, and with `layer_scale` and
    `no_embed_class` timm's `deit3_*`; a DeiT III may have a distillation token, too. Weights are initialised as in the
    released code: truncated normal with standard deviation 0.02 for linear layers, tokens and positions, zero biases,
    and PyTorch's default for the patch projection. (timm 1.0 differs only in `cls_token`: 1e-6.)
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
        layer_scale: float = 0.0,
        no_embed_class: bool = False,
        drop_rate: float = 0.0,
        drop_path_mode: Literal["mask", "skip"] = "mask",
        residual_dtype: Literal["float32", "bfloat16"] = "float32",
        grad_checkpointing: bool = False,
    ) -> None:
        """`layer_scale` is the initial value of LayerScale's factors, 0 for none (Touvron et al., arXiv 2103.17239).
        `no_embed_class` gives only the patches a position. `grad_checkpointing` keeps only the tensors between blocks
        for the backward pass, which computes each block again; the gradients have the same bits.

        `drop_rate` applies to the tokens after the position embedding, to the output of attention, and in the MLP
        after the activation and to the output: see `set_dropout`.

        `drop_path_mode` "skip" leaves dropped samples out of the computation: see `set_drop_path`. `residual_dtype`
        "bfloat16" keeps the sum of all branches in bf16 under autocast to bf16; otherwise it is float32.
        """
        super().__init__()
        self.num_classes, self.distilled = num_classes, distilled
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans=3, embed_dim=embed_dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        positions = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        self._patch_size, self._grid = patch_size, img_size // patch_size
        self._resized: dict[int, Tensor] = {}  # number of patches -> matrix that resizes the position embedding
        self.pos_drop = nn.Dropout(0.0)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self._skips, self._residual_dtype = drop_path_mode == "skip", getattr(torch, residual_dtype)
        self._grad_checkpointing = grad_checkpointing
        block, path = (SkippingBlock, SkipPath) if self._skips else (Block, DropPath)
        scale = layer_scale or None
        self.blocks = nn.ModuleList(
            block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm, init_values=scale)
            for _ in range(depth)
        )
        if scale is not None and self._residual_dtype is torch.bfloat16:
            for module in self.blocks:
                module.ls1, module.ls2 = (NarrowLayerScale(embed_dim, scale) for _ in range(2))
        self._drop_paths: list[Any] = []
        for module in self.blocks:
            module.drop_path1, module.drop_path2 = path(), path()
            self._drop_paths += [module.drop_path1, module.drop_path2]
        self._dropouts: list[tuple[KeyedDropout, Any]] = []  # each with the stochastic depth of its branch, if any
        if drop_rate > 0:
            self._add_dropout(drop_rate)
        self.norm = norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        self._init_weights()

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1, or 2 with the distillation token."""
        return 2 if self.distilled else 1

    def _add_dropout(self, rate: float) -> None:
        self.pos_drop = KeyedDropout(rate, 0)
        self._dropouts.append((self.pos_drop, None))
        for module in self.blocks:
            for branch, path, names in (
                (module.attn, module.drop_path1, ("proj_drop",)),
                (module.mlp, module.drop_path2, ("drop1", "drop2")),
            ):
                for name in names:
                    dropout = KeyedDropout(rate, len(self._dropouts))
                    setattr(branch, name, dropout)
                    self._dropouts.append((dropout, path))

    def _init_weights(self) -> None:
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def set_drop_path(self, masks: Tensor | None, kept: Sequence[int] | None = None) -> None:
        """Set stochastic depth for the next forward passes in training mode; None: no samples are dropped.

        masks  (depth, 2, B) float32 on the model's device, kept by reference: see `pipelines.plan.drop_path`
        kept   only for a model that skips: (depth,) number of samples that each branch of a block keeps; it determines
               the sizes of the block's tensors

        Raises ValueError for masks of another shape, if a model that skips gets no `kept`, and if `masks` are on the
        CPU and do not keep as many samples as `kept` says.
        """
        blocks = len(self.blocks)
        if masks is not None and (masks.ndim != 3 or masks.shape[:2] != (blocks, 2)):
            raise ValueError(
                f"drop path masks of shape {tuple(masks.shape)}: {blocks} blocks need ({blocks}, 2, batch)"
            )
        branches: Sequence[Any] = [None] * 2 * blocks if masks is None else masks.flatten(0, 1).unbind()
        if masks is not None and self._skips:
            if kept is None or len(kept) != blocks:
                raise ValueError(
                    f"kept is {kept}: a model that skips needs the number of samples that each of {blocks} blocks keeps"
                )
            branches = kept_samples(masks.flatten(0, 1), [count for count in kept for _ in range(2)])
        for module, mask in zip(self._drop_paths, branches, strict=True):
            module.mask = mask

    def set_dropout(self, keys: Tensor | None) -> None:
        """Set the samples' keys of dropout for the next forward passes in training mode, after `set_drop_path`.

        keys  (B,) int64 on the model's device: see `pipelines.plan.dropout`. None: PyTorch's generator draws
        """
        for dropout, path in self._dropouts:
            kept = path.mask if path is not None and isinstance(path.mask, Kept) else None
            dropout.keys = None if keys is None else select_kept(keys, kept)

    def _stream_dtype(self, pixels: Tensor) -> torch.dtype | None:
        """The dtype of the residual stream, if it differs from the result of adding positions to patches."""
        device, wanted = pixels.device.type, self._residual_dtype
        if wanted is torch.float32 or not torch.is_autocast_enabled(device):
            return None
        return wanted if torch.get_autocast_dtype(device) is wanted else None

    def accept_sizes(self, sizes: Iterable[int]) -> None:
        """Also accept square images of these sizes (pixels). Call it once the model is on its final device.

        The position embedding is resized for them in each forward pass, as by timm's `resample_abs_pos_embed`: bicubic
        with antialias. Raises ValueError for a side that is not a multiple of the patch size.
        """
        for size in sizes:
            if size < 1 or size % self._patch_size:
                raise ValueError(
                    f"images of {size} pixels: that is not a multiple of the patch size {self._patch_size}"
                )
            if (grid := size // self._patch_size) != self._grid:
                self._resized[grid**2] = self._resizing(grid).to(self.pos_embed.device)

    def _resizing(self, grid: int) -> Tensor:
        """Matrix that resizes the model's position embedding to `grid` x `grid` patches.

        A matrix product has a deterministic gradient on a GPU; the backward pass of PyTorch's interpolation has not.
        """
        patches = self._grid**2
        unit = torch.eye(patches).view(patches, 1, self._grid, self._grid)
        resized = F.interpolate(unit, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
        return torch.block_diag(torch.eye(self.pos_embed.shape[1] - patches), resized.flatten(1).T)

    def _positions(self, pixels: Tensor) -> Tensor:
        """The position embedding for images, or for images in patches."""
        patches = pixels.shape[1]
        if pixels.ndim == 4:
            height, width = pixels.shape[2:]
            patches = (height // self._patch_size) ** 2 if height == width and height % self._patch_size == 0 else 0
        if patches == self._grid**2:
            return self.pos_embed
        if patches not in self._resized:
            side = self._grid * self._patch_size
            raise ValueError(
                f"images of shape {tuple(pixels.shape)}: the model takes {side} x {side} pixels, and the sizes that "
                f"`accept_sizes` was given"
            )
        with torch.autocast(pixels.device.type, enabled=False):
            return self._resized[patches].to(self.pos_embed.dtype) @ self.pos_embed

    def _assemble(self, pixels: Tensor) -> Tensor:
        positions = self._positions(pixels)
        if pixels.ndim == 3:
            projection = self.patch_embed.proj
            patches = F.linear(pixels, projection.weight.flatten(1), projection.bias)
        else:
            patches = self.patch_embed(pixels)
        sequence = self.cls_token, self.dist_token, positions
        return assemble_tokens(patches, *sequence, dtype=self._stream_dtype(pixels))

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.pos_drop(self._assemble(pixels))

    def _checkpointed(self, function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        """The result of `function`; with gradient checkpointing, autograd keeps only `tensors` of what it computes."""
        if not (self._grad_checkpointing and torch.is_grad_enabled()):
            return function(*tensors)
        random = self.training and any(dropout.keys is None for dropout, _ in self._dropouts)
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=random)

    def _run_blocks(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = self._checkpointed(block, tokens)
        return tokens

    def _prefix(self, tokens: Tensor) -> Tensor:
        """The normalised tokens (B, 1 or 2, C) that the heads read; `tokens` enter the first block."""
        return self.norm(self._run_blocks(tokens)[:, : self.num_prefix_tokens])

    def _logits(self, prefix: Tensor) -> StudentOutput:
        dist = None if self.head_dist is None else self.head_dist(prefix[:, 1])
        return StudentOutput(self.head(prefix[:, 0]), dist)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Normalised tokens (B, N, C) after the last block; `pixels` as in `forward`."""
        return self.norm(self._run_blocks(self._embed(pixels)))

    def forward(self, pixels: Tensor) -> StudentOutput:
        """Logits of images (B, 3, S, S), or of images in patches (B, S^2 / P^2, 3 * P * P), channel by channel.

        S is the model's `img_size`, or one of those given to `accept_sizes`.

        It never averages the heads' outputs; evaluation does: see `kernels.reference.head_log_probabilities`.
        """
        return self._logits(self._prefix(self._embed(pixels)))

    @torch.no_grad()
    def tokens_by_layer(self, pixels: Tensor) -> list[Tensor]:
        """Class and distillation token before the first block and after each block: depth + 1 tensors (B, 2, C).

        The paper reports their cosine: 0.06 at the input, 0.93 at the last layer (section 4). Raises ValueError for a
        model without distillation token.
        """
        if not self.distilled:
            raise ValueError("this model has no distillation token: build it with model.distilled")
        tokens = self._embed(pixels)
        out = [tokens[:, :2]]
        for block in self.blocks:
            tokens = block(tokens)
            out.append(tokens[:, :2])
        return out


def token_cosines(tokens: Sequence[Tensor]) -> list[float]:
    """Mean cosine of class and distillation token in each layer; `tokens` are those of `DeiT.tokens_by_layer`."""
    return [F.cosine_similarity(t[:, 0].double(), t[:, 1].double(), dim=-1).mean().item() for t in tokens]


def build_model(cfg: ModelConfig, num_classes: int) -> DeiT:
    """A freshly initialised DeiT; weights come from PyTorch's global generator.

    The model does not draw stochastic depth itself: see `pipelines.plan.drop_path` and `DeiT.set_drop_path`.
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
        layer_scale=cfg.layer_scale,
        no_embed_class=cfg.no_embed_class,
        drop_rate=cfg.drop_rate,
        drop_path_mode=cfg.drop_path_mode,
        residual_dtype=cfg.residual_dtype,
        grad_checkpointing=cfg.grad_checkpointing,
    )
