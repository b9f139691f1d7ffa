"""Keeps track of the checkpoint with the best score: the file `best.json`, and the link `best.pt`."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from fastdeit import checkpoint
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import atomic_write
from fastdeit.pipelines.parsing import read_json
from fastdeit.training.evaluation import Scores, headline_head

Metric = Literal["top1", "top5", "loss"]
_FILE, _LINK = "best.json", "best.pt"
_MOST = 1 << 16  # bytes of best.json


def best_names(folder: Path) -> set[str]:
    """The names of the checkpoints in `folder` to keep, however old, because they are the best."""
    stored = _read(folder)
    return {str(stored["checkpoint"])} if stored is not None else set()


def note_best(path: Path, scores: dict[str, Scores], metric: Metric, late_fusion: str | None) -> dict[str, Any] | None:
    """Make the checkpoint at `path` the best of its folder if its score is better than that of the best so far.

    The score is that of the average of the weights if it was evaluated, else of the weights themselves, and of the
    `headline_head`. Returns what `best.json` then holds: checkpoint, metric, weights, head, score, global_step; None if
    another checkpoint stays the best. Raises OSError if the file cannot be written.
    """
    weights = "ema" if "ema" in scores else "model"
    head = headline_head(scores[weights], late_fusion)
    named = {"metric": metric, "weights": weights, "head": head}
    score, before = float(scores[weights][head][metric]), _read(path.parent)
    if not math.isfinite(score):
        return None
    if before is not None and all(before.get(name) == value for name, value in named.items()):
        better = score < before["score"] if metric == "loss" else score > before["score"]
        if not better:
            return None
    best = {"checkpoint": path.name, **named, "score": score, "global_step": checkpoint.steps_of(path)}
    with atomic_write(path.parent / _FILE) as file:
        file.write((json.dumps(best, indent=2) + "\n").encode())
    checkpoint.point(path.parent, _LINK, path)
    return best


def forget_best(folder: Path, deleted: list[Path]) -> None:
    """Remove `best.json` and `best.pt` if they name a checkpoint that is about to be `deleted`.

    A run that goes back writes another checkpoint under the same name, to which the old score does not belong. Raises
    OSError if they cannot be removed.
    """
    if best_names(folder) & {path.name for path in deleted}:
        (folder / _FILE).unlink()
        checkpoint.point(folder, _LINK, None)


def _read(folder: Path) -> dict[str, Any] | None:
    """What `best.json` holds; None if it is missing, if its checkpoint is missing, or if we did not write it."""
    try:
        stored = read_json(folder / _FILE, _MOST)
        named = folder / str(stored["checkpoint"])
        whole = named in checkpoint.found(folder) and type(stored["score"]) is float
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return None
    return stored if whole else None
