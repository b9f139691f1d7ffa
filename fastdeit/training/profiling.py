"""`run.profile`: the time of each part of a training step, as a trace and as a table."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError, naming
from fastdeit.sections import RunConfig

WARM_UP = 6  # steps before the first profiled one, for compilation and the recording of a CUDA graph
DISPATCH, REST = "Python and dispatch", "other"
LABEL = "fastdeit."  # prefix of the ranges that `step` marks; the rest of the name is the group
# A kernel in a CUDA graph has only its name, so on a GPU the name gives the group: the first match, in any case.
# torch.compile names a kernel after the operators fused into it: `triton_poi_` for element-wise ones, `triton_red_` and
# `triton_per_` for reductions.
_BY_NAME: tuple[tuple[str, str], ...] = (
    ("sum over processes", r"nccl|gloo|allreduce|^c10d::"),
    ("augmentation", r"^(_normalize_erase_mix|_pass|_taps|_tables|_pixels|_box)$"),
    ("casts", r"^triton_poi_fused__to_copy_((t|view|slice|unsqueeze)_)*\d+$"),
    ("copies", r"^triton_poi_\w*clone"),
    ("element-wise", r"^triton_poi_\w*(slice|select)_backward"),
    ("sums", r"^_column_sum$|^triton_(red|per)_fused_(slice_)?sum_|sum_functor|::sum$"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("loss", r"softmax|nll_loss|cross_entropy|kl_div|distillation|evaluate_heads"),
    ("average", r"lerp"),
    ("optimizer", r"adam|sgd|multi_tensor_apply|_foreach_"),
    ("LayerNorm", r"layer_?norm"),
    ("GELU", r"gelu"),
    ("tokens", r"assemble_tokens"),
    ("convolution", r"conv|fprop|dgrad|wgrad|cudnn|winograd"),
    ("GEMM", r"gemm|nvjet|cutlass|cublas|splitk|::(mm|addmm|bmm|baddbmm|matmul|linear)$"),
    ("copies", r"memcpy|memset|copy|clone|contiguous|::(fill_|zero_|to|cat)$"),
    (
        "element-wise",
        r"norm|relu|elementwise|reduce|^triton_|cpp_fused|"
        r"::(add|sub|rsub|mul|div|mean|neg|exp|log|sqrt|square|pow|silu|sigmoid|max_pool\w*|where|scatter)_?(_out)?$",
    ),
)


class Event(NamedTuple):
    """One run of an operator or a kernel and its own time; the name is empty for time between operators."""

    name: str
    group: str
    start: float
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """The measured time of some steps, in seconds.

    wall     by the clock; on a GPU from the end of the work before these steps to the end of theirs
    waited   the part of `wall` in which the host waited for its next batch
    busy     the part of `wall` in which the device worked; None on a CPU
    """

    device: str
    steps: int
    images: int  # a step, on this process
    wall: float
    waited: float
    busy: float | None
    events: Sequence[Event]

    def groups(self) -> dict[str, float]:
        """Seconds by group, the largest first."""
        out: dict[str, float] = defaultdict(float)
        for event in self.events:
            out[event.group] += event.microseconds / 1e6
        if self.busy is None:
            out["waiting for data"] = self.waited
            out[DISPATCH] = max(0.0, self.wall - sum(v for k, v in out.items() if k != DISPATCH))
        else:
            out["device idle"] = max(0.0, self.wall - self.busy)
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def table(self, most: int = 15) -> str:
        """Both tables, as Markdown: groups, and the `most` operators or kernels that took longest."""
        each = 1e3 / self.steps
        lines = [
            "# Where a training step goes",
            "",
            f"{self.steps} steps of {self.images} images on {self.device}: {self.wall * each:.3f} ms a step, "
            f"{self.images * self.steps / self.wall:.0f} images/s under the profiler. The host waited "
            f"{self.waited * each:.3f} ms a step for data.",
            "",
            "| part | ms a step | share |",
            "|---|---:|---:|",
        ]
        lines += [f"| {k} | {v * each:.3f} | {100 * v / self.wall:.1f}% |" for k, v in self.groups().items()]
        if self.busy is not None:
            lines += ["", "Shares add up to more than 100% where streams overlap."]
        lines += [
            "",
            f"## The {most} that take longest",
            "",
            "| name | part | times a step | ms a step | share |",
            "|---|---|---:|---:|---:|",
        ]
        spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in self.events:
            if event.name:
                spent[event.name, event.group].append(event.microseconds / 1e6)
        longest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:most]
        lines += [
            f"| `{_short(name)}` | {group} | {len(times) / self.steps:.1f} | {sum(times) * each:.3f} | "
            f"{100 * sum(times) / self.wall:.1f}% |"
            for (name, group), times in longest
        ]
        return "\n".join(lines) + "\n"


def open_profiler(run: RunConfig, world: World, folder: Path, *, steps_per_epoch: int) -> StepProfiler | None:
    """The profiler that `run.profile` asks for, on the main process.

    Raises UserError if no epoch of the run has room for that many steps.
    """
    most = room(steps_per_epoch, run.epochs)
    if run.profile > most:
        raise UserError(
            f"run.profile {run.profile}: {run.epochs} epochs of {steps_per_epoch} steps leave {most} steps of "
            f"one epoch after warm-up: profile fewer, or make the run longer"
        )
    if not (run.profile and world.main):
        return None
    return StepProfiler(folder, run.profile, run.global_batch // world.size, world.device)


class StepProfiler:
    """Profiles some steps of one epoch while the run goes on.

    folder  where `profile.md` and `profile.json.gz`, a trace for chrome://tracing or Perfetto, are written
    steps   how many to profile, after `WARM_UP` steps, in the first epoch with that many left
    images  per step, on this process
    """

    def __init__(self, folder: Path, steps: int, images: int, device: torch.device) -> None:
        self.folder, self.steps, self.images, self.device = folder, steps, images, device
        self._profile: profile | None = None
        self._seen, self._taken = 0, 0
        self._began, self._waited = 0.0, 0.0

    def step(self, left: int, waited: float) -> Profile | None:
        """Call this after each step, until it returns a profile.

        left    steps left in the epoch
        waited  seconds that the host has waited for data so far
        """
        self._seen += 1
        if self._profile is None:
            if self._seen >= WARM_UP and left >= self.steps + 1:
                activities = [ProfilerActivity.CPU]
                activities += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
                # The first step includes the start of tracing, so it is not counted.
                plan = schedule(wait=0, warmup=1, active=self.steps, repeat=1)
                self._profile = profile(activities=activities, schedule=plan, acc_events=True)
                self._profile.start()
            return None
        last = self._taken == self.steps
        if self._taken == 0 or last:
            self._wait()
        if last:
            wall, waited = time.perf_counter() - self._began, waited - self._waited
        self._profile.step()
        if not last:
            if self._taken == 0:
                self._began, self._waited = time.perf_counter(), waited
            self._taken += 1
            return None
        return self._finish(self._profile, wall, waited)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _finish(self, traced: profile, wall: float, waited: float) -> Profile:
        traced.stop()
        cuda = self.device.type == "cuda"
        events = list(_device_events(traced) if cuda else _host_events(traced))
        device = torch.cuda.get_device_name(self.device) if cuda else "the CPU"
        profile = Profile(device, self.steps, self.images, wall, waited, _union(events) / 1e6 if cuda else None, events)
        with naming(self.folder):
            traced.export_chrome_trace(str(self.folder / "profile.json.gz"))
            (self.folder / "profile.md").write_text(profile.table(), encoding="utf-8")
        return profile


def room(steps_per_epoch: int, epochs: int) -> int:
    """The most steps that a `StepProfiler` can profile in a run from its start."""
    first, end = WARM_UP - 1, min(WARM_UP - 1 + steps_per_epoch, steps_per_epoch * epochs)
    return max([0, *(steps_per_epoch - 2 - step % steps_per_epoch for step in range(first, end))])


def group_of(name: str) -> str:
    """The part of a step that an operator or a kernel belongs to, judged by its name."""
    return next((group for group, pattern in _BY_NAME if re.search(pattern, name, re.IGNORECASE)), REST)


def _device_events(traced: profile) -> Iterable[Event]:
    for event in _events(traced):
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spent = event.time_range
            yield Event(event.name, group_of(event.name), spent.start, spent.end - spent.start)


def _host_events(traced: profile) -> Iterable[Event]:
    for event in _events(traced):
        # Everything else is time of Python, autograd or the profiler between operators.
        operator = "::" in event.name and not event.name.startswith("autograd::")
        group = _range_of(event) or (group_of(event.name) if operator else DISPATCH)
        yield Event(event.name if operator else "", group, event.time_range.start, event.self_cpu_time_total)


def _events(traced: profile) -> Iterable[Any]:
    return traced.events() or ()


def _range_of(event: Any) -> str | None:
    """The group of the range that `step` had open."""
    while event is not None:
        if event.name.startswith(LABEL):
            return event.name.removeprefix(LABEL)
        event = event.cpu_parent
    return None


def _union(events: Iterable[Event]) -> float:
    """Microseconds in which at least one event ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        end = event.start + event.microseconds
        total += max(0.0, end - max(until, event.start))
        until = max(until, end)
    return total


def _short(name: str, length: int = 100) -> str:
    plain = name.replace("|", "/").replace("`", "'")
    return plain if len(plain) <= length else plain[: length - 1] + "…"
