"""Profiles of a training step: the time of each of its kernels, stored as lines of `results/profiles.jsonl`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import RESULTS
from benchmarks.render import Record
from fastdeit.training.profiling import group_of

PROFILES = RESULTS / "profiles.jsonl"
NAME_LENGTH = 100  # characters of a kernel's name that are stored


class Kernel(NamedTuple):
    """A kernel's launches and microseconds in a step."""

    name: str
    launches: float
    microseconds: float


def short_name(name: str) -> str:
    """A kernel's name without PyTorch's namespaces, cut to `NAME_LENGTH` characters."""
    return re.sub(r"^void |\(anonymous namespace\)::|\bat::native::", "", name)[:NAME_LENGTH]


def profile_step(step: Callable[[], object], steps: int = 5) -> list[Kernel]:
    """The kernels of a warm step on a GPU, the longest first; means over `steps` of them.

    The first profiled step includes the start of tracing, so it is not counted. Kernels of a replayed CUDA graph are
    seen one by one.
    """
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities):
        step()
        torch.cuda.synchronize()
    with profile(activities=activities) as traced:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    launches: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for event in traced.events() or ():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            name = short_name(event.name)
            launches[name] += 1
            spent[name] += event.time_range.end - event.time_range.start
    kernels = [Kernel(name, launches[name] / steps, spent[name] / steps) for name in launches]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def profile_record(case: Record, form: str, kernels: Sequence[Kernel], seconds: float, environment: Record) -> Record:
    """A line of `profiles.jsonl`.

    case     the fields that identify the step, such as model and batch
    seconds  of a step in a loop, without the profiler
    """
    rows = [[kernel.name, round(kernel.launches, 2), round(kernel.microseconds, 2)] for kernel in kernels]
    ms = round(1e3 * seconds, 4)
    return {
        "benchmark": "profiles", **case, "form": form, "ms_per_step": ms, "kernels": rows, "environment": environment
    }  # fmt: skip


def kernels_of(record: Record) -> list[Kernel]:
    """The kernels of a stored profile."""
    return [Kernel(*row) for row in record["kernels"]]


def by_group(kernels: Iterable[Kernel]) -> dict[str, Kernel]:
    """Launches and microseconds of each group of kernels, named as by `profiling.group_of`."""
    totals: dict[str, Kernel] = {}
    for kernel in kernels:
        group = group_of(kernel.name)
        before = totals.get(group, Kernel(group, 0.0, 0.0))
        spent = before.microseconds + kernel.microseconds
        totals[group] = Kernel(group, before.launches + kernel.launches, spent)
    return totals


def newest(records: Iterable[Record], **wanted: Any) -> Record | None:
    """The latest record with these fields, whose card's name has the words `card`."""
    card = wanted.pop("card", "")
    matching = [
        record
        for record in records
        if record["environment"]["gpu"] is not None
        and re.search(rf"\b{re.escape(card)}\b", record["environment"]["gpu"]["name"])
        and all(record.get(name) == value for name, value in wanted.items())
    ]
    return max(matching, key=lambda record: record["environment"]["date"], default=None)


def profiles_path(results: Path) -> Path:
    """The file of profiles beside other results."""
    return results.parent / PROFILES.name
