"""Accuracy of every head of a model on a data set."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastdeit.data import EvaluationData
from fastdeit.distributed import World
from fastdeit.kernels.reference import HEADS, head_log_probabilities
from fastdeit.memory import enough_for
from fastdeit.model.deit import StudentOutput
from fastdeit.model.kernel_choice import TORCH, Kernels
from fastdeit.model.networks import OfClasses
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.precision import Precision

Scores = dict[str, Any]
BINS = 15  # of the calibration error


class _Results(NamedTuple):
    """What one head makes of a batch, (B,) each.

    hit, near   whether the true label is its first, and one of its first five
    loss        cross-entropy with the true label
    decision    its first class
    confidence  the probability of that class
    """

    hit: Tensor
    near: Tensor
    loss: Tensor
    decision: Tensor
    confidence: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: EvaluationData,
    world: World,
    precision: Precision,
    *,
    kernels: Kernels = TORCH,
    progress: bool = False,
    batch_option: str = "--run.eval_batch",
    per_class: int = 0,
) -> Scores:
    """Top-1, top-5 and calibration error in percent, and the loss, of each head.

    Heads: `class`; and with a distillation token `distillation`, `fused_probabilities` (the paper's late
    fusion: sum of the softmaxes) and `fused_logits` (the released code's). The loss is cross-entropy with the
    true label; of `fused_probabilities`, that of the mean probability. With fewer than 5 classes top-5 counts
    all of them. Returns {"images": n, head: {"top1", "top5", "loss", "ece"}}, "fallbacks": n if PIL had to read n
    images, and "replaced": n if other images replaced n.

    "ece" is the expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2):
    the images are sorted by the probability of the predicted class into 15 equal intervals; it is the mean over the
    images of the distance between accuracy and mean probability in an image's interval.

    With a number of classes `per_class`, "classes" is {"images": [...], head: {"top1": [...], "top5": [...]}}, one
    value for each true label; the scores of a label without images are None.

    Where the data set holds ImageNet-ReaL's labels (`fastdeit-convert --real-labels`), a head has "real" too: top-1
    in percent of the images that have any, "real_images" of them, a hit being any of an image's labels (Beyer et al.
    2020, "Are we done with ImageNet?", section 3).

    Raises MachineError if the memory is too small for a batch; it names `batch_option`.
    """
    training, by_kernel = model.training, "evaluate_heads" in kernels.ops
    model.eval()
    # Columns: images, top-1 hits, top-5 hits, loss, images with ReaL labels, ReaL hits. A head that the model lacks
    # keeps a row of zeros.
    totals = torch.zeros(len(HEADS), 6, dtype=torch.float64, device=world.device)
    # Of each interval of confidence: images, sum of the confidence, hits. Of each class: images, hits, near hits.
    bins, classes = (torch.zeros(len(HEADS), n, 3, dtype=torch.float64, device=world.device) for n in (BINS, per_class))
    real = real_labels(data.loader.dataset)
    if real is not None:
        real = real.to(world.device)
    with data.batches() as batches:
        for batch in tqdm(batches, total=data.steps, desc="evaluate", leave=False, disable=None if progress else True):
            labels = batch.label_a.to(world.device, non_blocking=True)
            with precision.autocast(), enough_for("evaluating", batch.images, batch_option, world.device):
                output = model(batch.images.to(world.device, non_blocking=True))
            for head, result in enumerate((_by_kernel if by_kernel else _by_head)(output, labels)):
                one = torch.ones_like(result.loss)
                totals[head, :4] += torch.stack([one, result.hit, result.near, result.loss]).sum(1, dtype=torch.float64)
                bins[head] += _sums(_interval(result.confidence), BINS, one, result.confidence, result.hit)
                if per_class:
                    classes[head] += _sums(labels, per_class, one, result.hit, result.near)
                if real is not None:
                    # ReaL's labels number all classes of the network.
                    chosen = model.columns[result.decision] if isinstance(model, OfClasses) else result.decision
                    totals[head, 4:] += _real_hits(chosen, real[batch.index.to(world.device)])
    model.train(training)
    counts = torch.tensor([float(len(data.fallbacks)), float(len(data.replaced))], device=world.device)
    if not data.replicate:
        totals, counts, bins, classes = (world.sum(tensor) for tensor in (totals, counts, bins, classes))
    scores: Scores = {"images": int(totals[0, 0])}
    scores |= {name: int(count) for name, count in zip(("fallbacks", "replaced"), counts, strict=True) if count}
    errors = (bins[..., 1] - bins[..., 2]).abs().sum(1).tolist()
    for i, (head, values) in enumerate(zip(HEADS, totals.tolist(), strict=True)):
        count, top1, top5, loss, real_count, real_hits = values
        if count:
            scores[head] = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
            scores[head]["ece"] = 100 * errors[i] / count
            if per_class:
                by_class = scores.setdefault("classes", {"images": [int(row[0]) for row in classes[i].tolist()]})
                by_class[head] = _percentages(classes[i])
        if real_count:
            scores[head]["real"] = 100 * real_hits / real_count
            scores["real_images"] = int(real_count)
    return scores


@contextmanager
def swapped_weights(model: nn.Module, weights: dict[str, Tensor] | None) -> Iterator[None]:
    """The model with `weights` in place of its own, which come back afterwards; None changes nothing."""
    if weights is None:
        yield
        return
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


def real_labels(dataset: Dataset) -> Tensor | None:
    """ImageNet-ReaL's labels of every image of `dataset`, (N, most) int64 filled up with -1; None where it has none.

    Raises UserError where they are not N lists of class numbers.
    """
    lists = (dataset.sidecar or {}).get("real_labels")
    if lists is None:
        return None
    if not (isinstance(lists, list) and len(lists) == len(dataset) and all(isinstance(one, list) for one in lists)):
        raise UserError(f"{dataset.path}: its sidecar's real_labels are not {len(dataset)} lists. Convert it again")
    table = torch.full((len(lists), max(1, max(map(len, lists)))), -1)
    for row, labels in zip(table, lists, strict=True):
        if not all(type(label) is int and label >= 0 for label in labels):
            raise UserError(f"{dataset.path}: its sidecar's real_labels hold {labels}. Convert it again")
        row[: len(labels)] = torch.tensor(labels, dtype=torch.int64)
    return table


def _by_head(output: StudentOutput, labels: Tensor) -> list[_Results]:
    """The results of each of `HEADS` that there are."""
    out = []
    for log_probabilities in head_log_probabilities(*output):
        top = log_probabilities.topk(min(5, log_probabilities.shape[1])).indices == labels[:, None]
        loss = F.nll_loss(log_probabilities, labels, reduction="none")
        confidence, decision = log_probabilities.amax(1).exp(), log_probabilities.argmax(1)
        out.append(_Results(top[:, 0], top.any(1), loss, decision, confidence))
    return out


def _by_kernel(output: StudentOutput, labels: Tensor) -> list[_Results]:
    """What `_by_head` gives."""
    from fastdeit.kernels.head_evaluation import evaluate_heads  # here, since it needs Triton

    rank, decision, loss, confidence = evaluate_heads(*output, labels)
    near = rank < min(5, output.cls.shape[1])  # a label that is not a class has rank K
    columns = (tensor.unbind(1) for tensor in (rank == 0, near, loss, decision, confidence))
    return [_Results(*head) for head in zip(*columns, strict=True)]


def _interval(confidence: Tensor) -> Tensor:
    """(B,) int64: which of `BINS` equal intervals from 0 to 1 a probability lies in."""
    bounds = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence.double(), bounds, right=True).sub(1).clamp(0, BINS - 1)


def _sums(place: Tensor, count: int, *values: Tensor) -> Tensor:
    """(count, len(values)) float64: sums of the `values` (B,) that have the same `place` (B,), always in one order."""
    chosen = F.one_hot(place.long(), count).double()
    return chosen.T @ torch.stack(values, 1).double()


def _percentages(sums: Tensor) -> dict[str, list[float | None]]:
    """Top-1 and top-5 of each class, from its sums of images, hits and near hits."""
    rows = sums.tolist()
    return {
        name: [100 * row[column] / row[0] if row[0] else None for row in rows]
        for column, name in enumerate(("top1", "top5"), 1)
    }


def _real_hits(decision: Tensor, real: Tensor) -> Tensor:
    """(2,) float64 sums over the batch: images with any of the labels `real` (B, most), and those hit by the top-1."""
    any_label = (real >= 0).any(1)
    hit = (decision[:, None] == real).any(1)
    return torch.stack([any_label.sum(), hit.sum()]).double()


def headline_head(heads: Container[str], late_fusion: str | None) -> str:
    """The head of these that stands for the network: the late fusion if there are two, else the class head."""
    fused = f"fused_{late_fusion or 'probabilities'}"
    return fused if fused in heads else "class"


def headline(scores: Scores, late_fusion: str | None) -> float:
    """The top-1 of `headline_head`."""
    return scores[headline_head(scores, late_fusion)]["top1"]
