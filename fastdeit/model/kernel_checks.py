"""Check each kernel before a run relies on it: a small batch of the run's shapes, compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from fastdeit.kernels import reference
from fastdeit.kernels.attention import attention
from fastdeit.kernels.bias_gelu import bias_gelu
from fastdeit.kernels.distillation_loss import distillation_loss
from fastdeit.kernels.head_evaluation import evaluate_heads
from fastdeit.kernels.layer_norm import add_layer_norm
from fastdeit.kernels.reference import BinaryTargets, MixedLabels
from fastdeit.kernels.token_assembly import assemble_tokens
from fastdeit.model.attention_backend import BACKENDS
from fastdeit.model.drop_path import kept_samples
from fastdeit.pipelines.errors import fact
from fastdeit.precision import Precision
from fastdeit.sections import ModelConfig

BATCH = 3
Function = Callable[..., tuple[Tensor, ...]]


class Check(NamedTuple):
    """An operation's kernel and its reference, and floating inputs; the reference also takes float64 inputs."""

    inputs: list[Tensor]
    kernel: Function
    reference: Function


class Inputs:
    """Random tensors of a run's shapes, the same each time."""

    def __init__(self, cfg: ModelConfig, precision: Precision, num_classes: int, batch: int = BATCH) -> None:
        self.cfg, self.num_classes, self.batch, self.device = cfg, num_classes, batch, precision.device
        self.low = precision.dtype or torch.float32
        bf16 = cfg.residual_dtype == "bfloat16" and self.low is torch.bfloat16
        self.stream = torch.bfloat16 if bf16 else torch.float32  # the dtype of the residual stream
        self.patches = (cfg.img_size // cfg.patch_size) ** 2
        self.tokens = self.patches + 1 + cfg.distilled
        self._generator = torch.Generator(precision.device).manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device).to(dtype)

    def classes(self) -> Tensor:
        return torch.randint(self.num_classes, (self.batch,), generator=self._generator, device=self.device)


class _AddedBias(torch.autograd.Function):
    """Return `x`, to which a GEMM has already added `bias` (C,); only the bias's gradient takes another pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, grad.flatten(2).sum((0, 1), dtype=ctx.dtype)


def _with_added_bias(x: Tensor, bias: Tensor) -> Tensor:
    return _AddedBias.apply(x, bias)  # pyright: ignore[reportReturnType]


def training_check(op: str, cfg: ModelConfig, precision: Precision, num_classes: int, batch: int) -> Check:
    """An operation of `kernel_choice.OPS` at a run's shapes and dtypes, in its main use in a training step."""
    return _CHECKS[op][0](Inputs(cfg, precision, num_classes, batch))


def with_backend(function: Function, backend: str) -> Function:
    """`function`, with PyTorch's attention in it running on `backend`, a name in `BACKENDS`."""

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        with sdpa_kernel(BACKENDS[backend]):
            return function(*arguments)

    return call


def failure(
    op: str, cfg: ModelConfig, precision: Precision, num_classes: int, backend: str | None = None
) -> str | None:
    """Why the run must not use the kernel `op` of `kernel_choice.OPS`; None if its results match PyTorch's.

    backend  check PyTorch's attention with this backend instead of our kernel

    The error of results and gradients against float64 may be four times PyTorch's own error in the run's precision.
    Compared are the largest and the root mean square error, relative to the largest element; two roundings pass.
    """
    inputs = Inputs(cfg, precision, num_classes)
    checks = [make(inputs) for make in _CHECKS[op]]
    if backend is not None:
        checks = [check._replace(kernel=with_backend(check.reference, backend)) for check in checks]
    return next(filter(None, map(_mismatch, checks)), None)


def _mismatch(check: Check) -> str | None:
    try:
        results = _outcome(check.kernel, check.inputs)
    except Exception as error:  # a kernel that does not compile here must not end a run that PyTorch can do
        return f"it fails here: {type(error).__name__}: {fact(error)}"
    expected = _outcome(check.reference, check.inputs)
    exact = _outcome(check.reference, [tensor.double() for tensor in check.inputs])
    for ours, pytorch, truth in zip(results, expected, exact, strict=True):
        size = truth.abs().max().item() or 1.0
        floor = max(2 * torch.finfo(ours.dtype).eps, 2e-5)
        for norm in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
            error, allowed = (norm(t.double() - truth).item() / size for t in (ours, pytorch))
            if not error <= max(4 * allowed, floor):  # also true for NaN
                return f"its error on a small batch is {error:.1e}, PyTorch's {allowed:.1e}"
    return None


