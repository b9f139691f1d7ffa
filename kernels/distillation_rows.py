"""Kernels of the distillation loss: one program per row of logits, then the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.launch import DTYPES, Launch, next_power_of_two, pointer
from fastdeit.kernels.reference import BinaryTargets
from fastdeit.kernels.variants import Variant

PLAIN, _SOFTENED = tl.constexpr(False), tl.constexpr(True)


@triton.jit
def softmax_stats(row, tau, num_classes, SOFTEN: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of a row's logits, divided by tau if SOFTEN, and the sum of exp(logit - maximum)."""
    columns = tl.arange(0, BLOCK)
    row_max = -float("inf")
    total = 0.0
    for start in range(0, num_classes, BLOCK):
        inside = start + columns < num_classes
        z = tl.load(row + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        if SOFTEN:
            z = tl.div_rn(z, tau)
        new_max = tl.maximum(row_max, tl.max(z, axis=0))
        # While every logit is -inf, their difference would be NaN.
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        total = total * tl.exp(row_max - shift) + tl.sum(tl.exp(z - shift), axis=0)
        row_max = new_max
    return row_max, total


@triton.jit
def _minus_max(row, offsets, inside, tau, row_max, SOFTEN: tl.constexpr):
    z = tl.load(row + offsets, mask=inside, other=0.0).to(tl.float32)
    if SOFTEN:
        z = tl.div_rn(z, tau)
    return z - row_max


@triton.jit
def _softplus_and_sigmoid(z):
    """log(1 + exp(z)) and its derivative, exact for logits far from 0 too."""
    small = tl.exp(-tl.abs(z))
    whole = 1.0 + small
    # log(1 + small) without the error of rounding the sum (Goldberg, ACM Computing Surveys 23(1), 1991, theorem 4).
    log_whole = tl.where(whole == 1.0, small, tl.log(whole) * small / tl.where(whole == 1.0, 1.0, whole - 1.0))
    return tl.maximum(z, 0.0) + log_whole, tl.where(z >= 0, 1.0, small) / whole


@triton.jit
def _target(
    dense_row, a, b, lam, smoothing, threshold, offsets, inside, num_classes, DENSE: tl.constexpr, BASE: tl.constexpr
):
    if DENSE:
        target = tl.load(dense_row + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        one_hot = tl.where(offsets == a, lam, 0.0) + tl.where(offsets == b, 1.0 - lam, 0.0)
        target = smoothing / num_classes + (1.0 - smoothing) * one_hot
    if BASE == "binary_threshold":
        target = tl.where(target > threshold, 1.0, 0.0)
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
    threshold,
    tau,
    weight_base,
    weight_distill,
    base_scale,
    distill_scale,
    DIST: tl.constexpr,
    DENSE: tl.constexpr,
    BASE: tl.constexpr,
    TEACHER: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Each program reads its row twice: for the softmax statistics, then, from the cache, for the losses or gradients.
    # Binary cross-entropy needs no statistics.
    # The terms are those of PyTorch's log_softmax and kl_div: subtracting sums of exponentials would lose a small
    # divergence to cancellation.
    sample = tl.program_id(0).to(tl.int64)
    cls += sample * stride_cls
    dist += sample * stride_dist
    dense += sample * stride_dense
    BINARY: tl.constexpr = BASE != "cross_entropy"
    cls_max = 0.0
    cls_total = 1.0
    dist_max = 0.0
    dist_total = 1.0
    if not BINARY or (TEACHER == "hard" and not DIST):
        cls_max, cls_total = softmax_stats(cls, tau, num_classes, PLAIN, BLOCK)
    if DIST and (not BINARY or TEACHER == "hard"):
        dist_max, dist_total = softmax_stats(dist, tau, num_classes, PLAIN, BLOCK)
    a = 0
    b = 0
    lam_a = 0.0
    valid = True
    if not DENSE:
        a = tl.load(label_a + sample)
        b = tl.load(label_b + sample)
        lam_a = tl.load(lam + sample).to(tl.float32)
        valid = (a >= 0) & (a < num_classes) & (b >= 0) & (b < num_classes)
    learner = cls
    if DIST:
        learner = dist
    if TEACHER == "hard":
        teacher_label = tl.load(teacher + sample)
        valid = valid & (teacher_label >= 0) & (teacher_label < num_classes)
    if TEACHER == "soft":
        teacher += sample * stride_teacher
        teacher_max, teacher_total = softmax_stats(teacher, tau, num_classes, _SOFTENED, BLOCK)
        student_max, student_total = softmax_stats(learner, tau, num_classes, _SOFTENED, BLOCK)
    # A label outside the classes turns loss and gradient into NaN: a GPU cannot raise.
    poison = tl.where(valid, 0.0, float("nan"))
    columns = tl.arange(0, BLOCK)
    target_sum = 1.0
    if GRADIENT:
        loss_grad = tl.load(grad_parts)
        base_grad = (loss_grad * weight_base + tl.load(grad_parts + 1)) * base_scale + poison
        distill_grad = (loss_grad * weight_distill + tl.load(grad_parts + 2)) * distill_scale + poison
        if DENSE and not BINARY:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, num_classes, BLOCK):
                offsets = start + columns
                total += tl.load(dense + offsets, mask=offsets < num_classes, other=0.0).to(tl.float32)
            target_sum = tl.sum(total, axis=0)
    base = tl.zeros((BLOCK,), tl.float32)
    distill = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_classes, BLOCK):
        offsets = start + columns
        inside = offsets < num_classes
        target = _target(dense, a, b, lam_a, smoothing, threshold, offsets, inside, num_classes, DENSE, BASE)
        cls_z = _minus_max(cls, offsets, inside, tau, cls_max, PLAIN)
        learner_z = cls_z
        learner_total = cls_total
        if DIST:
            learner_z = _minus_max(dist, offsets, inside, tau, dist_max, PLAIN)
            learner_total = dist_total
        if BINARY:
            cls_raw = _minus_max(cls, offsets, inside, tau, 0.0, PLAIN)
            cls_softplus, cls_sigmoid = _softplus_and_sigmoid(cls_raw)
            if DIST and TEACHER == "none":
                learner_raw = _minus_max(dist, offsets, inside, tau, 0.0, PLAIN)
                learner_softplus, learner_sigmoid = _softplus_and_sigmoid(learner_raw)
        if TEACHER == "soft":
            teacher_z = _minus_max(teacher, offsets, inside, tau, teacher_max, _SOFTENED)
            student_z = _minus_max(learner, offsets, inside, tau, student_max, _SOFTENED)
        if GRADIENT:
            if BINARY:
                cls_grad = base_grad * (cls_sigmoid - target)
            else:
                cls_grad = base_grad * (target_sum * (tl.exp(cls_z) / cls_total) - target)
            if TEACHER == "hard":
                learner_grad = distill_grad * (
                    tl.exp(learner_z) / learner_total - tl.where(offsets == teacher_label, 1.0, 0.0)
                )
            elif TEACHER == "soft":
                learner_grad = distill_grad * (tl.exp(student_z) / student_total - tl.exp(teacher_z) / teacher_total)
            elif DIST and BINARY:
                learner_grad = base_grad * (learner_sigmoid - target)
            elif DIST:
                learner_grad = base_grad * (target_sum * (tl.exp(learner_z) / learner_total) - target)
            else:
                learner_grad = tl.zeros((BLOCK,), tl.float32)
            if DIST:
                to = grad_dist + sample * num_classes + offsets
                tl.store(to, learner_grad.to(grad_dist.dtype.element_ty), mask=inside)
            else:
                cls_grad += learner_grad
            tl.store(grad_cls + sample * num_classes + offsets, cls_grad.to(grad_cls.dtype.element_ty), mask=inside)
        else:
            if BINARY:
                base += tl.where(inside, cls_softplus - target * cls_raw, 0.0)
            else:
                base += tl.where(inside, -target * (cls_z - tl.log(cls_total)), 0.0)
            learner_lp = learner_z - tl.log(learner_total)
            if TEACHER == "hard":
                distill += tl.where(inside & (offsets == teacher_label), -learner_lp, 0.0)
            elif TEACHER == "soft":
                teacher_lp = teacher_z - tl.log(teacher_total)
                divergence = tl.exp(teacher_z) / teacher_total * (teacher_lp - (student_z - tl.log(student_total)))
                distill += tl.where(inside, divergence, 0.0)
            elif DIST and BINARY:
                base += tl.where(inside, learner_softplus - target * learner_raw, 0.0)
            elif DIST:
                base += tl.where(inside, -target * learner_lp, 0.0)
    if not GRADIENT:
        tl.store(row_losses + sample, tl.sum(base, axis=0) * base_scale + poison)
        tl.store(row_losses + batch + sample, tl.sum(distill, axis=0) * distill_scale + poison)


