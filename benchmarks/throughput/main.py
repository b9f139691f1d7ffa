"""`python -m benchmarks throughput`: images per second of inference and of a training step, ours and timm's."""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from benchmarks.record import RESULTS, Timing, append, environment, first_line, timed_window
from benchmarks.throughput.contenders import Case, Form, Inputs, Step, disagreement, forms, make_step, our_model
from fastdeit.cli import parse, run
from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import RECIPES
from fastdeit.setup import set_up
from fastdeit.training.graphs import WARM_UP

# At 224 pixels, by GPU: images per second of a training step; and times timm's fastest.
TARGETS = {
    "H200": {"deit_base": 4_000, "deit_small": 12_000, "deit_tiny": 30_000},
    "H100": {"deit_base": 3_300, "deit_small": 9_500, "deit_tiny": 23_000},
}
TIMES_TIMM = {"deit_base": 1.15, "deit_small": 1.3, "deit_tiny": 1.3}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Throughput of DeiT models on random data, timm's beside it in the same run."""

    models: tuple[Literal["tiny", "small", "base"], ...] = ("tiny", "small", "base")
    sizes: tuple[int, ...] = (224,)  # side of the square input, pixels
    distilled: bool = False  # with the distillation token; the training step then has a hard label of a teacher too
    mode: tuple[Literal["train", "infer"], ...] = ("train", "infer")
    batch: int = 0  # 0: 256 on a GPU, 8 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU
    windows: int = 5  # timed windows of each side
    window_seconds: float = 2.0
    compile: bool | None = None  # both sides under torch.compile too; None: on a GPU
    peer: Literal["timm", "none"] = "timm"
    ema: bool = False  # average the weights in the training step
    quick: bool = False  # of each side only the form that has all that helps, in windows of at most half a second
    budget: float = 0.0  # seconds; cases that would end later, if they take as long as the last, are left out and named
    results: Path = RESULTS / "throughput.jsonl"


@dataclass
class Side:
    """One competitor: its step, and what was measured of it."""

    step: Step
    rates: list[float] = field(default_factory=list)  # images per second, one a window
    peak_memory_mib: float | None = None  # on a GPU, above what the other sides hold


def cases(options: Options) -> Iterator[Case]:
    """Every combination that `options` asks for. Raises UserError for one that cannot be run."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch sees no GPU; fastdeit-doctor tells why")
    device = torch.device(options.device if options.device != "auto" else "cuda" if cuda else "cpu")
    batch = options.batch or (256 if device.type == "cuda" else 8)
    for model in options.models:
        for size in options.sizes:
            recipe = RECIPES[f"deit_{model}{'_distilled' if options.distilled else ''}"]()
            recipe = dataclasses.replace(
                recipe,
                model=dataclasses.replace(recipe.model, img_size=size),
                run=dataclasses.replace(recipe.run, precision=options.precision),
            ).resolved()
            precision = set_up(recipe, World(0, 1, 1, device))
            if precision.name == "fp16":
                raise UserError("this GPU has no bf16: give --precision fp32")
            for mode in options.mode:
                yield Case(
                    recipe=recipe, mode=mode, batch=batch, ema=options.ema and mode == "train", precision=precision
                )


def measure(case: Case, options: Options) -> dict[str, Any]:
    """The record of a case: rates of every side, in windows that alternate between the sides.

    Where ours and timm disagree nothing is timed and the record says why (`refused`). A side that disagrees with its
    kernels, runs out of memory or cannot be had is left out and named (`failed`).
    """
    record: dict[str, Any] = {"benchmark": "throughput", **case.describe(), "environment": environment()}
    record["threads"] = torch.get_num_threads()
    torch._dynamo.reset()  # a case must not inherit the recompilations of the one before
    ours = our_model(case, Form(who="fastdeit"))
    if options.peer == "timm" and (reason := disagreement(case, ours)):
        return {**record, "refused": f"fastdeit and timm disagree: {reason}"}
    state, inputs = ours.state_dict(), Inputs.draw(case, case.batch)
    cuda = case.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else None
    compile_too = cuda if options.compile is None else options.compile
    seconds = min(0.5, options.window_seconds) if options.quick else options.window_seconds
    sides: dict[str, Side] = {}
    failed: dict[str, str] = {}
    compared = forms(case, peer=options.peer == "timm", compiled=compile_too, quick=options.quick)
    kernels = any(form.kernels for form in compared)
    wrong = disagreement(case, our_model(case, Form(who="fastdeit", kernels=True))) if kernels else None
    for form in compared:
        if form.kernels and wrong is not None:
            failed[form.name] = f"its kernels disagree with timm: {wrong}"
            continue
        base = _reserved() if cuda else 0
        try:
            step = make_step(case, form, state, inputs)
            side = Side(one_ahead(step, torch.cuda.Event) if cuda else step)
            _warm_up(side, seconds, base, wait)
            sides[form.name] = side
        except torch.OutOfMemoryError:
            failed[form.name] = f"out of memory at batch {case.batch}"
        except UserError as error:
            failed[form.name] = str(error)
        except Exception as error:  # a compiler's, or of a graph that cannot be recorded: the others go on
            failed[form.name] = first_line(error)
    for window in range(options.windows):
        # Every other round runs backwards, so that no side always follows the same one.
        for side in list(sides.values())[:: -1 if window % 2 else 1]:
            side.rates.append(timed_window(side.step, seconds, wait))
    record |= {"failed": failed, "sides": {name: _figures(side) for name, side in sides.items()}}
    return {**record, "targets": verdicts(record)}


class Event(Protocol):
    """A place in the work of a device: `torch.cuda.Event`."""

    def record(self) -> object: ...

    def synchronize(self) -> object: ...


def one_ahead(step: Step, event: Callable[[], Event]) -> Step:
    """`step`, which waits for the end of the one before, as the training loop does that looks at its loss.

    Without it the host gives a device a hundred replays of a graph before a window's time is over, and all of them
    are waited for.
    """
    before: Event | None = None

    def bounded() -> int:
        nonlocal before
        units = step()
        ended = event()
        ended.record()
        if before is not None:
            before.synchronize()
        before = ended
        return units

    return bounded


def _warm_up(side: Side, seconds: float, base: int, wait: Callable[[], object] | None) -> None:
    for _ in range(WARM_UP + 1):  # compilation, the optimizer's state, a graph: not what a step keeps needing
        side.step()
    if wait is not None:
        wait()
        _reserved()
        torch.cuda.reset_peak_memory_stats()
    timed_window(side.step, seconds, wait)
    if wait is not None:
        # Reserved, not allocated: PyTorch does not count a replayed graph's memory as allocated.
        side.peak_memory_mib = round((torch.cuda.max_memory_reserved() - base) / 2**20, 1)


def _reserved() -> int:
    """Bytes that PyTorch holds of the GPU, without what it only keeps for later."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _figures(side: Side) -> dict[str, Any]:
    timing = Timing(tuple(side.rates))
    return {
        "images_per_second": timing.median,
        "spread": timing.spread,
        "windows": side.rates,
        "peak_memory_mib": side.peak_memory_mib,
    }


