"""Accuracy of every head of a model on a data set."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

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
) -> Scores:
    """Top-1 and top-5 in percent, and the loss, of each head.

    Heads: `class`; and with a distillation token `distillation`, `fused_probabilities` (the paper's late
    fusion: sum of the softmaxes) and `fused_logits` (the released code's). The loss is cross-entropy with the
    true label; of `fused_probabilities`, that of the mean probability. With fewer than 5 classes top-5 counts
    all of them. Returns {"images": n, head: {"top1", "top5", "loss"}}, "fallbacks": n if PIL had to read n
    images, and "replaced": n if other images replaced n.

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
    real = real_labels(data.loader.dataset)
    if real is not None:
        real = real.to(world.device)
    with data.batches() as batches:
        for batch in tqdm(batches, total=data.steps, desc="evaluate", leave=False, disable=None if progress else True):
            labels = batch.label_a.to(world.device, non_blocking=True)
            with precision.autocast(), enough_for("evaluating", batch.images, batch_option, world.device):
                output = model(batch.images.to(world.device, non_blocking=True))
            for row, (hits, decision) in zip(
                totals, (_by_kernel if by_kernel else _by_head)(output, labels), strict=False
            ):
                row[:4] += hits
                if real is not None:
                    # ReaL's labels number all classes of the network.
                    chosen = model.columns[decision] if isinstance(model, OfClasses) else decision
                    row[4:] += _real_hits(chosen, real[batch.index.to(world.device)])
    model.train(training)
    counts = torch.tensor([float(len(data.fallbacks)), float(len(data.replaced))], device=world.device)
    if not data.replicate:
        totals, counts = world.sum(totals), world.sum(counts)
    scores: Scores = {"images": int(totals[0, 0])}
    scores |= {name: int(count) for name, count in zip(("fallbacks", "replaced"), counts, strict=True) if count}
    for head, (count, top1, top5, loss, real_count, real_hits) in zip(HEADS, totals.tolist(), strict=True):
        if count:
            scores[head] = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
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


def _by_head(output: StudentOutput, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each of `HEADS` that there are: (4,) float64 sums over the batch, and the decisions (B,).

    The sums are of images, top-1 hits, top-5 hits and the loss.
    """
    count = torch.tensor(float(len(labels)), device=labels.device)
    out = []
    for log_probabilities in head_log_probabilities(*output):
        top = log_probabilities.topk(min(5, log_probabilities.shape[1])).indices == labels[:, None]
        loss = F.nll_loss(log_probabilities, labels, reduction="sum")
        hits = torch.stack([count, top[:, 0].sum(), top.any(1).sum(), loss]).double()
        out.append((hits, log_probabilities.argmax(1)))
    return out


def _by_kernel(output: StudentOutput, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What `_by_head` gives."""
    from fastdeit.kernels.head_evaluation import evaluate_heads  # here, since it needs Triton

    rank, decision, loss = evaluate_heads(*output, labels)
    top5 = rank < min(5, output.cls.shape[1])  # a label that is not a class has rank K
    hits = torch.stack([torch.ones_like(loss), rank == 0, top5, loss]).sum(1, dtype=torch.float64)
    return list(zip(hits.unbind(1), decision.unbind(1), strict=True))


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