@triton.jit
def _distillation_mean(row_losses, parts, batch, weight_base, weight_distill, BLOCK: tl.constexpr):
    # One program, so the order of the sum is fixed.
    columns = tl.arange(0, BLOCK)
    base = tl.zeros((BLOCK,), tl.float32)
    distill = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch, BLOCK):
        offsets = start + columns
        base += tl.load(row_losses + offsets, mask=offsets < batch, other=0.0)
        distill += tl.load(row_losses + batch + offsets, mask=offsets < batch, other=0.0)
    base_mean = tl.sum(base, axis=0) / batch
    distill_mean = tl.sum(distill, axis=0) / batch
    tl.store(parts, weight_base * base_mean + weight_distill * distill_mean)
    tl.store(parts + 1, base_mean)
    tl.store(parts + 2, distill_mean)


def teacher_kind(teacher: Tensor | None) -> Literal["none", "hard", "soft"]:
    """The kind of distillation: none, by a teacher's labels (B,), or by its logits (B, K)."""
    if teacher is None:
        return "none"
    return "soft" if teacher.is_floating_point() else "hard"


def base_kind(binary: BinaryTargets | None) -> str:
    """The kernel's form of the loss against the true label."""
    if binary is None:
        return "cross_entropy"
    return "binary" if binary.threshold is None else "binary_threshold"


