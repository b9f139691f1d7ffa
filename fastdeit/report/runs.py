"""Reads a run's `log.jsonl` and `run.json`. Writes nothing, and imports no PyTorch."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.parsing import read_json
from fastdeit.recipes import RECIPES
from fastdeit.recipes.curves import has_its_data
from fastdeit.report.incidents import Incident, incident
from fastdeit.training.log_lines import numbered_events

COLUMNS = ("global_step", "loss", "loss_base", "loss_distill", "lr", "images_per_second", "data_wait")
HEADS = ("class", "distillation", "fused_probabilities", "fused_logits")
_MOST = 16 << 20  # bytes of run.json
_LATEST = 1e11  # the latest time that a log may have, in seconds since 1970


@dataclass(frozen=True)
class Mark:
    """A resume, a rewind or a stop, and the step after which it happened."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    """The scores of one kind of weights ("model" or "ema"): for each head, top1, top5 and ece in percent, and loss.

    Runs of older versions have no ece.
    """

    epoch: int
    step: int
    weights: str
    images: int
    scores: dict[str, dict[str, float]]


@dataclass
class Run:
    """A run, as read from its folder.

    label       the folder's name, or its path if another run of the page has the same name
    starts      the events "start"
    ends        the time of the last line of each start
    columns     values of the training lines by name, see `COLUMNS`; one for each logged step, in order
    best        the last event "best"
    ending      the last of the events "start", "stopped" and "end"
    joules      energy of all GPUs in finished epochs; None if it was not measured
    record      `run.json`; if it is empty, `record_fault` says why
    """

    folder: Path
    label: str = ""
    starts: list[dict[str, Any]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    best: dict[str, Any] | None = None
    ending: dict[str, Any] = field(default_factory=dict)
    joules: float | None = None
    record: dict[str, Any] = field(default_factory=dict)
    record_fault: str | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the last start, by section."""
        return self.starts[-1]["recipe"]

    @property
    def steps(self) -> int:
        """The last step in the log."""
        trained = self.columns["global_step"]
        return max(int(trained[-1]) if len(trained) else 0, int(self.ending.get("global_step", 0)))

    @property
    def all_steps(self) -> int:
        """The steps of the whole run."""
        return int(self.starts[-1]["steps_per_epoch"]) * int(self.recipe["run"]["epochs"])

    @property
    def status(self) -> str:
        """`finished`, `stopped by SIGNAL`, or `incomplete`: still running, or killed."""
        if self.ending["event"] == "end":
            return "finished"
        return f"stopped by {self.ending['signal']}" if self.ending["event"] == "stopped" else "incomplete"

    @property
    def seconds(self) -> list[float]:
        """For each start, the time until its last log line."""
        return [max(0.0, end - start["time"]) for start, end in zip(self.starts, self.ends, strict=True)]

    @property
    def process_seconds(self) -> float:
        """The sum over all starts of their time multiplied by their number of processes."""
        return sum(time * int(start["world"]) for time, start in zip(self.seconds, self.starts, strict=True))

    @property
    def last_start(self) -> dict[str, Any]:
        """The last start in `run.json`; empty without one."""
        starts = self.record.get("starts")
        return starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders. Raises UserError if a folder is not a run, or is named twice."""
    runs = [read_run(folder) for folder in folders]
    places = [folder.resolve() for folder in folders]
    for at, folder in enumerate(folders):
        if places[at] in places[:at]:
            raise UserError(f"{folder}: is named twice: give each run once")
    names = [place.name or str(place) for place in places]
    for run, name in zip(runs, names, strict=True):
        run.label = name if names.count(name) == 1 else str(run.folder)
    return runs


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises UserError if it has no log, or the log has an invalid line."""
    log = folder / "log.jsonl"
    if not folder.is_dir():
        missing = "is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {missing}: name the folder of a run (--run.output of fastdeit train)")
    if not log.exists():
        raise UserError(f"{folder}: has no log.jsonl: name the folder of a run (--run.output of fastdeit train)")
    reader = _Reader(folder)
    _read(log, reader.take)
    if not reader.run.starts:
        raise UserError(f"{log}: has no event 'start': name the folder of a run, or restore its log")
    redone = folder / "log-redone.jsonl"
    if redone.exists():
        _read(redone, reader.take_redone)
    return reader.finished()


def _read(log: Path, take: Callable[[dict[str, Any]], object]) -> None:
    """Pass each event of a log to `take`. If `take` fails, raises UserError with the line's number."""
    for number, event in numbered_events(log):
        try:
            take(event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{log}, line {number}: not a line that a run writes ({event['event']}: {what}): restore or delete it"
            ) from error


