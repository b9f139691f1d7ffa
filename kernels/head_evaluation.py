"""Rank of the true label, decision, loss and confidence for every head and both late fusions, in one kernel."""

# Triton annotates the result of a reduction as a union of every possible type.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.distillation_rows import PLAIN, softmax_stats
from fastdeit.kernels.launch import DTYPES, Launch, check, next_power_of_two, operator, pointer
from fastdeit.kernels.reference import HEADS
from fastdeit.kernels.variants import Variant


class HeadEvaluation(NamedTuple):
    """Results per sample and head: (B, 1) without a distillation head, else (B, 4) in the order of `HEADS`.

    rank        int32: classes ranked before the true label; below 5 is a top-5 hit. The lower class wins a tie
    decision    int32: the class with the largest score
    loss        float32: cross-entropy with the true label; for `fused_probabilities`, of the mean probability
    confidence  float32: probability of the decision
    """

    rank: Tensor
    decision: Tensor
    loss: Tensor
    confidence: Tensor


@triton.jit
def _probabilities(row, offsets, inside, row_max, total):
    return tl.exp(tl.load(row + offsets, mask=inside, other=0.0).to(tl.float32) - row_max) / total


@triton.jit
def _score(cls, dist, offsets, inside, cls_max, cls_total, dist_max, dist_total, HEAD: tl.constexpr):
    if HEAD == 0:
        score = tl.load(cls + offsets, mask=inside, other=0.0).to(tl.float32)
    elif HEAD == 1:
        score = tl.load(dist + offsets, mask=inside, other=0.0).to(tl.float32)
    elif HEAD == 2:
        score = _probabilities(cls, offsets, inside, cls_max, cls_total) + _probabilities(
            dist, offsets, inside, dist_max, dist_total
        )
    else:
        cls_score = tl.load(cls + offsets, mask=inside, other=0.0).to(tl.float32)
        score = (cls_score + tl.load(dist + offsets, mask=inside, other=0.0).to(tl.float32)) * 0.5
    return score


