"""The kernels of the distillation loss: a program a row of logits, then the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.launch import DTYPES, Launch, next_power_of_two, pointer
from fastdeit.kernels.variants import Variant

PLAIN, _SOFTENED = tl.constexpr(False), tl.constexpr(True)


@triton.jit
def normaliser(row, tau, num_classes, SOFTEN: tl.constexpr, BLOCK: tl.constexpr):
    """Largest of a row's logits, divided by tau if SOFTEN, and the sum of exp(logit - largest)."""
    columns = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for start in range(0, num_classes, BLOCK):
        inside = start + columns < num_classes
        z = tl.load(row + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        if SOFTEN:
            z = tl.div_rn(z, tau)
        higher = tl.maximum(largest, tl.max(z, axis=0))
        # As long as every logit is -inf, a difference of them would be NaN.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), axis=0)
        largest = higher
    return largest, total


@triton.jit
def _shifted(row, places, inside, tau, largest, SOFTEN: tl.constexpr):
    z = tl.load(row + places, mask=inside, other=0.0).to(tl.float32)
    if SOFTEN:
        z = tl.div_rn(z, tau)
    return z - largest


@triton.jit
def _target(dense_row, a, b, lam, smoothing, places, inside, num_classes, DENSE: tl.constexpr):
    if DENSE:
        target = tl.load(dense_row + places, mask=inside, other=0.0).to(tl.float32)
    else:
        one_hot = tl.where(places == a, lam, 0.0) + tl.where(places == b, 1.0 - lam, 0.0)
        target = smoothing / num_classes + (1.0 - smoothing) * one_hot
    return target


@triton.jit
def _distillation_rows(
    cls,
    dist,
    dense,
    label_a,
    label_b,
    lam,
    teacher,
    row_losses,
    grad_parts,
    grad_cls,
    grad_dist,
    stride_cls,
    stride_dist,
    stride_dense,
    stride_teacher,
    batch,
    num_classes,
    smoothing,
    tau,
    weight_base,
    weight_distill,
    base_scale,
    distill_scale,
    DIST: tl.constexpr,
    DENSE: tl.constexpr,
    TEACHER: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program takes a row twice: for the normalisers, and for the losses or the gradients; the second time the row
    # comes from a cache. Terms are those of PyTorch's log_softmax and kl_div, since sums of exponentials that are
    # subtracted from each other lose a small divergence.
    sample = tl.program_id(0).to(tl.int64)
    cls += sample * stride_cls
    dist += sample * stride_dist
    dense += sample * stride_dense
    cls_largest, cls_total = normaliser(cls, tau, num_classes, PLAIN, BLOCK)
    if DIST:
        dist_largest, dist_total = normaliser(dist, tau, num_classes, PLAIN, BLOCK)
    a = 0
    b = 0
    share = 0.0
    valid = True
    if not DENSE:
        a = tl.load(label_a + sample)
        b = tl.load(label_b + sample)
        share = tl.load(lam + sample).to(tl.float32)
        valid = (a >= 0) & (a < num_classes) & (b >= 0) & (b < num_classes)
    learner = cls
    if DIST:
        learner = dist
    if TEACHER == "hard":
        told = tl.load(teacher + sample)
        valid = valid & (told >= 0) & (told < num_classes)
    if TEACHER == "soft":
        teacher += sample * stride_teacher
        teacher_largest, teacher_total = normaliser(teacher, tau, num_classes, _SOFTENED, BLOCK)
        student_largest, student_total = normaliser(learner, tau, num_classes, _SOFTENED, BLOCK)
    # A label that is no class poisons loss and gradient: there is no exception on a GPU.
    poison = tl.where(valid, 0.0, float("nan"))
    columns = tl.arange(0, BLOCK)
    mass = 1.0
    if GRADIENT:
        loss_grad = tl.load(grad_parts)
        base_grad = (loss_grad * weight_base + tl.load(grad_parts + 1)) * base_scale + poison
        distill_grad = (loss_grad * weight_distill + tl.load(grad_parts + 2)) * distill_scale + poison
        if DENSE:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, num_classes, BLOCK):
                places = start + columns
                total += tl.load(dense + places, mask=places < num_classes, other=0.0).to(tl.float32)
            mass = tl.sum(total, axis=0)
    base = tl.zeros((BLOCK,), tl.float32)
    distill = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_classes, BLOCK):
        places = start + columns
        inside = places < num_classes
        target = _target(dense, a, b, share, smoothing, places, inside, num_classes, DENSE)
        cls_z = _shifted(cls, places, inside, tau, cls_largest, PLAIN)
        learner_z = cls_z
        learner_total = cls_total
        if DIST:
            learner_z = _shifted(dist, places, inside, tau, dist_largest, PLAIN)
            learner_total = dist_total
        if TEACHER == "soft":
            teacher_z = _shifted(teacher, places, inside, tau, teacher_largest, _SOFTENED)
            student_z = _shifted(learner, places, inside, tau, student_largest, _SOFTENED)
        if GRADIENT:
            push = base_grad * (mass * (tl.exp(cls_z) / cls_total) - target)
            if TEACHER == "hard":
                pull = distill_grad * (tl.exp(learner_z) / learner_total - tl.where(places == told, 1.0, 0.0))
            elif TEACHER == "soft":
                pull = distill_grad * (tl.exp(student_z) / student_total - tl.exp(teacher_z) / teacher_total)
            elif DIST:
                pull = base_grad * (mass * (tl.exp(learner_z) / learner_total) - target)
            else:
                pull = tl.zeros((BLOCK,), tl.float32)
            if DIST:
                to = grad_dist + sample * num_classes + places
                tl.store(to, pull.to(grad_dist.dtype.element_ty), mask=inside)
            else:
                push += pull
            tl.store(grad_cls + sample * num_classes + places, push.to(grad_cls.dtype.element_ty), mask=inside)
        else:
            base += tl.where(inside, -target * (cls_z - tl.log(cls_total)), 0.0)
            learner_lp = learner_z - tl.log(learner_total)
            if TEACHER == "hard":
                distill += tl.where(inside & (places == told), -learner_lp, 0.0)
            elif TEACHER == "soft":
                teacher_lp = teacher_z - tl.log(teacher_total)
                divergence = tl.exp(teacher_z) / teacher_total * (teacher_lp - (student_z - tl.log(student_total)))
                distill += tl.where(inside, divergence, 0.0)
            elif DIST:
                base += tl.where(inside, -target * learner_lp, 0.0)
    if not GRADIENT:
        tl.store(row_losses + sample, tl.sum(base, axis=0) * base_scale + poison)
        tl.store(row_losses + batch + sample, tl.sum(distill, axis=0) * distill_scale + poison)


