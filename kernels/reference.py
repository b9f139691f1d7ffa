"""Plain PyTorch definitions of the fused operations: what a kernel must equal, and the path taken on a CPU.

Whatever the dtype of the inputs, the arithmetic is float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MixedLabels(NamedTuple):
    """True labels of mixed images, as (a, b, lambda): the target is lam * onehot(a) + (1 - lam) * onehot(b), smoothed.

    label_a, label_b  (B,) integers
    lam               (B,) floats: share of label_a
    smoothing         of both one-hot vectors: each class gets smoothing / K, the label 1 - smoothing more
    """

    label_a: Tensor
    label_b: Tensor
    lam: Tensor
    smoothing: float

    def part(self, rows: slice) -> MixedLabels:
        """Those of some samples."""
        return MixedLabels(self.label_a[rows], self.label_b[rows], self.lam[rows], self.smoothing)

    def dense(self, num_classes: int) -> Tensor:
        """(B, num_classes) float32 soft targets, as `timm.data.mixup.mixup_target` makes them of a mixing group."""
        off = self.smoothing / num_classes
        shape = (len(self.lam), num_classes)
        own, other = (
            torch.full(shape, off, device=label.device).scatter_(1, label[:, None], 1.0 - self.smoothing + off)
            for label in (self.label_a, self.label_b)
        )
        lam = self.lam[:, None]
        return own * lam + other * (1.0 - lam)


def as_patches(images: Tensor, patch_size: int) -> Tensor:
    """(B, P, 3 S S): the patches of side S of each of `images` (B, 3, H, W), row by row, a patch channel by channel."""
    count, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(count, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, channels * patch_size**2)


def assemble_tokens(
    patches: Tensor,
    cls_token: Tensor,
    dist_token: Tensor | None,
    pos_embed: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Put the class token, and the distillation token where there is one, before the patches; add the positions.

    patches     (B, P, C)
    cls_token   (1, 1, C)
    dist_token  (1, 1, C) or None
    pos_embed   (1, N, C), N = P + 1 or P + 2: rows in the order class, distillation, patches
    bias        (C,) of the patch projection, where `patches` come without, or None

    Returns (B, N, C) in the wider of the dtypes of `patches` and `pos_embed`. Raises ValueError where N does not
    fit. Source: Touvron et al., arXiv 2012.12877, section 4, "distillation token".
    """
    tokens = [cls_token] if dist_token is None else [cls_token, dist_token]
    batch, count, _ = patches.shape
    if pos_embed.shape[1] != count + len(tokens):
        raise ValueError(
            f"pos_embed has {pos_embed.shape[1]} rows for {count} patches and {len(tokens)} tokens: "
            f"give it {count + len(tokens)}"
        )
    prefix = [token.float().expand(batch, -1, -1) for token in tokens]
    shifted = patches.float() if bias is None else patches.float() + bias.float()
    assembled = torch.cat([*prefix, shifted], dim=1) + pos_embed.float()
    return assembled.to(torch.promote_types(patches.dtype, pos_embed.dtype))


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a distribution over the classes, mean over the rows.

    logits, targets  (B, K); the rows of `targets` sum to 1. Returns a float32 scalar.
    """
    return -(targets.float() * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def soft_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float,
    reduction: Literal["batchmean", "elements"] = "batchmean",
) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)); the gradient reaches the student alone.

    student_logits, teacher_logits  (B, K)
    reduction  "batchmean": mean over the rows (paper, section 4); "elements": divided by B K, as the released
               code does, so that it is K times smaller (deit issue 61)

    Returns a float32 scalar. Raises ValueError for another reduction.
    """
    student = F.log_softmax(student_logits.float() / tau, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / tau, dim=-1)
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

    Returns a float32 scalar.
    """
    return F.cross_entropy(student_logits.float(), teacher_labels.long())
