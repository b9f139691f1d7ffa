"""What `kernels` compares: each operation of ours, PyTorch's own, and every alternative that can be imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import first_line
from fastdeit.kernels.attention import attention
from fastdeit.kernels.bias_gelu import bias_gelu
from fastdeit.kernels.distillation_loss import distillation_loss
from fastdeit.kernels.layer_norm import add_layer_norm, layer_norm
from fastdeit.kernels.token_assembly import assemble_tokens

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class Shape:
    """A DeiT at a resolution: `tokens` with the distillation token."""

    model: str
    tokens: int
    embed_dim: int
    heads: int


SHAPES = tuple(
    Shape(model, tokens, width, heads)
    for model, width, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))
    for tokens in (198, 578)
)


@dataclass(frozen=True)
class Work:
    """An operation on random data.

    arguments  tensors that every side takes; the floating ones have gradients
    eager      PyTorch's own, also what float64 judges by
    sides      by name, ours as "fastdeit"
    absent     alternatives that are not installed: name, and what to install
    bytes, flops  of the forward pass at least; of forward and backward
    """

    arguments: list[Tensor]
    eager: Function
    sides: dict[str, Function]
    bytes: tuple[float, float]
    flops: tuple[float, float] = (0.0, 0.0)
    absent: dict[str, str] = field(default_factory=dict)


def _draw(shape: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _sdpa_of(backend: SDPBackend) -> Function:
    def side(qkv: Tensor) -> Outputs:
        with sdpa_kernel(backend):
            return _sdpa(qkv)

    return side


def _attention(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    n, h, d = shape.tokens, shape.heads, shape.embed_dim // shape.heads
    qkv = _draw((batch, n, 3, h, d), dtype, device)
    sides: dict[str, Function] = {"fastdeit": attention}
    if device.type == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
        sides |= {f"sdpa {name}": _sdpa_of(backend) for name, backend in backends.items()}
    absent: dict[str, str] = {}
    packed = _imported("flash-attn", "flash_attn", "flash_attn_qkvpacked_func", absent)
    if packed is not None:
        sides["flash-attn"] = lambda qkv: packed(qkv).flatten(2)
    size = qkv.numel() * qkv.element_size()
    product = 2.0 * batch * h * n * n * d  # of one of the matrix products: two forward, five more backward
    moved = size * 4 / 3, size * (4 / 3 + 8 / 3)
    return Work([qkv], _sdpa, sides, moved, (2 * product, 7 * product), absent)


def _tokens(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    c, n = shape.embed_dim, shape.tokens
    tokens = [_draw((1, 1, c), torch.float32, device) for _ in range(2)]
    arguments = [_draw((batch, n - 2, c), dtype, device), *tokens, _draw((1, n, c), torch.float32, device)]

    def eager(patches: Tensor, cls_token: Tensor, dist_token: Tensor, pos_embed: Tensor) -> Tensor:
        expanded = [token.expand(len(patches), -1, -1) for token in (cls_token, dist_token)]
        return torch.cat([*expanded, patches], 1) + pos_embed

    size = batch * n * c
    low = arguments[0].element_size()
    return Work(arguments, eager, {"fastdeit": assemble_tokens}, (size * (low + 4), 2 * size * (low + 4)))


def _layer_norm(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    c = shape.embed_dim
    x = _draw((batch, shape.tokens, c), dtype, device)
    arguments = [x, *(_draw((c,), dtype, device) for _ in range(2))]
    eps = 1e-6
    sides: dict[str, Function] = {"fastdeit": lambda x, w, b: layer_norm(x, w, b, eps)}
    absent: dict[str, str] = {}
    apex = _imported(
        "apex (NVIDIA's, from its source)",
        "apex.normalization.fused_layer_norm",
        "FusedLayerNormAffineFunction",
        absent,
    )
    if apex is not None:
        sides["apex"] = lambda x, w, b: apex.apply(x, w, b, (c,), eps)
    liger = _imported("liger-kernel", "liger_kernel.ops.layer_norm", "LigerLayerNormFunction", absent)
    if liger is not None:
        sides["liger"] = lambda x, w, b: liger.apply(x, w, b, eps)
    size = x.numel() * x.element_size()
    return Work(arguments, lambda x, w, b: F.layer_norm(x, (c,), w, b, eps), sides, (2 * size, 5 * size), absent=absent)


def _add_layer_norm(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    c = shape.embed_dim
    arguments = [_draw((batch, shape.tokens, c), dtype, device) for _ in range(2)]
    arguments += [_draw((c,), dtype, device) for _ in range(2)]
    mask = (torch.arange(batch, device=device) % 8 > 0) * 1.25
    eps = 1e-6

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        return add_layer_norm(x, branch, weight, bias, eps, mask=mask[: len(x)])

    def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        total = x + branch * mask.to(x.dtype)[: len(x), None, None]
        return total, F.layer_norm(total, (c,), weight, bias, eps)

    size = arguments[0].numel() * arguments[0].element_size()
    return Work(arguments, eager, {"fastdeit": ours}, (4 * size, 9 * size))


def _bias_gelu(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    hidden = 4 * shape.embed_dim
    arguments = [_draw((batch, shape.tokens, hidden), dtype, device), _draw((hidden,), dtype, device)]
    size = arguments[0].numel() * arguments[0].element_size()
    return Work(arguments, lambda x, b: F.gelu(x + b), {"fastdeit": bias_gelu}, (2 * size, 5 * size))


def _loss(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    classes = 1000
    arguments = [_draw((batch, classes), dtype, device, 4.0) for _ in range(2)]
    target = torch.randn(batch, classes, device=device).softmax(1)
    labels = torch.randint(classes, (batch,), device=device)

    def eager(cls: Tensor, dist: Tensor) -> Tensor:
        # A loss is float32 arithmetic on either side, as under autocast; the judge's is float64.
        wide = torch.promote_types(cls.dtype, torch.float32)
        rows = slice(len(cls))
        base = F.cross_entropy(cls.to(wide), target[rows].to(wide))
        return (base + F.cross_entropy(dist.to(wide), labels[rows])) / 2

    def ours(cls: Tensor, dist: Tensor) -> Tensor:
        rows = slice(len(cls))
        return distillation_loss(cls, dist, target[rows], labels[rows]).loss

    size = batch * classes
    low = arguments[0].element_size()
    return Work(arguments, eager, {"fastdeit": ours}, (size * (2 * low + 4), size * (6 * low + 8)))


OPS: dict[str, Callable[[Shape, int, torch.dtype, torch.device], Work]] = {
    "attention": _attention,
    "assemble_tokens": _tokens,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "bias_gelu": _bias_gelu,
    "distillation_loss": _loss,
}


def _imported(package: str, module: str, name: str, absent: dict[str, str]) -> Any:
    """`module.name`, or None, with an entry in `absent`."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # what is another project's of that name may raise whatever it likes
        how = f"pip install {package}" if " " not in package else f"install {package}"
        absent[package] = how if isinstance(error, ModuleNotFoundError) else f"{how}: {first_line(error)}"
        return None


