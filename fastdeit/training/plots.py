"""Pictures of a run: its curves, the images it trains on, and how its two tokens differ."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from fastdeit.model.deit import token_cosines
from fastdeit.pipelines.errors import naming
from fastdeit.training.log_lines import read_log, without_repeats

_COLOURS = {"class": "#1f6fb4", "distillation": "#d9822b", "fused": "#2f8f4e", "teacher": "#7a7a7a"}


def curves(log: Path, path: Path, *, teacher_top1: float | None = None) -> None:
    """Loss, learning rate and accuracy of the run logged in `log`, as a PNG at `path`."""
    events = read_log(log)
    train, evaluations = without_repeats(events, "train"), without_repeats(events, "eval")
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)

    steps = [e["global_step"] for e in train]
    left.plot(steps, [e["loss"] for e in train], color="#333333", label="loss")
    if any(e["loss_distill"] for e in train):
        left.plot(steps, [e["loss_base"] for e in train], color=_COLOURS["class"], lw=1, label="class token")
        left.plot(
            steps, [e["loss_distill"] for e in train], color=_COLOURS["distillation"], lw=1, label="distillation token"
        )
    left.set(xlabel="step", ylabel="training loss", title="Loss")
    rate = left.twinx()
    rate.plot(steps, [e["lr"] for e in train], color="#bbbbbb", lw=1, ls="--")
    rate.set_ylabel("learning rate (dashed)", color="#888888")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    left.legend(frameon=False, loc="upper center")

    for weights, style in (("model", "-"), ("ema", ":")):
        chosen = [e for e in evaluations if e["weights"] == weights]
        for head, colour in (("class", "class"), ("distillation", "distillation"), ("fused_probabilities", "fused")):
            points = [(e["epoch"] + 1, e[head]["top1"]) for e in chosen if head in e]
            if points:
                label = head.replace("_probabilities", "") + (" (EMA)" if weights == "ema" else "")
                right.plot(*zip(*points, strict=True), style, color=_COLOURS[colour], label=label)
    if teacher_top1 is not None:
        right.axhline(teacher_top1, color=_COLOURS["teacher"], lw=1, label="teacher")
    right.set(xlabel="epoch", ylabel="top-1, %", title="Validation accuracy")
    if evaluations:
        right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top"]].set_visible(False)
    _save(figure, path)


def contact_sheet(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], path: Path, titles: list[str]
) -> None:
    """Normalised training images (B, 3, S, S) as the network sees them, a grid of eight columns, as a PNG."""
    pixels = images.float() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    shown = pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    rows = -(-len(shown) // 8)
    figure = Figure(figsize=(10, 1.45 * rows), layout="constrained")
    cells = np.atleast_2d(figure.subplots(rows, 8)).ravel()
    for cell in cells:
        cell.axis("off")
    for cell, image, title in zip(cells, shown, titles, strict=False):
        cell.imshow(image, interpolation="nearest")
        cell.set_title(title, fontsize=7, pad=2)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with naming(path):
        figure.savefig(path, dpi=120)


def token_cosine(tokens: list[torch.Tensor], path: Path) -> None:
    """Mean cosine of class and distillation token at the input and after each block, as a PNG at `path`.

    tokens  one (B, 2, C) tensor a layer. The paper (section 4) has 0.06 at the input, 0.93 at the last layer.
    """
    values = token_cosines(tokens)
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(values)), values, "o-", color=_COLOURS["fused"], label="this model")
    axes.plot([0, len(values) - 1], [0.06, 0.93], "x", color="#333333", label="paper, DeiT-B on ImageNet")
    axes.set(
        xlabel="block (0: input)",
        ylabel="cosine of class and distillation token",
        ylim=(min(-0.05, min(values) - 0.05), 1),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)
