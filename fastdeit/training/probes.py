"""How good frozen features are: a k-NN classifier and a linear one, trained on the features of training images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastdeit.data import EvaluationData
from fastdeit.distributed import World
from fastdeit.memory import enough_for
from fastdeit.model.deit import DeiT
from fastdeit.model.networks import ConvnetStudent
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import Precision

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's evaluation (Caron et al., arXiv 2104.14294)
KNN, LINEAR = f"{NEIGHBOURS}-nn", "linear probe"
_CHUNK = 4096  # rows whose similarities or logits are held at once


@torch.no_grad()
def features(
    model: nn.Module, data: EvaluationData, world: World, precision: Precision, *, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """What the classifier of a network reads, (N, C) float32 on its device, and the labels (N,), in the data's order.

    A DeiT's is the class token after the last normalisation, and the distillation token beside it if there is one; a
    timm model's is what its own head reads. Raises UserError on several processes.
    """
    if world.size > 1:
        raise UserError("--probe runs on one process: start it without torchrun")
    model.eval()
    rows, labels = [], []
    with data.batches() as batches:
        for batch in tqdm(batches, total=data.steps, desc="features", leave=False, disable=None if progress else True):
            with precision.autocast(), enough_for("computing features of", batch.images, "--batch", world.device):
                rows.append(_read(model, batch.images.to(world.device)).float())
            labels.append(batch.label_a.to(world.device))
    return torch.cat(rows), torch.cat(labels)


def of_classes(features: Tensor, labels: Tensor, columns: list[int] | None) -> tuple[Tensor, Tensor]:
    """Keep the features (N, D) whose labels (N,) are in `columns`; replace each label by its index in `columns`.

    None keeps all, as they are.
    """
    if columns is None:
        return features, labels
    place = labels.new_full((max(int(labels.max()), *columns) + 1,), -1)
    place[columns] = torch.arange(len(columns), device=place.device)
    kept = place[labels] >= 0
    return features[kept], place[labels[kept]]


def _read(model: Any, images: Tensor) -> Tensor:
    if isinstance(model, DeiT):
        return model.forward_features(images)[:, : model.num_prefix_tokens].flatten(1)
    if isinstance(model, ConvnetStudent):
        network: Any = model.network
        return network.forward_head(network.forward_features(images), pre_logits=True)
    raise UserError(f"a {type(model).__name__} has no features to probe")


def knn_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int, neighbours: int = NEIGHBOURS) -> Tensor:
    """Votes (M, classes) of the rows of `train` (N, C) that are nearest to each row of `test` (M, C), by cosine.

    A vote counts exp(cosine / TEMPERATURE). A class without votes has -inf.
    """
    train, votes = F.normalize(train, dim=1), []
    for part in F.normalize(test, dim=1).split(_CHUNK):
        cosine, near = (part @ train.T).topk(min(neighbours, len(train)), dim=1)
        vote = part.new_zeros(len(part), classes)
        votes.append(vote.scatter_add_(1, labels[near], (cosine / TEMPERATURE).exp()))
    total = torch.cat(votes)
    return total.where(total > 0, -torch.inf)


def linear_classifier(
    train: Tensor, labels: Tensor, classes: int, *, strength: float = 1.0, steps: int = 200
) -> nn.Linear:
    """Logistic regression on `train` (N, C) by L-BFGS, to its minimum or `steps` iterations.

    It minimises the summed cross-entropy plus half the squared weights divided by `strength`, scikit-learn's C.
    """
    layer = nn.Linear(train.shape[1], classes, device=train.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    options: dict[str, Any] = {"max_iter": steps, "tolerance_grad": 1e-7, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(layer.parameters(), history_size=20, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = layer.weight.square().sum() / (2 * strength * len(train))
        total.backward()
        for rows, own in zip(train.split(_CHUNK), labels.split(_CHUNK), strict=True):
            part = F.cross_entropy(layer(rows), own, reduction="sum") / len(train)
            part.backward()
            total = total.detach() + part.detach()
        return total

    optimizer.step(closure)
    return layer


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 in percent of both classifiers; `train` and `test` are what `features` returns.

    Features are standardised for the linear one, by mean and deviation of the training images.
    """
    (rows, labels), (others, targets) = train, test
    deviation, mean = torch.std_mean(rows, dim=0, correction=0)
    scaled, scaled_others = ((each - mean) / deviation.clamp_min(1e-6) for each in (rows, others))
    with torch.enable_grad():
        linear = linear_classifier(scaled, labels, classes)
    with torch.no_grad():
        scores = {KNN: knn_scores(rows, labels, others, classes), LINEAR: linear(scaled_others)}
    return {name: _hits(each, targets) for name, each in scores.items()}


def _hits(scores: Tensor, targets: Tensor) -> dict[str, float]:
    values, chosen = scores.topk(min(5, scores.shape[1]), dim=1)
    hit = (chosen == targets[:, None]) & values.isfinite()
    share = 100 / max(1, len(targets))
    return {"top1": share * int(hit[:, 0].sum()), "top5": share * int(hit.any(1).sum())}