def _launch(num_classes: int, *, dist: bool, dense: bool, base: str, teacher: str, gradient: bool) -> Launch:
    block = max(128, min(2048, next_power_of_two(num_classes)))
    constants = (("DIST", dist), ("DENSE", dense), ("BASE", base), ("TEACHER", teacher), ("GRADIENT", gradient))
    constants += (("BLOCK", block),)
    return Launch(constants=constants, num_warps=max(1, block // 128))


_MEAN = Launch(constants=(("BLOCK", 1024),), num_warps=4)

# Arguments of both operators. Tensors: logits of both heads; a dense target, or labels a, b and lambda; the teacher's
# logits or labels. Scalars: smoothing, tau, the weights of both parts, and further divisors of the base part and of
# the teacher's part. Then the form of the base part, and the threshold of its targets.
Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Scalars = tuple[float, float, float, float, float, float, str, float]


def loss_parts(tensors: Tensors, scalars: Scalars) -> Tensor:
    """(3,) float32: the loss, its part for the true label and its part for the teacher."""
    cls = tensors[0]
    parts = cls.new_empty(3, dtype=torch.float32)
    if not len(cls):
        return parts.fill_(float("nan"))
    row_losses = cls.new_empty(2, len(cls), dtype=torch.float32)
    _launch_rows(tensors, scalars, row_losses=row_losses)
    _distillation_mean[(1,)](row_losses, parts, len(cls), scalars[2], scalars[3], **_MEAN.options())
    return parts


def loss_gradients(grad_parts: Tensor, tensors: Tensors, scalars: Scalars) -> list[Tensor]:
    """Gradients of the heads' logits, from the gradients (3,) of the three parts."""
    grads = [head.new_empty(head.shape) for head in tensors[:2] if head is not None]
    if len(grads[0]):
        _launch_rows(tensors, scalars, grad_parts=grad_parts.contiguous(), grads=grads)
    return grads


def _launch_rows(
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
        base=scalars[6],
        teacher=teacher_kind(teacher),
        gradient=bool(grads),
    )

    # Multiply constants here, in double precision.
    smoothing, tau, weight_base, weight_distill, base_divisor, divisor, _, threshold = scalars
    kind = teacher_kind(teacher)
    base_scale = (0.5 if dist is not None and kind == "none" else 1.0) / base_divisor
    distill_scale = (tau**2 if kind == "soft" else 1.0) / divisor
    if grads:
        base_scale /= batch
        distill_scale /= batch * (tau if kind == "soft" else 1.0)

    # The kernel needs a pointer even for an absent tensor, which it never reads.
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
        threshold,
        tau,
        weight_base,
        weight_distill,
        base_scale,
        distill_scale,
        **launch.options(),
    )


def variants() -> list[Variant]:
    """Losses and gradients of DeiT's heads for ImageNet-1k and ImageNet-21k: mixed labels, each kind of teacher.

    The last is DeiT III's binary cross-entropy.
    """
    variants = []
    plain = "cross_entropy"
    cases = [(1000, True, plain, "hard"), (1000, True, plain, "soft"), (1000, False, plain, "none")]
    cases += [(21841, True, plain, "hard"), (1000, False, "binary_threshold", "none")]
    for num_classes, dist, base, teacher in cases:
        for gradient in (False, True):
            launch = _launch(num_classes, dist=dist, dense=False, base=base, teacher=teacher, gradient=gradient)
            logits, losses = pointer(torch.bfloat16), pointer(torch.float32)
            signature = dict.fromkeys(("cls", "dist", "dense", "grad_cls", "grad_dist"), logits)
            signature |= {"label_a": "*i64", "label_b": "*i64", "lam": losses}
            signature |= {"teacher": logits if teacher == "soft" else "*i64" if teacher == "hard" else logits}
            signature |= {"row_losses": losses, "grad_parts": losses}
            signature |= dict.fromkeys(("stride_cls", "stride_dist", "stride_dense", "batch", "num_classes"), "i32")
            signature |= {"stride_teacher": "i32"} if teacher == "soft" else {}
            floats = ("smoothing", "threshold", "tau", "weight_base", "weight_distill", "base_scale", "distill_scale")
            signature |= dict.fromkeys(floats, "fp32")
            kind = teacher if base == plain else "binary"
            name = f"{'backward' if gradient else 'forward'} {kind} {'two heads' if dist else 'one head'}"
            variants.append(
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
    return [*variants, _MEAN.variant("distillation_loss_mean", _distillation_mean, signature, ("batch",))]
