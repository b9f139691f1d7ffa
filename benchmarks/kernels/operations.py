"""The operations that `kernels` compares: our kernel, plain PyTorch, and every alternative that can be imported."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import first_line
from fastdeit.kernels import reference
from fastdeit.kernels.attention import attention
from fastdeit.kernels.bias_gelu import bias_gelu
from fastdeit.kernels.distillation_loss import distillation_loss
from fastdeit.kernels.layer_norm import add_layer_norm, layer_norm
from fastdeit.kernels.token_assembly import assemble_tokens

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class Shape:
    """A DeiT at a resolution: `tokens` with its `prefix`, 1 or, with the distillation token, 2."""

    model: str
    tokens: int
    embed_dim: int
    heads: int
    prefix: int = 2


SHAPES = tuple(
    Shape(model, patches + prefix, width, heads, prefix)
    for model, width, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))
    for patches in (196, 576)
    for prefix in (1, 2)
)


@dataclass(frozen=True)
class Operation:
    """An operation on random data.

    arguments   tensors that every contender takes; gradients reach the floating ones
    eager       plain PyTorch; in float64 the truth
    contenders  by name, ours as "fastdeit"
    bytes, flops  the least that the forward pass, and forward and backward, must move and compute
    absent      alternatives that are not installed: name, and what to install
    """

    arguments: list[Tensor]
    eager: Function
    contenders: dict[str, Function]
    bytes: tuple[float, float]
    flops: tuple[float, float] = (0.0, 0.0)
    absent: dict[str, str] = field(default_factory=dict)


def _draw(shape: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def _sdpa_with(backend: SDPBackend) -> Function:
    def attention(qkv: Tensor) -> Outputs:
        with sdpa_kernel(backend):
            return reference.attention(qkv)

    return attention


def _unpacked(function: Callable[..., Any]) -> Function:
    """Attention of packed queries, keys and values by a function of the three; it may also return the log-sum-exp."""

    def attention(qkv: Tensor) -> Outputs:
        out = function(*qkv.unbind(2))
        return (out[0] if isinstance(out, tuple) else out).flatten(2)

    return attention


def _attention(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Operation:
    n, h, d = shape.tokens, shape.heads, shape.embed_dim // shape.heads
    qkv = _draw((batch, n, 3, h, d), dtype, device)
    contenders: dict[str, Function] = {"fastdeit": attention}
    if device.type == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
        contenders |= {f"sdpa {name}": _sdpa_with(backend) for name, backend in backends.items()}
    absent: dict[str, str] = {}
    packed = _imported("flash-attn", "flash_attn", "flash_attn_qkvpacked_func", absent)
    if packed is not None:
        contenders["flash-attn"] = lambda qkv: packed(qkv).flatten(2)
    for name, module in (
        ("flash-attn 3 (hopper/ of its source)", "flash_attn_interface"),
        ("flash-attn 4 (flash_attn/cute of its source)", "flash_attn.cute"),
    ):
        function = _imported(name, module, "flash_attn_func", absent)
        if function is not None:
            contenders[name.partition(" (")[0]] = _unpacked(function)
    size = qkv.numel() * qkv.element_size()
    product = 2.0 * batch * h * n * n * d  # FLOP of one matrix product: two forward, five more backward
    moved = size * 4 / 3, size * (4 / 3 + 8 / 3)
    return Operation([qkv], reference.attention, contenders, moved, (2 * product, 7 * product), absent)


def _tokens(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Operation:
    c, n, prefix = shape.embed_dim, shape.tokens, shape.prefix
    tokens = [_draw((1, 1, c), torch.float32, device) for _ in range(prefix)]
    arguments = [_draw((batch, n - prefix, c), dtype, device), *tokens, _draw((1, n, c), torch.float32, device)]
    size = batch * n * c
    low = arguments[0].element_size()
    moved = size * (low + 4), 2 * size * (low + 4)
    if prefix == 2:
        return Operation(arguments, reference.assemble_tokens, {"fastdeit": assemble_tokens}, moved)
    ours, eager = (
        lambda x, cls, pos, function=function: function(x, cls, None, pos)
        for function in (assemble_tokens, reference.assemble_tokens)
    )
    return Operation(arguments, eager, {"fastdeit": ours}, moved)


def _layer_norm(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Operation:
    c = shape.embed_dim
    x = _draw((batch, shape.tokens, c), dtype, device)
    arguments = [x, *(_draw((c,), dtype, device) for _ in range(2))]
    eps = 1e-6
    contenders: dict[str, Function] = {"fastdeit": lambda x, w, b: layer_norm(x, w, b, eps)}
    absent: dict[str, str] = {}
    apex = _imported(
        "apex (NVIDIA's, from its source)",
        "apex.normalization.fused_layer_norm",
        "FusedLayerNormAffineFunction",
        absent,
    )
    if apex is not None:
        contenders["apex"] = lambda x, w, b: apex.apply(x, w, b, (c,), eps)
    liger = _imported("liger-kernel", "liger_kernel.ops.layer_norm", "LigerLayerNormFunction", absent)
    if liger is not None:
        contenders["liger"] = lambda x, w, b: liger.apply(x, w, b, eps)
    size = x.numel() * x.element_size()
    return Operation(arguments, reference.layer_norm, contenders, (2 * size, 5 * size), absent=absent)


def _add_layer_norm(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Operation:
    c = shape.embed_dim
    arguments = [_draw((batch, shape.tokens, c), dtype, device) for _ in range(2)]
    arguments += [_draw((c,), dtype, device) for _ in range(2)]
    mask = (torch.arange(batch, device=device) % 8 > 0) * 1.25

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        return add_layer_norm(x, branch, weight, bias, mask=mask[: len(x)])

    def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        return reference.add_layer_norm(x, branch, weight, bias, mask=mask.to(x.dtype)[: len(x)])

    size = arguments[0].numel() * arguments[0].element_size()
    return Operation(arguments, eager, {"fastdeit": ours}, (4 * size, 9 * size))


def _bias_gelu(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Operation:
    hidden = 4 * shape.embed_dim
    arguments = [_draw((batch, shape.tokens, hidden), dtype, device), _draw((hidden,), dtype, device)]
    size = arguments[0].numel() * arguments[0].element_size()
    return Operation(arguments, reference.bias_gelu, {"fastdeit": bias_gelu}, (2 * size, 5 * size))


def _loss(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Operation:
    classes = 1000
    arguments = [_draw((batch, classes), dtype, device, 4.0) for _ in range(2)]
    target = torch.randn(batch, classes, device=device).softmax(1)
    labels = torch.randint(classes, (batch,), device=device)

    def ours(cls: Tensor, dist: Tensor) -> Tensor:
        return distillation_loss(cls, dist, target[: len(cls)], labels[: len(cls)]).loss

    def eager(cls: Tensor, dist: Tensor) -> Tensor:
        return reference.distillation_loss(cls, dist, target[: len(cls)], labels[: len(cls)]).loss

    size = batch * classes
    low = arguments[0].element_size()
    return Operation(arguments, eager, {"fastdeit": ours}, (size * (2 * low + 4), size * (6 * low + 8)))


OPS: dict[str, Callable[[Shape, int, torch.dtype, torch.device], Operation]] = {
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
    except Exception as error:  # another project of that name may raise anything
        how = f"pip install {package}" if " " not in package else f"install {package}"
        absent[package] = how if isinstance(error, ModuleNotFoundError) else f"{how}: {first_line(error)}"
        return None


def outputs(function: Function, arguments: list[Tensor]) -> tuple[Tensor, ...]:
    out = function(*arguments)
    return out if isinstance(out, tuple) else (out,)


def _results(function: Function, arguments: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the sum of their squares."""
    out = outputs(function, arguments)
    losses = [each.to(torch.promote_types(each.dtype, torch.float32)).square().sum() for each in out]
    return [*out, *torch.autograd.grad(losses, arguments)]


def disagreement(operation: Operation, contender: Function, samples: int) -> str | None:
    """Why `contender` is wrong on the first samples; None if its error is at most twice that of plain PyTorch.

    The error is the largest difference from float64, relative to the largest magnitude. An error up to the spacing of
    the dtype always passes.
    """
    batch = len(operation.arguments[0])
    few = [(a[:samples] if len(a) == batch else a).detach().requires_grad_() for a in operation.arguments]
    exact = [a.detach().double().requires_grad_() for a in few]
    results = [_results(contender, few), _results(operation.eager, few), _results(operation.eager, exact)]
    for i, (result, expected, truth) in enumerate(zip(*results, strict=True)):
        truth = truth.detach()
        size = truth.abs().max().clamp_min(1e-30)
        errors = [float((t.detach().double() - truth).abs().max() / size) for t in (result, expected)]
        limit = max(2 * errors[1], 2 * torch.finfo(result.dtype).eps)
        if not errors[0] <= limit:
            argument = i - (len(results[0]) - len(few))
            what = f"output {i}" if argument < 0 else f"gradient of argument {argument}"
            return f"{what}: error {errors[0]:.2e}, PyTorch's own {errors[1]:.2e}"
    return None
