"""Replace operations of a timm vision transformer by Triton kernels; weights and state dict stay unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerNorm, LayerScale, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fastdeit.kernels.attention import attention
from fastdeit.kernels.bias_gelu import bias_gelu
from fastdeit.kernels.layer_norm import MAX_WIDTH, add_layer_norm, layer_norm
from fastdeit.kernels.reference import Kept, add_branch, as_patches
from fastdeit.kernels.token_assembly import assemble_tokens, embed_patches
from fastdeit.model.deit import DeiT, NarrowLayerScale, SkippingBlock, StudentOutput
from fastdeit.model.drop_path import DropPath as PlannedDropPath
from fastdeit.model.drop_path import SkipPath, check_batch


class Branch(NamedTuple):
    """The output of attention or an MLP, not yet added to the residual stream.

    bias   of the layer that made it, if the addition must also compute the bias's gradient; None: the layer does
    scale  factors (C,) of LayerScale, or None
    mask   factors (B,) of stochastic depth; a `Kept` if `value` holds only the kept samples; or None
    """

    value: Tensor
    bias: Tensor | None
    scale: Tensor | None
    mask: Tensor | Kept | None


class Swap(NamedTuple):
    """Result of `fuse`: names of the modules that now run kernels, and "name: reason" for those that do not."""

    replaced: list[str]
    left: list[str]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the next GEMM, so that the normalisation casts its output in the same pass."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _norm(module: Any, x: Tensor, only: Kept | None) -> Tensor:
    return layer_norm(x, module.weight, module.bias, module.eps, only=only, dtype=_autocast_dtype(x))


def _add_norm(x: Tensor, branch: Branch, module: Any, only: Kept | None = None) -> tuple[Tensor, Tensor]:
    return add_layer_norm(
        x,
        branch.value,
        module.weight,
        module.bias,
        module.eps,
        scale=branch.scale,
        mask=branch.mask,
        only=only,
        branch_bias=branch.bias,
        dtype=_autocast_dtype(x) or branch.value.dtype,
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module runs only its class's `forward`: it has no hooks, and no method was replaced."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in vars(module)


def _separate_bias(layer: nn.Module) -> Tensor | None:
    """A layer's bias if the code that reads its result computes the bias's gradient; None if the layer does.

    That saves a pass over the gradient. Adapters, parametrisations and hooks stay as they are.
    """
    if type(layer) is not nn.Linear or layer.bias is None or not layer.bias.requires_grad or not _is_plain(layer):
        return None
    return layer.bias


def _linear(layer: Any, x: Tensor) -> Tensor:
    """The result of a layer, without gradient for its `_separate_bias`."""
    bias = _separate_bias(layer)
    return layer(x) if bias is None else F.linear(x, layer.weight, bias.detach())


def _does_nothing(dropout: nn.Module) -> bool:
    return _is_plain(dropout) and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.p))


def _kept(drop_path: nn.Module, x: Tensor) -> Kept | None:
    """The samples of the stream `x` that the branch of `drop_path` computes; None: all."""
    return drop_path.of(x) if isinstance(drop_path, SkipPath) else None


def _drop_path_mask(module: nn.Module, value: Tensor) -> Tensor | Kept | None:
    """The `mask` for a branch's `value`, from the same random numbers as the module's own forward pass."""
    if isinstance(module, nn.Identity) or not module.training:
        return None
    if isinstance(module, SkipPath):  # `_kept` has checked the batch
        return module.mask
    if isinstance(module, PlannedDropPath):
        if module.mask is not None:
            check_batch(module.mask, value)
        return module.mask
    assert isinstance(module, DropPath)
    keep = 1.0 - module.drop_prob
    if keep == 1.0:
        return None
    mask = value.new_empty((len(value), 1, 1)).bernoulli_(keep).view(-1).float()
    return mask / keep if keep > 0.0 and module.scale_by_keep else mask


class _Attention(Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("the fused attention has no mask: take a model that `fuse` has not touched")
        return self.first_rows(x, x.shape[1])

    def first_rows(self, x: Tensor, rows: int) -> Tensor:
        """The first `rows` tokens of the result, (B, rows, C)."""
        return self.proj_drop(self.proj(self._attend(x, rows)))

    def branch(self, x: Tensor, rows: int) -> Tensor:
        """As `first_rows`, without gradient for `branch_bias`."""
        return _linear(self.proj, self._attend(x, rows)) if self.branch_bias is not None else self.first_rows(x, rows)

    @property
    def branch_bias(self) -> Tensor | None:
        """The bias in the result of `branch` that lacks its gradient, or None."""
        return _separate_bias(self.proj) if _does_nothing(self.proj_drop) else None

    def _attend(self, x: Tensor, rows: int) -> Tensor:
        qkv = _linear(self.qkv, x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        return attention(qkv, bias=_separate_bias(self.qkv), rows=rows)


class _Mlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self._hidden(x)))

    def branch(self, x: Tensor) -> Tensor:
        """The result, without gradient for `branch_bias`."""
        return _linear(self.fc2, self._hidden(x)) if self.branch_bias is not None else self(x)

    @property
    def branch_bias(self) -> Tensor | None:
        """The bias in the result of `branch` that lacks its gradient, or None."""
        return _separate_bias(self.fc2) if _does_nothing(self.drop2) else None

    def _hidden(self, x: Tensor) -> Tensor:
        if type(self.fc1) is not nn.Linear:  # replaced by an adapter after fusing
            return self.norm(self.drop1(self.act(self.fc1(x))))
        hidden = bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias)  # pyright: ignore[reportArgumentType]
        return self.norm(self.drop1(hidden))


class _Block(Block):
    """A block in pieces, so that each addition is fused with the next normalisation, even if that is in the next block.

    The first normalisation holds only the samples that attention computes; the second, those that the MLP computes.
    """

    def begin(self, x: Tensor, pending: Branch | None) -> tuple[Tensor, Tensor]:
        """Add the previous block's branch; return the residual stream and its first normalisation."""
        only = _kept(self.drop_path1, x)
        return (x, _norm(self.norm1, x, only)) if pending is None else _add_norm(x, pending, self.norm1, only)

    def attend(self, x: Tensor, normalized: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """The stream after attention and its second normalisation, from the stream and its first.

        rows  compute only the first tokens of the result; None: all
        """
        rows, attn = x.shape[1] if rows is None else rows, self.attn
        if isinstance(attn, _Attention) and _is_plain(attn):
            value, bias = attn.branch(normalized, rows), attn.branch_bias
        else:
            value, bias = attn(normalized)[:, :rows], None
        branch = Branch(value, bias, _scale(self.ls1), _drop_path_mask(self.drop_path1, value))
        return _add_norm(x[:, :rows], branch, self.norm2, _kept(self.drop_path2, x))

    def feed(self, normalized: Tensor) -> Tensor:
        """The value of the MLP's branch, from the stream's second normalisation."""
        mlp = self.mlp
        return mlp.branch(normalized) if isinstance(mlp, _Mlp) and _is_plain(mlp) else mlp(normalized)

    def pending(self, value: Tensor) -> Branch:
        """The MLP's branch with the value that `feed` returned."""
        mlp = self.mlp
        bias = mlp.branch_bias if isinstance(mlp, _Mlp) and _is_plain(mlp) else None
        return Branch(value, bias, _scale(self.ls2), _drop_path_mask(self.drop_path2, value))

    def end(self, x: Tensor, normalized: Tensor) -> Tensor:
        """The stream after the MLP, without another normalisation."""
        value = self.mlp(normalized)
        return add_branch(x, value, _drop_path_mask(self.drop_path2, value), _scale(self.ls2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("the fused attention has no mask: take a model that `fuse` has not touched")
        return self.end(*self.attend(*self.begin(x, None)))


def _scale(module: nn.Module) -> Tensor | None:
    """The factors of LayerScale; None without it."""
    return module.gamma if isinstance(module, LayerScale) else None


def _all_fused(blocks: Iterable[nn.Module]) -> bool:
    return all(type(block) is _Block for block in blocks)


class _Blocks(nn.Sequential):
    """A sequence of blocks that fuses the addition after each MLP with the next block's normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        if not _all_fused(self):  # some were replaced or wrapped after fusing
            return super().forward(x)
        pending: Branch | None = None
        for number, block in enumerate(self, 1):
            assert isinstance(block, _Block)
            x, normalized = block.attend(*block.begin(x, pending))
            if number == len(self):
                return block.end(x, normalized)
            pending = block.pending(block.feed(normalized))
        return x


def _run_block(
    block: _Block, previous: _Block | None, rows: int | None, x: Tensor, value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A block of a DeiT up to its MLP, after adding the `value` of the MLP in the `previous` block."""
    pending = None if previous is None or value is None else previous.pending(value)
    x, normalized = block.attend(*block.begin(x, pending), rows)
    return x, block.feed(normalized)


class _DeiT(DeiT):
    """Fuse blocks across their borders, compute only tokens that a head reads, and both heads in one product."""

    def _prefix(self, tokens: Tensor) -> Tensor:
        if not _all_fused(self.blocks):
            return super()._prefix(tokens)
        # Between two blocks are the stream and the value of the MLP before, which is not added yet.
        x, value, previous = tokens, None, None
        for number, block in enumerate(self.blocks, 1):
            assert isinstance(block, _Block)
            rows = self.num_prefix_tokens if number == len(self.blocks) else None
            x, value = self._checkpointed(partial(_run_block, block, previous, rows), x, value)
            previous = block
        assert previous is not None
        assert value is not None
        return _add_norm(x, previous.pending(value), self.norm)[1]

    def _logits(self, prefix: Tensor) -> StudentOutput:
        if self.head_dist is None:
            return super()._logits(prefix)
        heads = self.head, self.head_dist
        weight, bias = torch.stack([head.weight for head in heads]), torch.stack([head.bias for head in heads])
        return StudentOutput(*torch.baddbmm(bias[:, None], prefix.transpose(0, 1), weight.transpose(1, 2)).unbind())


class _AssemblingDeiT(_DeiT):
    def _assemble(self, pixels: Tensor) -> Tensor:
        projection, positions = self.patch_embed.proj, self._positions(pixels)
        if pixels.ndim == 4:
            # Use the same arithmetic for images and patches: a run with a teacher gets images, others get patches.
            pixels = as_patches(pixels, projection.kernel_size[0])
        sequence = self.cls_token, self.dist_token, positions
        dtype = self._stream_dtype(pixels)
        return embed_patches(pixels, projection.weight, projection.bias, *sequence, dtype=dtype)


class _Tokens:
    def _pos_embed(self, x: Tensor) -> Tensor:
        other: Any = getattr(self, "dist_token", None)
        if other is None:
            other = getattr(self, "reg_token", None)
        return self.pos_drop(assemble_tokens(x, self.cls_token, other, self.pos_embed))  # pyright: ignore


class _VisionTransformer(_Tokens, VisionTransformer):
    pass


class _VisionTransformerDistilled(_Tokens, VisionTransformerDistilled):
    pass


def _why_not_attention(module: Attention) -> str | None:
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(module, name), nn.Identity):
            return f"has {name}"
    if getattr(module, "gate", None) is not None:
        return "has a gate"
    if module.attn_drop.p > 0:
        return "has dropout on the attention weights"
    return "has a head dim above 128" if module.head_dim > 128 else None


def _why_not_mlp(module: Mlp) -> str | None:
    # A subclass such as LoRA's may compute something else.
    if type(module.fc1) is not nn.Linear or module.fc1.bias is None:
        return "its first layer is not a plain nn.Linear with a bias"
    if module.fc1._forward_pre_hooks:  # weight norm, spectral norm and pruning recompute the weight there
        return "its first layer has a forward pre-hook"
    if type(module.act) is not nn.GELU or module.act.approximate != "none":
        return f"its activation is {type(module.act).__name__}, not the exact GELU"
    return None


def _why_not_block(module: Block) -> str | None:
    for name in ("ls1", "ls2"):
        if type(getattr(module, name)) not in (nn.Identity, LayerScale, NarrowLayerScale):
            return f"{name} is unknown"
    for name in ("norm1", "norm2"):
        norm = getattr(module, name)
        if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.weight is None or norm.bias is None:
            return f"{name} is not a LayerNorm with weight and bias"
        if len(norm.weight) > MAX_WIDTH:
            return f"has more than {MAX_WIDTH} channels"
    for name in ("drop_path1", "drop_path2"):
        if type(getattr(module, name)) not in (nn.Identity, DropPath, PlannedDropPath, SkipPath):
            return f"{name} is unknown"
    return None


def _why_not_tokens(module: VisionTransformer) -> str | None:
    if module.cls_token is None or module.pos_embed is None:
        return "has no class token or no position embedding"
    return "dynamic_img_size is set" if module.dynamic_img_size else None


def _suits(module: nn.Module) -> None:
    return None


_SWAPS: tuple[tuple[str, type[nn.Module], type[nn.Module], Callable[[Any], str | None]], ...] = (
    ("attention", Attention, _Attention, _why_not_attention),
    ("bias_gelu", Mlp, _Mlp, _why_not_mlp),
    ("layer_norm", Block, _Block, _why_not_block),
    ("layer_norm", SkippingBlock, _Block, _why_not_block),
    ("assemble_tokens", VisionTransformer, _VisionTransformer, _why_not_tokens),
    ("assemble_tokens", VisionTransformerDistilled, _VisionTransformerDistilled, _why_not_tokens),
    ("assemble_tokens", DeiT, _AssemblingDeiT, _suits),
)
_KINDS: tuple[type[nn.Module], ...] = tuple(kind for _, kind, _, _ in _SWAPS)
_KNOWN = (*(fused for _, _, fused, _ in _SWAPS), _DeiT)


def fuse(model: nn.Module, without: Mapping[str, str] = MappingProxyType({})) -> Swap:
    """Make a timm ViT or DeiT, or this package's DeiT, run the Triton kernels wherever they compute the same.

    model    changed in place: attention, MLP, block and token assembly get another forward pass; parameters, buffers,
             module names and state dict stay. Forward hooks of blocks, of their norms, LayerScale and stochastic
             depth, and of an MLP's fc1 and act no longer run; hooks of other modules do
    without  operations to leave to PyTorch, and why: "assemble_tokens", "attention", "layer_norm" or "bias_gelu"

    Returns the replaced modules, and the others with the reason, including subclasses of the replaceable types. A fused
    model needs a CUDA device. Fusing again changes nothing. Raises TypeError if `model` is not a module, and ValueError
    for a model with nothing to replace or an unknown operation.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse needs a model, not a {type(model).__name__}: give it the result of timm.create_model")
    ops = sorted({op for op, *_ in _SWAPS})
    for op in without:
        if op not in ops:
            raise ValueError(f"without: '{op}' is not an operation: choose from {', '.join(ops)}")
    swap = Swap([], [])
    known = False
    for name, module in model.named_modules():
        known |= isinstance(module, _KNOWN)
        if isinstance(module, _KINDS) and type(module) not in (*_KINDS, *_KNOWN):
            swap.left.append(f"{name or 'tokens'}: is a {type(module).__name__}, which may compute something else")
        for op, kind, fused, why_not in _SWAPS:
            if type(module) is not kind:
                continue
            reason = without.get(op) or why_not(module)
            if reason is None:
                module.__class__ = fused
                swap.replaced.append(name or "tokens")
            else:
                swap.left.append(f"{name or 'tokens'}: {reason}")
    blocks = getattr(model, "blocks", None)
    if type(blocks) is nn.Sequential and len(blocks) and _all_fused(blocks):
        blocks.__class__ = _Blocks
        swap.replaced.append("blocks")
    if type(model) is DeiT and swap.replaced:
        model.__class__ = _DeiT
    if not swap.replaced and not known:
        reasons = "; ".join(swap.left) or "it has no timm Attention, Mlp or Block"
        raise ValueError(f"nothing in {type(model).__name__} can be fused: {reasons}")
    return swap