@triton.jit
def _distillation_mean(row_losses, parts, batch, weight_base, weight_distill, BLOCK: tl.constexpr):
    # One program: the order of the sum is fixed.
    columns = tl.arange(0, BLOCK)
    base = tl.zeros((BLOCK,), tl.float32)
    distill = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch, BLOCK):
        places = start + columns
        base += tl.load(row_losses + places, mask=places < batch, other=0.0)
        distill += tl.load(row_losses + batch + places, mask=places < batch, other=0.0)
    base_mean = tl.sum(base, axis=0) / batch
    distill_mean = tl.sum(distill, axis=0) / batch
    tl.store(parts, weight_base * base_mean + weight_distill * distill_mean)
    tl.store(parts + 1, base_mean)
    tl.store(parts + 2, distill_mean)


def teacher_kind(teacher: Tensor | None) -> Literal["none", "hard", "soft"]:
    """What is distilled: nothing, the labels (B,) or the logits (B, K) of a teacher."""
    if teacher is None:
        return "none"
    return "soft" if teacher.is_floating_point() else "hard"


def _launch(num_classes: int, *, dist: bool, dense: bool, teacher: str, gradient: bool) -> Launch:
    block = max(128, min(2048, next_power_of_two(num_classes)))
    constants = (("DIST", dist), ("DENSE", dense), ("TEACHER", teacher), ("GRADIENT", gradient), ("BLOCK", block))
    return Launch(constants=constants, num_warps=max(1, block // 128))


_MEAN = Launch(constants=(("BLOCK", 1024),), num_warps=4)

# The arguments of both operators: logits of the heads; a dense target or labels a, b and lambda; the teacher's logits
# or labels; smoothing, tau, the weights of both parts, and the divisor of the teacher's part besides the batch.
Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Scalars = tuple[float, float, float, float, float]


def loss_parts(tensors: Tensors, scalars: Scalars) -> Tensor:
    """(3,) float32: the loss, its part of the true label and its part of the teacher."""
    cls = tensors[0]
    parts = cls.new_empty(3, dtype=torch.float32)
    if not len(cls):
        return parts.fill_(float("nan"))
    row_losses = cls.new_empty(2, len(cls), dtype=torch.float32)
    _take_rows(tensors, scalars, row_losses=row_losses)
    _distillation_mean[(1,)](row_losses, parts, len(cls), scalars[2], scalars[3], **_MEAN.options())
    return parts


def loss_gradients(grad_parts: Tensor, tensors: Tensors, scalars: Scalars) -> list[Tensor]:
    """Gradients of the heads' logits, of those of the three parts."""
    grads = [head.new_empty(head.shape) for head in tensors[:2] if head is not None]
    if len(grads[0]):
        _take_rows(tensors, scalars, grad_parts=grad_parts.contiguous(), grads=grads)
    return grads


def _take_rows(
    tensors: Tensors,
    scalars: Scalars,
    *,
    row_losses: Tensor | None = None,
    grad_parts: Tensor | None = None,
    grads: Sequence[Tensor] = (),
) -> None:
    cls, dist, dense, label_a, label_b, lam, teacher = tensors
    batch, num_classes = cls.shape
    launch = _launch(
        num_classes,
        dist=dist is not None,
        dense=dense is not None,
        teacher=teacher_kind(teacher),
        gradient=bool(grads),
    )

    # Products of constants are taken here, in double precision.
    smoothing, tau, weight_base, weight_distill, divisor = scalars
    kind = teacher_kind(teacher)
    base_scale = 0.5 if dist is not None and kind == "none" else 1.0
    distill_scale = (tau**2 if kind == "soft" else 1.0) / divisor
    if grads:
        base_scale /= batch
        distill_scale /= batch * (tau if kind == "soft" else 1.0)

    # An absent tensor is never touched; the kernel still takes a pointer there.
    def or_cls(tensor: Tensor | None) -> Tensor:
        return cls if tensor is None else tensor

    _distillation_rows[(batch,)](
        cls,
        or_cls(dist),
        or_cls(dense),
        or_cls(label_a),
        or_cls(label_b),
        or_cls(lam),
        or_cls(teacher),
        or_cls(row_losses),
        or_cls(grad_parts),
        grads[0] if grads else cls,
        grads[1] if len(grads) == 2 else cls,
        cls.stride(0),
        or_cls(dist).stride(0),
        or_cls(dense).stride(0),
        or_cls(teacher).stride(0),
        batch,
        num_classes,
        smoothing,
        tau,
        weight_base,
        weight_distill,
        base_scale,
        distill_scale,
        **launch.options(),
    )


def variants() -> list[Variant]:
    """Losses and gradients of DeiT's heads for ImageNet-1k and ImageNet-21k: labels with each kind of teacher."""
    found = []
    cases = [(1000, True, "hard"), (1000, True, "soft"), (1000, False, "none"), (21841, True, "hard")]
    for num_classes, dist, teacher in cases:
        for gradient in (False, True):
            launch = _launch(num_classes, dist=dist, dense=False, teacher=teacher, gradient=gradient)
            logits, losses = pointer(torch.bfloat16), pointer(torch.float32)
            signature = dict.fromkeys(("cls", "dist", "dense", "grad_cls", "grad_dist"), logits)
            signature |= {"label_a": "*i64", "label_b": "*i64", "lam": losses}
            signature |= {"teacher": logits if teacher == "soft" else "*i64" if teacher == "hard" else logits}
            signature |= {"row_losses": losses, "grad_parts": losses}
            signature |= dict.fromkeys(("stride_cls", "stride_dist", "stride_dense", "batch", "num_classes"), "i32")
            signature |= {"stride_teacher": "i32"} if teacher == "soft" else {}
            floats = ("smoothing", "tau", "weight_base", "weight_distill", "base_scale", "distill_scale")
            signature |= dict.fromkeys(floats, "fp32")
            name = f"{'backward' if gradient else 'forward'} {teacher} {'two heads' if dist else 'one head'}"
            found.append(
                launch.variant(
                    f"distillation_loss_{name} {DTYPES[torch.bfloat16]} K{num_classes}",
                    _distillation_rows,
                    signature,
                    ("batch",),
                    **({} if teacher == "soft" else {"stride_teacher": 1}),
                )
            )
    weights = {"weight_base": "fp32", "weight_distill": "fp32"}
    signature = {"row_losses": "*fp32", "parts": "*fp32", "batch": "i32", **weights}
    return [*found, _MEAN.variant("distillation_loss_mean", _distillation_mean, signature, ("batch",))]
