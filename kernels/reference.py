"""Every fused operation in plain PyTorch: the definition that a kernel must match, and the path on a CPU.

The arithmetic is that of PyTorch's type promotion; losses and scores use at least float32, as under autocast. Float64
inputs give float64 results, so the same definitions judge kernels in float64.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = ("class", "distillation", "fused_probabilities", "fused_logits")


class MixedLabels(NamedTuple):
    """True labels of mixed images: the target is lam * onehot(label_a) + (1 - lam) * onehot(label_b), smoothed.

    label_a, label_b  (B,) integers
    lam               (B,) floats: weight of label_a
    smoothing         label smoothing: each class gets smoothing / K, the label 1 - smoothing more
    """

    label_a: Tensor
    label_b: Tensor
    lam: Tensor
    smoothing: float

    def part(self, rows: slice) -> MixedLabels:
        """The labels of some samples."""
        return MixedLabels(self.label_a[rows], self.label_b[rows], self.lam[rows], self.smoothing)

    def dense(self, num_classes: int) -> Tensor:
        """(B, num_classes) float32 soft targets, as `timm.data.mixup.mixup_target` computes them."""
        off = self.smoothing / num_classes
        shape = (len(self.lam), num_classes)
        a, b = (
            torch.full(shape, off, device=label.device).scatter_(1, label[:, None], 1.0 - self.smoothing + off)
            for label in (self.label_a, self.label_b)
        )
        lam = self.lam[:, None]
        return a * lam + b * (1.0 - lam)


class BinaryTargets(NamedTuple):
    """How binary cross-entropy reads a target (B, K): each class is a yes or no of its own (arXiv 2110.00476).

    threshold    a class above it counts as 1, any other as 0; None: the target's own numbers
    sum_classes  sum the loss over the classes instead of taking their mean
    """

    threshold: float | None = None
    sum_classes: bool = False


class Kept(NamedTuple):
    """The samples of a batch whose residual branch is computed; stochastic depth drops the others.

    mask   (B,) float32 factors of the branch: 0 for a dropped sample, otherwise 1 / the fraction kept
    slots  (B,) int32: each kept sample's place among the kept ones, in order; -1 for a dropped sample
    count  number of kept samples
    """

    mask: Tensor
    slots: Tensor
    count: int

    @property
    def index(self) -> Tensor:
        """(count,) int64: the kept samples, ascending."""
        return (self.slots < 0).argsort(stable=True)[: self.count]


class LossParts(NamedTuple):
    """float32 scalars: the loss to minimise, and its unweighted parts for the true label and for the teacher."""

    loss: Tensor
    base: Tensor
    distill: Tensor


def as_patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut `images` (B, 3, H, W) into patches of side S: (B, P, 3 S S), in row order, each channel by channel."""
    count, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(count, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, channels * patch_size**2)


def attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head: (B, N, 3, H, D) -> (B, N, H D), in the dtype of `qkv`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of x + bias, (..., C) in the dtype of `x`; bias (C,)."""
    return F.gelu(x + bias).to(x.dtype)


def scale_branch(branch: Tensor, mask: Tensor | None) -> Tensor:
    """Stochastic depth: `branch` (B, ..., C) times `mask` (B,), rounded to the branch's dtype; None: no change.

    A float32 mask keeps the product in float32, because bf16 cannot represent most 1 / keep probability.
    """
    if mask is None:
        return branch
    return (branch * mask.view(-1, *[1] * (branch.ndim - 1))).to(branch.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last dimension; x (..., C), weight and bias (C,)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def select_kept(x: Tensor, kept: Kept | None) -> Tensor:
    """The kept samples of `x` (B, ...), as (count, ...); None: all."""
    return x if kept is None else x.index_select(0, kept.index)


def add_branch(x: Tensor, branch: Tensor, mask: Tensor | Kept | None, scale: Tensor | None = None) -> Tensor:
    """x + mask * scale * branch; x (B, ..., C), scale (C,) or None: LayerScale's.

    With a `Kept`, `branch` holds only the kept samples, (count, ..., C). The sum has the wider dtype of `x` and
    `branch`, whatever that of `scale` is.
    """
    dtype = torch.promote_types(x.dtype, branch.dtype)
    if scale is not None:
        branch = branch * scale
    if not isinstance(mask, Kept):
        return (x + scale_branch(branch, mask)).to(dtype)
    index = mask.index
    return x.index_add(0, index, scale_branch(branch, mask.mask.index_select(0, index)).to(x.dtype))


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    mask: Tensor | Kept | None = None,
    only: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of `add_branch`, and its layer normalisation, only for the samples that `only` keeps."""
    total = add_branch(x, branch, mask, scale)
    return total, layer_norm(select_kept(total, only), weight, bias, eps)


