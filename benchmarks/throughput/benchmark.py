"""`python -m benchmarks throughput`: images per second of inference and of a training step, ours and timm's."""

from __future__ import annotations

import dataclasses
import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from benchmarks.profiles import profile_record, profile_step, profiles_path
from benchmarks.record import RESULTS, Timing, append, environment, first_line, timed_window
from benchmarks.render import target_lines
from benchmarks.throughput.contenders import Inputs, Step, disagreement, make_step, our_kernels, our_model
from benchmarks.throughput.forms import Form, ModelCase, forms
from benchmarks.throughput.report import is_ours, ratio, record_table
from fastdeit.cli import parse, run
from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import check_residual_dtype
from fastdeit.recipes import RECIPES
from fastdeit.setup import set_up
from fastdeit.training.graphs import WARM_UP

# Targets at 224 pixels: images per second of a training step by GPU, and the ratio to timm's fastest.
TARGETS = {
    "H200": {"deit_base": 4_000, "deit_small": 12_000, "deit_tiny": 30_000},
    "H100": {"deit_base": 3_300, "deit_small": 9_500, "deit_tiny": 23_000},
}
TIMES_TIMM = {"deit_base": 1.15, "deit_small": 1.3, "deit_tiny": 1.3}


# DeiT by size, and DeiT III with its optimizer and loss.
Model = Literal["tiny", "small", "base", "deit3_small", "deit3_medium", "deit3_base", "deit3_large", "deit3_huge"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time DeiT models on random data, ours and timm's in the same run."""

    models: tuple[Model, ...] = ("tiny", "small", "base")
    sizes: tuple[int, ...] = ()  # side of the square input, pixels; empty: that of the recipe, 224 for DeiT
    distilled: bool = False  # with the distillation token; training steps then use hard teacher labels
    mode: tuple[Literal["train", "infer"], ...] = ("train", "infer")
    batch: int = 0  # 0: 256 on a GPU, 8 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU
    residual: Literal["float32", "bfloat16"] = "float32"  # of our model's residual stream; timm's is float32
    kernels: Literal["auto", "triton"] = "auto"  # in our forms with kernels: as a run chooses, or ours throughout
    windows: int = 5  # timed windows of each form
    window_seconds: float = 2.0
    compile: bool | None = None  # also both models under torch.compile; None: on a GPU
    peer: Literal["timm", "none"] = "timm"
    ema: bool = False  # average the weights in the training step
    quick: bool = False  # only the forms likely to be the fastest, in windows of at most half a second
    forms: tuple[str, ...] = ()  # only the forms with these names, as a table has them; empty: all
    profile: bool = False  # also the kernels of our fastest training step, into profiles.jsonl beside the results
    budget: float = 0.0  # seconds; cases that would end later, judged by the last one, are skipped and named
    results: Path = RESULTS / "throughput.jsonl"


@dataclass
class Contender:
    """A step, and its measurements.

    setup_seconds    to build, compile and record it
    trial            images per second of a window before the timed ones
    rates            images per second, one per window
    peak_memory_mib  on a GPU, without the memory of the other contenders
    """

    step: Step
    setup_seconds: float = 0.0
    trial: float = 0.0
    rates: list[float] = field(default_factory=list)
    peak_memory_mib: float | None = None


def cases(options: Options) -> Iterator[ModelCase]:
    """Yield every combination in `options`. Raises UserError for one that cannot run."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch sees no GPU; fastdeit-doctor tells why")
    device = torch.device(options.device if options.device != "auto" else "cuda" if cuda else "cpu")
    batch = options.batch or (256 if device.type == "cuda" else 8)
    for model in options.models:
        third = model.startswith("deit3")
        if third and options.distilled:
            raise UserError(f"--distilled: timm has no {model} with a distillation token to compare with; leave it out")
        named = RECIPES[model if third else f"deit_{model}{'_distilled' if options.distilled else ''}"]
        for size in options.sizes or (named().model.img_size,):
            recipe = named()
            recipe = dataclasses.replace(
                recipe,
                model=dataclasses.replace(
                    recipe.model, img_size=size, residual_dtype=options.residual, kernels=options.kernels
                ),
                run=dataclasses.replace(recipe.run, precision=options.precision),
            ).resolved()
            precision = set_up(recipe, World(0, 1, 1, device))
            if precision.name == "fp16":
                raise UserError("this GPU has no bf16: give --precision fp32")
            check_residual_dtype(recipe, precision)
            for mode in options.mode:
                yield ModelCase(
                    recipe=recipe, mode=mode, batch=batch, ema=options.ema and mode == "train", precision=precision
                )


def measure(case: ModelCase, options: Options) -> dict[str, Any]:
    """The record of a case: rates of every form, in windows that alternate between the forms.

    If our model and timm's disagree nothing is timed and the record says why (`refused`). A form whose kernels
    disagree, or that runs out of memory or is not available, is skipped and named (`failed`). If memory runs short, the
    slowest form of a library so far is timed alone and makes room.
    """
    record: dict[str, Any] = {"benchmark": "throughput", **case.describe(), "environment": environment()}
    record["threads"] = torch.get_num_threads()
    ours = our_model(case, Form(library="fastdeit"))
    if options.peer == "timm" and (reason := disagreement(case, ours)):
        return {**record, "refused": f"fastdeit and timm disagree: {reason}"}
    state, inputs = ours.state_dict(), Inputs.draw(case, case.batch)
    cuda = case.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else None
    compile_too = cuda if options.compile is None else options.compile
    seconds = min(0.5, options.window_seconds) if options.quick else options.window_seconds
    contenders: dict[str, Contender] = {}
    done: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    compared = forms(case, peer=options.peer == "timm", compiled=compile_too, quick=options.quick and not options.forms)
    if options.forms:
        compared = named(options.forms, compared)
    with_kernels = Form(library="fastdeit", kernels=True)
    reason = None
    if any(form.kernels for form in compared):
        reason = disagreement(case, our_model(case, with_kernels))
        record["kernels"] = our_kernels(case, with_kernels).event()
    torch._dynamo.reset()  # nothing timed inherits a compilation from the checks or from the previous case
    for form in compared:
        if form.kernels and reason is not None:
            failed[form.name] = f"its kernels disagree with timm: {reason}"
            continue
        if cuda:
            _make_room(contenders, done, options.windows, seconds)
        base = _reserved() if cuda else 0
        try:
            begin = time.perf_counter()
            step = make_step(case, form, state, inputs)
            contender = Contender(one_ahead(step, torch.cuda.Event) if cuda else step)
            _warm_up(contender, seconds, base, wait, begin)
            contenders[form.name] = contender
        except torch.OutOfMemoryError:
            failed[form.name] = f"out of memory at batch {case.batch}"
        except UserError as error:
            failed[form.name] = str(error)
        except Exception as error:  # from a compiler, or a graph that cannot be recorded: go on with the others
            failed[form.name] = first_line(error)
    for window in range(options.windows):
        # Every other round runs backwards, so no form always follows the same one.
        for contender in list(contenders.values())[:: -1 if window % 2 else 1]:
            contender.rates.append(timed_window(contender.step, seconds, wait))
    timed = {**done, **contenders}
    sides = {form.name: _figures(timed[form.name]) for form in compared if form.name in timed}
    record |= {"failed": failed, "sides": sides}
    if options.profile and cuda and case.mode == "train":
        _profile(case, record, contenders, options.results)
    return {**record, "targets": targets(record)}


def named(names: Sequence[str], forms: Sequence[Form]) -> list[Form]:
    """The forms with these names. Raises UserError for a name that no form has."""
    unknown = sorted({*names} - {form.name for form in forms})
    if unknown:
        raise UserError(f"--forms {shlex.join(unknown)}: the forms here are {', '.join(form.name for form in forms)}")
    return [form for form in forms if form.name in names]


def _make_room(contenders: dict[str, Contender], done: dict[str, Contender], windows: int, seconds: float) -> None:
    """Move contenders to `done` until another one as large as the largest so far has room on the GPU.

    The slowest form of each library goes first, timed alone; the fastest ones stay, to be timed in turns.
    """
    if not contenders:
        return
    _reserved()
    need = max(contender.peak_memory_mib or 0.0 for contender in contenders.values()) * 2**20
    while torch.cuda.mem_get_info()[0] < 1.1 * need:
        name = slowest({name: contender.trial for name, contender in contenders.items()})
        if name is None:
            return
        contender = contenders.pop(name)
        contender.rates = [timed_window(contender.step, seconds, torch.cuda.synchronize) for _ in range(windows)]
        contender.step = _gone
        done[name] = contender
        _reserved()


def slowest(rates: dict[str, float]) -> str | None:
    """The name with the lowest rate among those that are not the fastest of their library; None if there is none.

    rates  by name of a form, which starts with its library
    """
    best: dict[str, str] = {}
    for name in sorted(rates, key=lambda name: rates[name]):
        best[name.partition(" ")[0]] = name
    rest = [name for name in rates if name not in best.values()]
    return min(rest, key=lambda name: rates[name], default=None)


def _gone() -> int:
    raise RuntimeError("this contender has made room for others")


def _profile(case: ModelCase, record: dict[str, Any], contenders: dict[str, Contender], results: Path) -> None:
    """Append the kernels of our fastest form to the profiles beside `results`."""
    ours = {name: figures for name, figures in record["sides"].items() if is_ours(name)}
    name = max(ours, key=lambda name: ours[name]["images_per_second"], default=None)
    if name not in contenders:
        print(f"no profile of {case.recipe.name}: its fastest form has made room for others")
        return
    kernels = profile_step(contenders[name].step)
    each = case.batch / ours[name]["images_per_second"]
    append(profiles_path(results), profile_record(case.describe(), name, kernels, each, record["environment"]))


class Event(Protocol):
    """A point in a device's work: `torch.cuda.Event`."""

    def record(self) -> object: ...

    def synchronize(self) -> object: ...


def one_ahead(step: Step, event: Callable[[], Event]) -> Step:
    """`step`, made to wait for the end of the previous step, as the training loop does when it reads the loss.

    Otherwise the host queues a hundred replays of a graph within a window's time, and the window ends late.
    """
    previous: Event | None = None

    def bounded() -> int:
        nonlocal previous
        units = step()
        end = event()
        end.record()
        if previous is not None:
            previous.synchronize()
        previous = end
        return units

    return bounded


def _warm_up(contender: Contender, seconds: float, base: int, wait: Callable[[], object] | None, begin: float) -> None:
    """Warm a contender up and take a trial window.

    base   bytes that the GPU had reserved before the contender
    begin  the time at which its construction began
    """
    for _ in range(WARM_UP + 1):  # compilation, optimizer state and graph, which later steps do not repeat
        contender.step()
    if wait is not None:
        wait()
    contender.setup_seconds = round(time.perf_counter() - begin, 1)
    if wait is not None:
        _reserved()
        torch.cuda.reset_peak_memory_stats()
    contender.trial = timed_window(contender.step, seconds, wait)
    if wait is not None:
        # Reserved, not allocated: PyTorch does not count a replayed graph's memory as allocated.
        more = torch.cuda.max_memory_reserved() - base
        # Where earlier contenders have freed memory since, the figure would be too small.
        contender.peak_memory_mib = round(more / 2**20, 1) if more > 0 else None


def _reserved() -> int:
    """GPU memory that PyTorch holds, without its cache, in bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _figures(contender: Contender) -> dict[str, Any]:
    timing = Timing(tuple(contender.rates))
    return {
        "images_per_second": timing.median,
        "spread": timing.spread,
        "windows": contender.rates,
        "peak_memory_mib": contender.peak_memory_mib,
        "setup_seconds": contender.setup_seconds,
    }


def targets(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target of a record: `text` with the measured value, and whether it was `reached`."""
    gpu, times_timm, model = record["environment"]["gpu"], ratio(record), record["model"]
    if record["mode"] != "train" or record["img_size"] != 224 or gpu is None or model not in TIMES_TIMM:
        return []
    rates = [f["images_per_second"] for name, f in record["sides"].items() if is_ours(name)]
    minimum = next((by_model[model] for card, by_model in TARGETS.items() if card in gpu["name"]), None)
    if minimum is None or not rates:
        return []
    rate, least = max(rates), TIMES_TIMM[model]
    results = [{"text": f"{model}: {rate:,.0f} im/s of more than {minimum:,}", "reached": rate > minimum}]
    if times_timm is not None:
        text = f"{model}: {times_timm:.2f}x timm of at least {least}x"
        results.append({"text": text, "reached": times_timm >= least})
    return results


def run_benchmark(options: Options) -> bool:
    """Measure every case, print it and append it to the results.

    Returns whether each case could be timed, with all forms of ours and one of each library. Raises UserError for
    `profile` without a GPU.
    """
    complete, begin, last = True, time.perf_counter(), 0.0
    todo = list(cases(options))
    libraries = {"fastdeit", "timm"} if options.peer == "timm" else {"fastdeit"}
    if options.forms:
        libraries = {name.partition(" ")[0] for name in options.forms}
    if options.profile and not any(case.device.type == "cuda" for case in todo):
        raise UserError("--profile needs a GPU: leave it out")
    for i, case in enumerate(todo):
        start = time.perf_counter()
        if options.budget and i and start - begin + last > options.budget:
            rest = ", ".join(f"{case.recipe.name} {case.mode}" for case in todo[i:])
            print(f"left out, since the budget of {options.budget:.0f} s is used up: {rest}", flush=True)
            break
        record = measure(case, options)
        last = time.perf_counter() - start
        append(options.results, record)
        print(record_table(record).text(), *target_lines(record.get("targets", [])), sep="\n", flush=True)
        complete &= is_complete(record, libraries)
    return complete


def is_complete(record: dict[str, Any], libraries: set[str]) -> bool:
    """Whether a case was timed with all forms of ours and one of each of the `libraries`.

    Some forms of a peer are trials: an attention backend may not take the shapes.
    """
    ours_failed = any(name.startswith("fastdeit") for name in record.get("failed", {}))
    return not ours_failed and {name.partition(" ")[0] for name in record.get("sides", {})} == libraries


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if a case, a form of ours, or every form of timm could not be timed."""

    if not run(lambda: run_benchmark(parse(Options, "python -m benchmarks throughput", argv))):
        sys.exit(1)