def _outcome(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Results, and the gradients of their weighted sum, if any, accumulated over two backward passes.

    Autograd adds to a gradient in place, so two gradients that share memory are wrong from the second pass on.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    if not any(result.requires_grad for result in results):
        return list(results)
    for outputs in (results, function(*leaves)):
        outputs = [result for result in outputs if result.requires_grad]
        weights = [torch.linspace(-1, 1, r.numel(), device=r.device).view_as(r).to(r.dtype) + 0.5 for r in outputs]
        torch.autograd.backward(outputs, weights)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [*(result.detach() for result in results), *gradients]


def _assemble_tokens(s: Inputs) -> Check:
    width = s.cfg.embed_dim
    positions = s.patches if s.cfg.no_embed_class else s.tokens
    inputs = [s.draw(s.batch, s.patches, width, dtype=s.low), s.draw(width), s.draw(1, positions, width)]
    inputs += [s.draw(1, 1, width) for _ in range(1 + s.cfg.distilled)]
    dtype = s.stream

    def with_tokens(assemble: Callable[..., Tensor]) -> Function:
        def call(patches: Tensor, bias: Tensor, pos_embed: Tensor, cls: Tensor, dist: Tensor | None = None):
            wide = patches.dtype is torch.float64
            return (assemble(patches, cls, dist, pos_embed, bias, dtype=patches.dtype if wide else dtype),)

        return call

    return Check(inputs, with_tokens(assemble_tokens), with_tokens(reference.assemble_tokens))


def _attention(s: Inputs, first_rows: bool = False) -> Check:
    heads, rows = s.cfg.num_heads, 1 + s.cfg.distilled if first_rows else s.tokens
    inputs = [s.draw(s.batch, s.tokens, 3, heads, s.cfg.embed_dim // heads, dtype=s.low), s.draw(3 * s.cfg.embed_dim)]
    return Check(
        inputs,
        lambda qkv, bias: (attention(qkv, bias=bias, rows=rows),),
        lambda qkv, bias: (reference.attention(_with_added_bias(qkv, bias))[:, :rows],),
    )


def _layer_norm(s: Inputs) -> Check:
    width = s.cfg.embed_dim
    factors = torch.linspace(0, 2, s.batch, device=s.device)
    mask, only, samples = factors, None, s.batch
    if s.cfg.drop_path_mode == "skip":
        samples = s.batch - 1
        mask, only = kept_samples(torch.stack([factors, factors.flip(0)]), [samples] * 2)
    inputs = [s.draw(s.batch, s.tokens, width, dtype=s.stream), s.draw(samples, s.tokens, width, dtype=s.low)]
    inputs += [s.draw(width) for _ in range(4 if s.cfg.layer_scale else 3)]

    def kernel(
        x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, of_branch: Tensor, scale: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"scale": scale, "mask": mask, "only": only, "dtype": branch.dtype}
        return add_layer_norm(x, branch, weight, bias, branch_bias=of_branch, **options)

    def judge(
        x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, of_branch: Tensor, scale: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        total = reference.add_branch(x, _with_added_bias(branch, of_branch), mask, scale)
        # As under autocast: on a GPU, PyTorch's LayerNorm takes one dtype.
        rows = reference.select_kept(total, only).to(weight.dtype)
        return total, reference.layer_norm(rows, weight, bias).to(branch.dtype)

    return Check(inputs, kernel, judge)


def _bias_gelu(s: Inputs) -> Check:
    width = int(s.cfg.embed_dim * s.cfg.mlp_ratio)
    inputs = [s.draw(s.batch, s.tokens, width, dtype=s.low), s.draw(width)]
    return Check(inputs, lambda x, b: (bias_gelu(x, b),), lambda x, b: (reference.bias_gelu(x, b),))


def _distillation_loss(s: Inputs, soft: bool = False, binary: BinaryTargets | None = None) -> Check:
    inputs = [s.draw(s.batch, s.num_classes, dtype=s.low) for _ in range(1 + s.cfg.distilled)]
    labels = MixedLabels(s.classes(), s.classes(), torch.linspace(0, 1, s.batch, device=s.device), 0.1)
    teacher = s.draw(s.batch, s.num_classes) if soft else s.classes()

    def with_teacher(loss: Callable[..., reference.LossParts]) -> Function:
        return lambda cls, dist=None: (loss(cls, dist, labels, teacher, binary=binary).loss,)

    return Check(inputs, with_teacher(distillation_loss), with_teacher(reference.distillation_loss))


def _evaluate_heads(s: Inputs) -> Check:
    # In float32, where no two scores are equal.
    inputs = [s.draw(s.batch, s.num_classes) for _ in range(1 + s.cfg.distilled)]
    labels = s.classes()

    def as_floats(evaluate: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]) -> Function:
        @torch.no_grad()
        def call(cls: Tensor, dist: Tensor | None = None) -> tuple[Tensor, ...]:
            rank, decision, loss, confidence = evaluate(cls, dist, labels)
            return rank.to(loss.dtype), decision.to(loss.dtype), loss, confidence

        return call

    return Check(inputs, as_floats(evaluate_heads), as_floats(reference.evaluate_heads))


# For each operation, its main use in a training step comes first, then its other uses.
_CHECKS: dict[str, tuple[Callable[[Inputs], Check], ...]] = {
    "assemble_tokens": (_assemble_tokens,),
    "attention": (_attention, partial(_attention, first_rows=True)),  # the second: only the tokens that the heads read
    "layer_norm": (_layer_norm,),
    "bias_gelu": (_bias_gelu,),
    "distillation_loss": (
        _distillation_loss,
        partial(_distillation_loss, soft=True),
        partial(_distillation_loss, binary=BinaryTargets()),
    ),
    "evaluate_heads": (_evaluate_heads,),
}