def ratio(record: dict[str, Any]) -> float | None:
    """The fastest form of ours over the fastest form of timm's; None where either is missing."""
    best: dict[str, float] = {}
    for name, figures in record.get("sides", {}).items():
        who = name.partition(" ")[0]
        best[who] = max(best.get(who, 0.0), figures["images_per_second"])
    return best["fastdeit"] / best["timm"] if len(best) == 2 else None


def verdicts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at with this record: `text` with what was measured, and whether it was `reached`."""
    gpu, times, model = record["environment"]["gpu"], ratio(record), record["model"]
    if record["mode"] != "train" or record["img_size"] != 224 or gpu is None or model not in TIMES_TIMM:
        return []
    rates = [f["images_per_second"] for name, f in record["sides"].items() if name.startswith("fastdeit")]
    wanted = next((targets[model] for card, targets in TARGETS.items() if card in gpu["name"]), None)
    if wanted is None or not rates:
        return []
    over = TIMES_TIMM[model]
    name, rate = model, max(rates)
    found = [{"text": f"{name}: {rate:,.0f} im/s of more than {wanted:,}", "reached": rate > wanted}]
    if times is not None:
        found.append({"text": f"{name}: {times:.2f}x timm of at least {over}x", "reached": times >= over})
    return found


def _report(record: dict[str, Any]) -> None:
    title = " ".join(str(record[key]) for key in ("model", "img_size", "mode", "precision", "device"))
    print(f"{title}, batch {record['batch']}")
    if "refused" in record:
        print(f"  not timed: {record['refused']}")
        return
    for name, reason in record["failed"].items():
        print(f"  {name:34} {reason}")
    for name, figures in record["sides"].items():
        memory = figures["peak_memory_mib"]
        print(
            f"  {name:34} {figures['images_per_second']:10.1f} im/s, spread {100 * figures['spread']:.0f}%"
            + (f", {memory:.0f} MiB" if memory is not None else "")
        )
    best = ratio(record)
    if best is not None:
        print(f"  fastdeit / timm, the fastest form of each: {best:.3f}", flush=True)
    for verdict in record["targets"]:
        print(f"  target {'reached' if verdict['reached'] else 'MISSED'}: {verdict['text']}", flush=True)


def throughput(options: Options) -> bool:
    """Measure every case, print it and append it to the results; whether all of them could be timed."""
    complete, begin, last = True, time.perf_counter(), 0.0
    left = list(cases(options))
    for place, case in enumerate(left):
        start = time.perf_counter()
        if options.budget and place and start - begin + last > options.budget:
            rest = ", ".join(f"{case.recipe.name} {case.mode}" for case in left[place:])
            print(f"left out, since the budget of {options.budget:.0f} s is used up: {rest}", flush=True)
            break
        record = measure(case, options)
        last = time.perf_counter() - start
        append(options.results, record)
        _report(record)
        complete &= "refused" not in record and not record["failed"]
    return complete


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where a case or a side could not be timed."""

    if not run(lambda: throughput(parse(Options, "python -m benchmarks throughput", argv))):
        sys.exit(1)
