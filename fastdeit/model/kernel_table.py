"""Measurements from which `model.kernels` "auto" chooses between our kernels and PyTorch's operations.

Our kernels and PyTorch's round differently, so a run measures nothing itself: the same table gives the same bits.
`python -m benchmarks tune --choose` writes the rows of a card; nobody edits them by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastdeit.model.attention_backend import BACKENDS
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import atomic_write
from fastdeit.pipelines.parsing import read_json
from fastdeit.precision import Precision
from fastdeit.sections import ModelConfig

PATH = Path(__file__).with_name("kernel_table.json")
COMMAND = "python -m benchmarks tune --choose"
OURS = "ours"
MARGIN = 0.03  # PyTorch wins only if it takes at least 3% less time than ours

Key = tuple[str, str, str, str]


def _tokens(cfg: ModelConfig) -> int:
    return (cfg.img_size // cfg.patch_size) ** 2 + 1 + cfg.distilled


def _rows(cfg: ModelConfig, classes: int) -> str:
    return f"{_tokens(cfg)} tokens, {cfg.embed_dim} channels"


def _normalized(cfg: ModelConfig, classes: int) -> str:
    scaled = ", LayerScale" * (cfg.layer_scale > 0)
    return _rows(cfg, classes) + scaled + ", skipping dropped samples" * (cfg.drop_path_mode == "skip")


def _heads(cfg: ModelConfig, classes: int) -> str:
    return f"{1 + cfg.distilled} x {classes} classes"


# The shape that an operation's speed depends on, without the batch.
_SHAPES: dict[str, Callable[[ModelConfig, int], str]] = {
    "assemble_tokens": _rows,
    "attention": lambda cfg, _: f"{_tokens(cfg)} tokens, {cfg.num_heads} heads of {cfg.embed_dim // cfg.num_heads}",
    "layer_norm": _normalized,
    "bias_gelu": lambda cfg, _: f"{_tokens(cfg)} tokens, {int(cfg.embed_dim * cfg.mlp_ratio)} channels",
    "distillation_loss": _heads,
    "evaluate_heads": _heads,
}


def key(card: str, op: str, cfg: ModelConfig, precision: Precision, num_classes: int) -> Key:
    """Card, operation, shape class and dtype: the key of the row for a model of `num_classes` classes."""
    dtype = str(precision.dtype or torch.float32).removeprefix("torch.")
    if op in ("assemble_tokens", "layer_norm") and cfg.residual_dtype == "bfloat16":
        dtype += ", bfloat16 residual"
    return card, op, _SHAPES[op](cfg, num_classes), dtype


def candidates(op: str) -> tuple[str, ...]:
    """PyTorch's forms of an operation: "torch", or the backends of its attention."""
    return tuple(BACKENDS) if op == "attention" else ("torch",)


def decide(windows: Mapping[str, Sequence[float]]) -> str:
    """The candidate to use, given each candidate's windows in milliseconds.

    Ours wins, unless the median of PyTorch's best is lower by `MARGIN` and its slowest window is faster than our
    fastest.
    """
    best = min(windows, key=lambda name: median(windows[name]))
    clear = median(windows[best]) <= (1 - MARGIN) * median(windows[OURS]) and max(windows[best]) < min(windows[OURS])
    return best if clear else OURS


@dataclass(frozen=True, kw_only=True)
class Row:
    """The choice for one operation on one card, with the measurement that decided it.

    card     its name from `torch.cuda.get_device_name`
    op, shape, dtype  from `key`
    choice   "ours" or one of `candidates(op)`: the result of `decide(windows)`
    windows  for each candidate, the milliseconds of forward and backward in each timed window
    batch, date, commit, torch, triton  of the measurement
    """

    card: str
    op: str
    shape: str
    dtype: str
    choice: str
    windows: dict[str, list[float]]
    batch: int
    date: str
    commit: str | None
    torch: str
    triton: str

    @property
    def key(self) -> Key:
        return self.card, self.op, self.shape, self.dtype

    def reason(self) -> str:
        """Why the choice is not ours, for the log."""
        name = "PyTorch" if self.choice == "torch" else f"PyTorch's {self.choice}"
        return f"{name} takes {median(self.windows[self.choice]):.3f} ms, ours {median(self.windows[OURS]):.3f}"


@dataclass(frozen=True)
class Table:
    """All rows by their keys; each new measurement raises the version."""

    version: int
    rows: Mapping[Key, Row]

    def updated(self, rows: Sequence[Row]) -> Table:
        """The next version, in which `rows` replace older rows with the same keys."""
        return replace(self, version=self.version + 1, rows={**self.rows, **{row.key: row for row in rows}})


def read(path: Path = PATH) -> Table:
    """The table at `path`. Raises UserError, naming the row, if `write` cannot have written it."""
    remedy = "restore the file from the repository"
    try:
        content = read_json(path)
        version, entries = int(content["version"]), list(content["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a table of kernels ({type(error).__name__}: {error}): {remedy}") from error
    rows: dict[Key, Row] = {}
    for number, values in enumerate(entries, 1):
        try:
            row = _row(values)
            if row.key in rows:
                raise ValueError("another row has its card, operation, shape and dtype")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            again = f"{remedy}, or delete the row and measure it again with `{COMMAND}`"
            raise UserError(f"{path}: row {number} ({values!s:.60}): {reason}: {again}") from error
        rows[row.key] = row
    return Table(version, rows)


def _row(values: dict[str, Any]) -> Row:
    """The row, checked. Raises ValueError if no measurement gives it; values of a wrong type raise other errors."""
    row = Row(**values)
    if row.op not in _SHAPES:
        raise ValueError(f"its op is not one of {', '.join(_SHAPES)}")
    names = OURS, *candidates(row.op)
    if not {OURS} <= row.windows.keys() <= set(names):
        raise ValueError(f"its windows are not those of {', '.join(names)}")
    if not all(times and all(0 < ms < math.inf for ms in times) for times in row.windows.values()):
        raise ValueError("its windows are not lists of milliseconds")
    if row.choice != decide(row.windows):
        raise ValueError(f"its choice is {row.choice:.40}, but its windows decide for {decide(row.windows)}")
    return row


def write(table: Table, path: Path = PATH) -> None:
    """Write `table` to `path`, one row per line."""
    rows = ",\n".join(json.dumps(asdict(table.rows[key])) for key in sorted(table.rows))
    with atomic_write(path) as file:
        file.write(f'{{"version": {table.version}, "rows": [\n{rows}\n]}}\n'.encode())
