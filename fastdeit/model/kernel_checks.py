"""A run's own look at each kernel before it relies on it: a small batch of the run's shapes, judged by PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.config import ModelConfig
from fastdeit.kernels.attention import attention
from fastdeit.kernels.bias_gelu import bias_gelu
from fastdeit.kernels.distillation_loss import distillation_loss
from fastdeit.kernels.head_evaluation import evaluate_heads
from fastdeit.kernels.layer_norm import add_layer_norm
from fastdeit.kernels.reference import MixedLabels
from fastdeit.kernels.token_assembly import assemble_tokens
from fastdeit.pipelines.errors import fact
from fastdeit.precision import Precision

BATCH = 3
Function = Callable[..., tuple[Tensor, ...]]


class _Work(NamedTuple):
    """Floating `inputs` of an operation, and two ways to do it; `judge` is of any floating dtype, also float64."""

    inputs: list[Tensor]
    ours: Function
    judge: Function


class _Shapes:
    """What the operations of a run are given, as random tensors that are the same each time."""

    def __init__(self, cfg: ModelConfig, precision: Precision, num_classes: int) -> None:
        self.cfg, self.num_classes, self.device = cfg, num_classes, precision.device
        self.low = precision.dtype or torch.float32
        self.patches = (cfg.img_size // cfg.patch_size) ** 2
        self.tokens = self.patches + 1 + cfg.distilled
        self._generator = torch.Generator(precision.device).manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device).to(dtype)

    def classes(self) -> Tensor:
        return torch.randint(self.num_classes, (BATCH,), generator=self._generator, device=self.device)


def failure(op: str, cfg: ModelConfig, precision: Precision, num_classes: int) -> str | None:
    """Why the kernel `op` of `kernel_choice.OPS` must not be relied on, or None where it does what PyTorch does.

    Results and gradients may be four times as far from float64 as PyTorch's own are in the run's precision, of which
    the largest element and the root of the mean square count, relative to the largest element; two roundings pass.
    """
    work = _WORK[op](_Shapes(cfg, precision, num_classes))
    try:
        ours = _outcome(work.ours, work.inputs)
    except Exception as error:  # a kernel that does not compile here must not end a run that PyTorch can do
        return f"it fails here: {type(error).__name__}: {fact(error)}"
    judge = _outcome(work.judge, work.inputs)
    exact = _outcome(work.judge, [tensor.double() for tensor in work.inputs])
    for mine, theirs, right in zip(ours, judge, exact, strict=True):
        size = right.abs().max().item() or 1.0
        floor = max(2 * torch.finfo(mine.dtype).eps, 2e-5)
        for norm in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
            found, allowed = (norm(t.double() - right).item() / size for t in (mine, theirs))
            if not found <= max(4 * allowed, floor):  # also where it is NaN
                return f"its error on a small batch is {found:.1e}, PyTorch's {allowed:.1e}"
    return None


def _outcome(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Results, and where there are gradients, those of their weighted sum, accumulated over two backward passes.

    Autograd adds to a gradient in place, so two that share memory are wrong from the second pass on.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    if not any(result.requires_grad for result in results):
        return list(results)
    for passed in (results, function(*leaves)):
        learned = [result for result in passed if result.requires_grad]
        weights = [torch.linspace(-1, 1, r.numel(), device=r.device).view_as(r).to(r.dtype) + 0.5 for r in learned]
        torch.autograd.backward(learned, weights)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [*(result.detach() for result in results), *gradients]


def _assemble_tokens(s: _Shapes) -> _Work:
    width, prefix = s.cfg.embed_dim, 1 + s.cfg.distilled
    inputs = [s.draw(BATCH, s.patches, width, dtype=s.low), s.draw(width), s.draw(1, s.tokens, width)]
    inputs += [s.draw(1, 1, width) for _ in range(prefix)]

    def ours(patches: Tensor, bias: Tensor, positions: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        return (assemble_tokens(patches, tokens[0], tokens[1] if prefix == 2 else None, positions, bias),)

    def judge(patches: Tensor, bias: Tensor, positions: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat([*(token.expand(BATCH, -1, -1) for token in tokens), patches + bias], 1) + positions,)

    return _Work(inputs, ours, judge)


def _attention(s: _Shapes) -> _Work:
    heads = s.cfg.num_heads
    qkv = s.draw(BATCH, s.tokens, 3, heads, s.cfg.embed_dim // heads, dtype=s.low)

    def judge(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),)

    return _Work([qkv], lambda qkv: (attention(qkv),), judge)


def _layer_norm(s: _Shapes) -> _Work:
    width = s.cfg.embed_dim
    inputs = [s.draw(BATCH, s.tokens, width), s.draw(BATCH, s.tokens, width, dtype=s.low), s.draw(width), s.draw(width)]
    mask = torch.linspace(0, 2, BATCH, device=s.device)

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return add_layer_norm(x, branch, weight, bias, mask=mask, dtype=branch.dtype)

    def judge(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        total = x + (branch * mask.view(-1, 1, 1)).to(branch.dtype)
        return total, F.layer_norm(total, (width,), weight, bias, 1e-6).to(branch.dtype)

    return _Work(inputs, ours, judge)


def _bias_gelu(s: _Shapes) -> _Work:
    width = int(s.cfg.embed_dim * s.cfg.mlp_ratio)
    inputs = [s.draw(BATCH, s.tokens, width, dtype=s.low), s.draw(width)]
    return _Work(inputs, lambda x, b: (bias_gelu(x, b),), lambda x, b: (F.gelu(x + b).to(x.dtype),))


def _distillation_loss(s: _Shapes) -> _Work:
    inputs = [s.draw(BATCH, s.num_classes, dtype=s.low) for _ in range(1 + s.cfg.distilled)]
    labels = MixedLabels(s.classes(), s.classes(), torch.linspace(0, 1, BATCH, device=s.device), 0.1)
    told, logits = s.classes(), s.draw(BATCH, s.num_classes)

    def ours(cls: Tensor, dist: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(distillation_loss(cls, dist, labels, teacher).loss for teacher in (told, logits))

    def judge(*heads: Tensor) -> tuple[Tensor, ...]:
        cls, learner = (head.to(torch.promote_types(head.dtype, torch.float32)) for head in (heads[0], heads[-1]))
        one, other = (
            F.cross_entropy(cls, label, label_smoothing=labels.smoothing, reduction="none")
            for label in (labels.label_a, labels.label_b)
        )
        base = (one * labels.lam + other * (1 - labels.lam)).mean()
        teacher = F.softmax(logits.to(learner.dtype) / 3, 1)
        soft = 9 * F.kl_div(F.log_softmax(learner / 3, 1), teacher, reduction="batchmean")
        return (base + F.cross_entropy(learner, told)) / 2, 0.9 * base + 0.1 * soft

    return _Work(inputs, ours, judge)


def _evaluate_heads(s: _Shapes) -> _Work:
    # In float32, where no two scores are the same.
    inputs = [s.draw(BATCH, s.num_classes) for _ in range(1 + s.cfg.distilled)]
    labels = s.classes()

    def ours(cls: Tensor, dist: Tensor | None = None) -> tuple[Tensor, ...]:
        rank, decision, loss = evaluate_heads(cls, dist, labels)
        return rank.float(), decision.float(), loss

    @torch.no_grad()
    def judge(*heads: Tensor) -> tuple[Tensor, ...]:
        scores = [head.log_softmax(1) for head in heads]
        if len(heads) == 2:
            cls, dist = heads
            scores += [((cls.softmax(1) + dist.softmax(1)) / 2).log(), ((cls + dist) / 2).log_softmax(1)]
        own = [score.gather(1, labels[:, None]) for score in scores]
        rank = [(score > mine).sum(1) for score, mine in zip(scores, own, strict=True)]
        loss = torch.cat([-mine for mine in own], 1)
        return torch.stack(rank, 1).to(loss.dtype), torch.stack([s.argmax(1) for s in scores], 1).to(loss.dtype), loss

    return _Work(inputs, ours, judge)


_WORK: dict[str, Callable[[_Shapes], _Work]] = {
    "assemble_tokens": _assemble_tokens,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "bias_gelu": _bias_gelu,
    "distillation_loss": _distillation_loss,
    "evaluate_heads": _evaluate_heads,
}