def outputs(function: Function, arguments: list[Tensor]) -> tuple[Tensor, ...]:
    out = function(*arguments)
    return out if isinstance(out, tuple) else (out,)


def _results(function: Function, arguments: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the sum of their squares."""
    found = outputs(function, arguments)
    losses = [out.to(torch.promote_types(out.dtype, torch.float32)).square().sum() for out in found]
    return [*found, *torch.autograd.grad(losses, arguments)]


def disagreement(work: Work, side: Function, samples: int) -> str | None:
    """Why `side` is wrong on the first samples, or None: its error is to be at most twice that of PyTorch's own.

    The error is the largest against float64, relative to the largest magnitude, and always may be the spacing of the
    dtype.
    """
    batch = len(work.arguments[0])
    few = [(a[:samples] if len(a) == batch else a).detach().requires_grad_() for a in work.arguments]
    exact = [a.detach().double().requires_grad_() for a in few]
    compared = list(zip(_results(side, few), _results(work.eager, few), _results(work.eager, exact), strict=True))
    for place, (mine, judge, truth) in enumerate(compared):
        truth = truth.detach()
        size = truth.abs().max().clamp_min(1e-30)
        errors = [float((t.detach().double() - truth).abs().max() / size) for t in (mine, judge)]
        limit = max(2 * errors[1], 2 * torch.finfo(mine.dtype).eps)
        if not errors[0] <= limit:
            argument = place - (len(compared) - len(few))
            what = f"output {place}" if argument < 0 else f"gradient of argument {argument}"
            return f"{what}: error {errors[0]:.2e}, PyTorch's own {errors[1]:.2e}"
    return None