@triton.jit
def _evaluate_heads(
    cls,
    dist,
    labels,
    rank,
    decision,
    loss,
    confidence,
    stride_cls,
    stride_dist,
    num_classes,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    cls += sample * stride_cls
    dist += sample * stride_dist
    label = tl.load(labels + sample)
    cls_max, cls_total = softmax_stats(cls, 1.0, num_classes, PLAIN, BLOCK)
    dist_max = cls_max
    dist_total = cls_total
    if HEADS > 1:
        dist_max, dist_total = softmax_stats(dist, 1.0, num_classes, PLAIN, BLOCK)
    columns = tl.arange(0, BLOCK)
    for head in tl.static_range(HEADS):
        # Take the label's score from its tile, so it is bit-identical in the comparison below.
        label_score = -float("inf")
        best = -float("inf")
        best_class = 0
        row_max = -float("inf")
        total = 0.0
        for start in range(0, num_classes, BLOCK):
            offsets = start + columns
            inside = offsets < num_classes
            score = _score(cls, dist, offsets, inside, cls_max, cls_total, dist_max, dist_total, head)
            tile_score = tl.sum(tl.where(offsets == label, score, 0.0), axis=0)
            label_score = tl.where((label >= start) & (label < start + BLOCK), tile_score, label_score)
            score = tl.where(inside, score, -float("inf"))
            tile_max = tl.max(score, axis=0)
            best_class = tl.where(tile_max > best, start + tl.argmax(score, axis=0), best_class)
            best = tl.maximum(best, tile_max)
            new_max = tl.maximum(row_max, tile_max)
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
            total = total * tl.exp(row_max - shift) + tl.sum(tl.exp(score - shift), axis=0)
            row_max = new_max
        label_rank = 0
        for start in range(0, num_classes, BLOCK):
            offsets = start + columns
            inside = offsets < num_classes
            score = _score(cls, dist, offsets, inside, cls_max, cls_total, dist_max, dist_total, head)
            # Count every class not known to rank after the label, so a NaN never makes a hit.
            ranked_after = (score < label_score) | ((score == label_score) & (offsets >= label))
            label_rank += tl.sum((inside & (ranked_after == 0)).to(tl.int32), axis=0)
        valid = (label >= 0) & (label < num_classes)
        if head == 2:
            nll = -tl.log(tl.maximum(label_score * 0.5, 1e-30))
            sure = best * 0.5
        else:
            nll = row_max + tl.log(total) - label_score
            sure = 1.0 / total
        offset = sample * HEADS + head
        tl.store(rank + offset, tl.where(valid, label_rank, num_classes))
        tl.store(decision + offset, best_class)
        tl.store(loss + offset, tl.where(valid, nll, float("nan")))
        tl.store(confidence + offset, sure)


def _launch(num_classes: int, heads: int) -> Launch:
    block = max(128, min(2048, next_power_of_two(num_classes)))
    return Launch(constants=(("HEADS", heads), ("BLOCK", block)), num_warps=max(1, block // 128))


@operator("fastdeit::evaluate_heads")
def _op(cls: Tensor, dist: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake(cls, dist, labels)
    if cls.numel():
        second = cls if dist is None else dist
        launch = _launch(cls.shape[1], outputs[0].shape[1])
        _evaluate_heads[(len(cls),)](
            cls,
            second,
            labels,
            outputs[0],
            outputs[1],
            outputs[2],
            outputs[3],
            cls.stride(0),
            second.stride(0),
            cls.shape[1],
            **launch.options(),
        )
    return outputs


@_op.register_fake
def _fake(cls: Tensor, dist: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = len(cls), 1 if dist is None else len(HEADS)
    rank, decision = (cls.new_empty(shape, dtype=torch.int32) for _ in range(2))
    loss, confidence = (cls.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return rank, decision, loss, confidence


@torch.no_grad()
def evaluate_heads(cls_logits: Tensor, dist_logits: Tensor | None, labels: Tensor) -> HeadEvaluation:
    """Rank, decision, loss and confidence of a batch, for both heads and both late fusions.

    cls_logits, dist_logits  (B, K) float32, float16 or bfloat16; the second may be None
    labels                   (B,) integers

    "fused_probabilities" is the sum of the two softmaxes (Touvron et al., arXiv 2012.12877, section 4, "joint
    classifiers"), "fused_logits" the mean of the logits (the released code). A label outside the classes has rank K
    and a NaN loss; a NaN score never makes a hit. Raises ValueError for mismatched shapes and without a GPU.
    """
    check("evaluate_heads", cls_logits=cls_logits, dist_logits=dist_logits)
    if cls_logits.ndim != 2 or not cls_logits.shape[1]:
        raise ValueError(f"cls_logits is {tuple(cls_logits.shape)}: give (batch, classes)")
    if dist_logits is not None and dist_logits.shape != cls_logits.shape:
        raise ValueError(f"dist_logits is {tuple(dist_logits.shape)}, cls_logits {tuple(cls_logits.shape)}")
    if labels.shape != cls_logits.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}: give {len(cls_logits)} integers")
    if labels.device != cls_logits.device:
        raise ValueError(f"labels lie on {labels.device}, the logits on {cls_logits.device}: move them there")
    cls, dist = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (cls_logits, dist_logits))
    assert cls is not None
    return HeadEvaluation(*_op(cls, dist, labels.contiguous()))


def variants() -> list[Variant]:
    """The launches for ImageNet-1k, with one head and with two."""
    low = pointer(torch.bfloat16)
    signature = {"cls": low, "dist": low, "labels": "*i64", "rank": "*i32", "decision": "*i32"}
    signature |= dict.fromkeys(("loss", "confidence"), "*fp32")
    signature |= dict.fromkeys(("stride_cls", "stride_dist", "num_classes"), "i32")
    return [
        _launch(1000, heads).variant(
            f"evaluate_heads {DTYPES[torch.bfloat16]} {heads} outputs", _evaluate_heads, signature
        )
        for heads in (1, len(HEADS))
    ]