class _Reader:
    """Takes the events of a log in order."""

    def __init__(self, folder: Path) -> None:
        self.run, self._last_step = Run(folder), 0
        self._rows: dict[int, tuple[float, ...]] = {}
        self._evaluations: dict[tuple[int, str], Evaluation] = {}

    def take(self, event: dict[str, Any]) -> None:
        """Add an event; unknown ones are ignored. Raises KeyError, TypeError and the like if a field is missing."""
        run, kind = self.run, event["event"]
        time = _number(event, "time", _LATEST)
        if kind == "train":
            self._last_step = _count(event, "global_step")
            self._rows[self._last_step] = tuple(_number(event, name) if name in event else math.nan for name in COLUMNS)
        elif kind == "eval":
            found = _evaluation(event)
            self._evaluations[found.step, found.weights] = found
        elif kind == "start":
            _check_start(event)
            run.starts.append(event)
            run.ends.append(time)
        elif kind == "best":
            _check_best(event)
            run.best = event
        elif kind == "gpus":
            joules = [each["joules"] for each in event["processes"] if each.get("joules") is not None]
            run.joules = (run.joules or 0.0) + math.fsum(joules) if joules else run.joules
        if kind in ("start", "stopped", "end"):
            run.ending = event
            self._last_step = self._last_step if kind == "start" else _count(event, "global_step")
        if run.ends:
            run.ends[-1] = max(run.ends[-1], time)
        found = incident(event, time, self._last_step)
        if found is not None:
            run.incidents.append(found)
            if kind in ("resume", "rewind", "stopped"):
                run.marks.append(Mark(_count(event, "global_step"), kind, found.text))

    def take_redone(self, event: dict[str, Any]) -> None:
        """Count the time of an event whose step the run later repeated."""
        time = _number(event, "time", _LATEST)
        at = bisect.bisect_right([start["time"] for start in self.run.starts], time) - 1
        self.run.ends[max(0, at)] = max(self.run.ends[max(0, at)], time)

    def finished(self) -> Run:
        rows = np.array([self._rows[step] for step in sorted(self._rows)], dtype=np.float64).reshape(-1, len(COLUMNS))
        self.run.columns = dict(zip(COLUMNS, rows.T, strict=True))
        self.run.evaluations = [self._evaluations[key] for key in sorted(self._evaluations)]
        try:
            record = read_json(self.run.folder / "run.json", _MOST)
        except FileNotFoundError:
            self.run.record_fault = "the folder has no run.json"
        except (OSError, UserError, ValueError) as error:
            self.run.record_fault = f"run.json cannot be read: {error}"
        else:
            self.run.record = record if isinstance(record, dict) else {}
            self.run.record_fault = None if self.run.record else "run.json is not a record that fastdeit wrote"
        return self.run


def _number(event: dict[str, Any], name: str, most: float = math.inf) -> float:
    value = event[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is not a number")
    if most < math.inf and not 0 <= value <= most:
        raise ValueError(f"{name} is out of range")
    return float(value)


def _count(event: dict[str, Any], name: str) -> int:
    return int(_number(event, name, 1e12))


def _check_start(event: dict[str, Any]) -> None:
    for name in ("world", "steps_per_epoch"):
        _count(event, name)
    if event.get("forecast_seconds") is not None:
        _number(event, "forecast_seconds")
    recipe = event["recipe"]
    if not isinstance(recipe["name"], str):
        raise TypeError("the recipe's name is not a string")
    if not all(isinstance(recipe.get(name, {}), dict) for name in ("model", "run", "departures")):
        raise TypeError("a section of the recipe has no fields")
    _count(recipe["run"], "epochs")
    _count(recipe["run"], "global_batch")


def _check_best(event: dict[str, Any]) -> None:
    _number(event, "score")
    _count(event, "global_step")
    if not all(isinstance(event[name], str) for name in ("checkpoint", "metric", "weights", "head")):
        raise TypeError("a name is not a string")


def _evaluation(event: dict[str, Any]) -> Evaluation:
    weights = event["weights"]
    if not isinstance(weights, str):
        raise TypeError("weights is not a string")
    names = ("top1", "top5", "loss", "ece")
    # Logs of older versions have no calibration error.
    scores = {
        head: {name: _number(event[head], name) for name in names if name != "ece" or name in event[head]}
        for head in HEADS
        if head in event
    }
    return Evaluation(_count(event, "epoch"), _count(event, "global_step"), weights, _count(event, "images"), scores)


def flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe's dict by their command-line names."""
    out: dict[str, Any] = {}
    for name, value in recipe.items():
        out |= {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
    return out


def trains_a_recipe_on_its_data(run: Run) -> bool:
    """Whether a run has a named recipe, and data of the size that the recipe's source used, mostly ImageNet-1k's."""
    recipe, start = run.recipe, run.starts[-1]
    batch = int(recipe["run"]["global_batch"])
    images = int(start["steps_per_epoch"]) * batch
    classes = recipe.get("model", {}).get("num_classes")
    name, sizes = recipe.get("name"), {each.images for each in run.evaluations}
    return name in RECIPES and all(has_its_data(name, images, batch, classes, size) for size in sizes or {None})


def published(run: Run) -> tuple[float, str] | None:
    """The top-1 that the source of the run's recipe states, and the source; None on other data."""
    if not trains_a_recipe_on_its_data(run):
        return None
    return _top1(RECIPES[run.recipe["name"]].__doc__ or "")


def _top1(docstring: str) -> tuple[float, str] | None:
    """The figure that a recipe's docstring takes from its source: `Top-1: 72.2 (paper, Table 5)`."""
    match = re.search(r"^\s*Top-1: (\d+\.\d+) \(((?:paper,|authors')[^)]*)\)", docstring, re.MULTILINE)
    return None if match is None else (float(match[1]), match[2])