def assemble_tokens(
    patches: Tensor,
    cls_token: Tensor,
    dist_token: Tensor | None,
    pos_embed: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Prepend the class token and the optional distillation token to the patches; add the positions.

    Arguments and result as in `fastdeit.kernels.token_assembly.assemble_tokens`. Raises ValueError if the positions
    do not match the tokens.
    """
    tokens = cls_token if dist_token is None else torch.cat([cls_token, dist_token], dim=1)
    batch, count, _ = patches.shape
    whole = count + tokens.shape[1]
    if pos_embed.shape[1] not in (count, whole):
        raise ValueError(
            f"pos_embed has {pos_embed.shape[1]} rows for {count} patches and {tokens.shape[1]} tokens: "
            f"give it {whole}, or {count} if only patches have a position"
        )
    dtype = dtype or torch.promote_types(patches.dtype, pos_embed.dtype)
    if bias is not None:
        patches = _at_least_float32(patches) + bias
    prefix = tokens.expand(batch, -1, -1)
    if pos_embed.shape[1] == count:
        return torch.cat([prefix, patches + pos_embed], dim=1).to(dtype)
    return (torch.cat([prefix, patches], dim=1) + pos_embed).to(dtype)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a distribution over the classes, mean over the rows.

    logits, targets  (B, K); the rows of `targets` sum to 1. Returns a scalar, at least float32.
    """
    return -(targets.float() * F.log_softmax(_at_least_float32(logits), dim=-1)).sum(-1).mean()


def binary_cross_entropy(logits: Tensor, targets: Tensor, binary: BinaryTargets) -> Tensor:
    """Binary cross-entropy of all classes, mean over the rows; arguments as in `soft_cross_entropy`."""
    targets = targets.float()
    if binary.threshold is not None:
        targets = targets.gt(binary.threshold).float()
    loss = F.binary_cross_entropy_with_logits(_at_least_float32(logits), targets, reduction="none")
    return (loss.sum(-1) if binary.sum_classes else loss.mean(-1)).mean()


def soft_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float,
    reduction: Literal["batchmean", "elements"] = "batchmean",
) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)); the gradient reaches only the student.

    student_logits, teacher_logits  (B, K)
    reduction  "batchmean": mean over the rows (paper, section 4); "elements": divided by B K as in the released code,
               K times smaller (deit issue 61)

    Returns a scalar, at least float32. Raises ValueError for another reduction.
    """
    student = F.log_softmax(_at_least_float32(student_logits) / tau, dim=-1)
    teacher = F.log_softmax(_at_least_float32(teacher_logits.detach()) / tau, dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    if reduction == "batchmean":
        return tau**2 * divergence.mean()
    if reduction == "elements":
        return tau**2 * divergence.mean() / student_logits.shape[-1]
    raise ValueError(f"reduction '{reduction}' is neither 'batchmean' nor 'elements'")


def hard_distillation(student_logits: Tensor, teacher_labels: Tensor) -> Tensor:
    """Cross-entropy with the teacher's decisions, mean over the rows (paper, section 4, "hard-label").

    student_logits  (B, K)
    teacher_labels  (B,) integers of any width

    Returns a scalar, at least float32.
    """
    return F.cross_entropy(_at_least_float32(student_logits), teacher_labels.long())


def distillation_loss(
    cls_logits: Tensor,
    dist_logits: Tensor | None,
    targets: Tensor | MixedLabels,
    teacher: Tensor | None,
    *,
    alpha: float = 0.1,
    tau: float = 3.0,
    reduction: Literal["batchmean", "elements"] = "batchmean",
    binary: BinaryTargets | None = None,
) -> LossParts:
    """The joint loss of both heads; arguments as in `fastdeit.kernels.distillation_loss.distillation_loss`."""
    if isinstance(targets, MixedLabels):
        targets = targets.dense(cls_logits.shape[-1])
    of_labels = soft_cross_entropy if binary is None else partial(binary_cross_entropy, binary=binary)
    base = of_labels(cls_logits, targets)
    if teacher is None:
        if dist_logits is not None:
            base = (base + of_labels(dist_logits, targets)) / 2
        return LossParts(base, base, torch.zeros_like(base))
    student = cls_logits if dist_logits is None else dist_logits
    if teacher.is_floating_point():
        distill = soft_distillation(student, teacher, tau, reduction)
        return LossParts((1 - alpha) * base + alpha * distill, base, distill)
    distill = hard_distillation(student, teacher)
    return LossParts((base + distill) / 2, base, distill)


def head_log_probabilities(cls_logits: Tensor, dist_logits: Tensor | None) -> list[Tensor]:
    """Log-probabilities (B, K), at least float32, of each of `HEADS` that exists.

    "fused_probabilities" is the mean of the two softmaxes (Touvron et al., section 4, "joint classifiers"),
    "fused_logits" the softmax of the mean logits (the released code).
    """
    cls = _at_least_float32(cls_logits)
    if dist_logits is None:
        return [F.log_softmax(cls, -1)]
    dist = _at_least_float32(dist_logits)
    return [
        F.log_softmax(cls, -1),
        F.log_softmax(dist, -1),
        ((cls.softmax(-1) + dist.softmax(-1)) / 2).clamp_min(1e-30).log(),
        F.log_softmax((cls + dist) / 2, -1),
    ]


def evaluate_heads(
    cls_logits: Tensor, dist_logits: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank of the true label, decision, loss and confidence of each sample and head, each (B, number of heads).

    cls_logits, dist_logits  (B, K); the second may be None
    labels                   (B,) int64
    """
    scores = torch.stack(head_log_probabilities(cls_logits, dist_logits), 1)
    label_scores = scores.gather(2, labels[:, None, None].expand(-1, scores.shape[1], 1))
    return (scores > label_scores).sum(2), scores.argmax(2), -label_scores[..., 0], scores.amax(2).exp()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
