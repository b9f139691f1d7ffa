"""The joint loss of both heads and its gradients, from logits, labels and the teacher's output."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastdeit.kernels.distillation_rows import base_kind, loss_gradients, loss_parts, teacher_kind
from fastdeit.kernels.launch import check, operator
from fastdeit.kernels.reference import BinaryTargets, LossParts, MixedLabels


@operator("fastdeit::distillation_loss")
def _op(
    cls: Tensor,
    dist: Tensor | None,
    dense: Tensor | None,
    label_a: Tensor | None,
    label_b: Tensor | None,
    lam: Tensor | None,
    teacher: Tensor | None,
    smoothing: float,
    tau: float,
    weight_base: float,
    weight_distill: float,
    base_divisor: float,
    divisor: float,
    base: str,
    threshold: float,
) -> Tensor:
    scalars = (smoothing, tau, weight_base, weight_distill, base_divisor, divisor, base, threshold)
    return loss_parts((cls, dist, dense, label_a, label_b, lam, teacher), scalars)


@_op.register_fake
def _fake(cls, *arguments):
    return cls.new_empty(3, dtype=torch.float32)


@operator("fastdeit::distillation_loss_backward")
def _backward_op(
    grad_parts: Tensor,
    cls: Tensor,
    dist: Tensor | None,
    dense: Tensor | None,
    label_a: Tensor | None,
    label_b: Tensor | None,
    lam: Tensor | None,
    teacher: Tensor | None,
    smoothing: float,
    tau: float,
    weight_base: float,
    weight_distill: float,
    base_divisor: float,
    divisor: float,
    base: str,
    threshold: float,
) -> list[Tensor]:
    scalars = (smoothing, tau, weight_base, weight_distill, base_divisor, divisor, base, threshold)
    return loss_gradients(grad_parts, (cls, dist, dense, label_a, label_b, lam, teacher), scalars)


@_backward_op.register_fake
def _backward_fake(grad_parts, cls, dist, *arguments):
    return [head.new_empty(head.shape) for head in (cls, dist) if head is not None]


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.scalars = inputs[7:]


def _autograd(ctx, grad_parts):
    grads = _backward_op(grad_parts, *ctx.saved_tensors, *ctx.scalars)
    return grads[0], grads[1] if len(grads) == 2 else None, *[None] * 13


_op.register_autograd(_autograd, setup_context=_setup)


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
    """The losses of the paper's Table 3; `fastdeit.training.objective.Objective` states them.

    cls_logits   (B, K) of the class head
    dist_logits  (B, K) of the distillation head, or None
    targets      (B, K) mixed and smoothed true labels of any float dtype, or `MixedLabels`
    teacher      None: no distillation; with two heads the base part is the mean of both. Integer labels (B,): hard
                 distillation, both parts weighted 1/2. Logits (B, K): soft, tau^2 KL(teacher / tau || student / tau),
                 weighted alpha, the base part weighted 1 - alpha
    reduction    of the soft part. "batchmean": mean over the rows; "elements": divided by B K (deit issue 61)
    binary       binary cross-entropy with the true labels instead of cross-entropy; the teacher's part does not change

    Logits are float32, float16 or bfloat16, with any row stride; the arithmetic is float32. The backward pass computes
    the gradients from the logits and rounds them once, so nothing of size (B, K) is saved. The loss of an empty batch
    is NaN, and so is a loss with a label outside the classes. No gradient reaches targets or teacher. Raises
    ValueError for mismatched shapes or dtypes and without a GPU. Source: Touvron et al., arXiv 2012.12877, section 4.
    """
    if reduction not in ("batchmean", "elements"):
        raise ValueError(f"reduction '{reduction}' is neither 'batchmean' nor 'elements'")
    if not tau > 0:
        raise ValueError(f"tau {tau} is a temperature: choose it above 0")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is the teacher's share of the loss: choose it from 0 to 1")
    kind = teacher_kind(teacher)
    _check_shapes(cls_logits, dist_logits, targets, teacher, kind)
    mixed = isinstance(targets, MixedLabels)
    labels = (targets.label_a.contiguous(), targets.label_b.contiguous(), targets.lam.contiguous()) if mixed else ()
    weight = {"none": 0.0, "hard": 0.5, "soft": alpha}[kind]
    parts = _op(
        _contiguous_rows(cls_logits),
        _contiguous_rows(dist_logits),
        None if mixed else _contiguous_rows(targets.detach()),
        *(labels or (None, None, None)),
        None if teacher is None else _contiguous_rows(teacher.detach()),
        float(targets.smoothing) if mixed else 0.0,
        float(tau),
        1.0 - weight,
        weight,
        float(cls_logits.shape[1]) if binary is not None and not binary.sum_classes else 1.0,
        float(cls_logits.shape[1]) if kind == "soft" and reduction == "elements" else 1.0,
        base_kind(binary),
        0.0 if binary is None else float(binary.threshold or 0.0),
    )
    return LossParts(*parts.unbind())


def _contiguous_rows(tensor: Any) -> Any:
    """`tensor` itself if its rows are contiguous, else a copy."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _check_shapes(
    cls: Tensor, dist: Tensor | None, targets: Tensor | MixedLabels, teacher: Tensor | None, kind: str
) -> None:
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype}: give (batch, classes) floats, or labels as MixedLabels")
    floats: dict[str, Tensor | None] = {"cls_logits": cls, "dist_logits": dist}
    floats |= {"targets": targets} if isinstance(targets, Tensor) else {"lam": targets.lam}
    check("distillation_loss", **floats, teacher=teacher if kind == "soft" else None)
    if cls.ndim != 2 or not cls.shape[1]:
        raise ValueError(f"cls_logits is {tuple(cls.shape)}: give (batch, classes)")
    if kind == "hard" and teacher is not None and teacher.dtype is torch.bool:
        raise ValueError("teacher is of torch.bool: give its labels as integers, or its logits")
    wanted = {"dist_logits": (dist, cls.shape)}
    wanted["teacher"] = (teacher, cls.shape if kind == "soft" else cls.shape[:1])
    if isinstance(targets, Tensor):
        wanted["targets"] = (targets, cls.shape)
    else:
        for name in ("label_a", "label_b", "lam"):
            wanted[name] = (getattr(targets, name), cls.shape[:1])
            if name != "lam" and getattr(targets, name).is_floating_point():
                raise ValueError(f"{name} is {getattr(targets, name).dtype}: give integers")
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and logits of {tuple(cls.shape)} need {tuple(shape)}")
        if tensor is not None and tensor.device != cls.device:
            raise ValueError(f"{name} lies on {tensor.device}, the logits on {cls.device}: move it there")
