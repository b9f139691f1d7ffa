"""`python -m benchmarks tune --choose`: find the operations that PyTorch runs faster, for `model.kernels` "auto".

Each operation runs forward and backward at a recipe's shapes and dtypes, in a CUDA graph: our kernel, PyTorch's form
under torch.compile, and for attention each backend of `scaled_dot_product_attention`. The candidates' windows
alternate. A candidate is not timed if its results are too far from those in float64, or if the bits of its gradients
differ from call to call, as they do with atomic additions. The rows go into the table that training reads,
fastdeit/model/kernel_table.json: commit it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.kernels.benchmark import Clock, gpu_clock
from benchmarks.record import RESULTS, append, environment, first_line
from benchmarks.render import Table
from fastdeit.cli import parse, parse_recipe, run
from fastdeit.model import kernel_table
from fastdeit.model.attention_backend import BACKENDS
from fastdeit.model.kernel_checks import failure, training_check, with_backend
from fastdeit.model.kernel_choice import OPS
from fastdeit.model.kernel_table import OURS, Key, Row, candidates
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import Precision, allow_tf32, resolve
from fastdeit.recipes import RECIPES
from fastdeit.sections import ModelConfig

CALLS = 10  # calls of a candidate whose gradients must have the same bits


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the operations that PyTorch runs faster on this GPU, for `model.kernels auto`; uses random data."""

    # Names, or files such as a run's recipe.json; recipes with the same shapes and dtypes share rows.
    recipe: tuple[str, ...] = tuple(
        f"deit_{size}{kind}" for size in ("base", "small", "tiny") for kind in ("", "_distilled")
    )
    classes: int = 1000  # for recipes that leave it to the data set
    batch: int = 256
    repeats: int = 20  # calls per window
    windows: int = 7
    budget: float = 0.0  # seconds after which no further operation is measured; 0: no limit
    table: Path = kernel_table.PATH  # a new file starts as a copy of fastdeit's own table
    results: Path = RESULTS / "tune.jsonl"


Run = tuple[ModelConfig, Precision, int]  # the last is the number of classes


def cases(options: Options, card: str, device: torch.device) -> dict[Key, Run]:
    """The keys of all recipes' operations, each with a model that has that key."""
    found: dict[Key, Run] = {}
    for name in options.recipe:
        if name in RECIPES:
            recipe = RECIPES[name]()
        elif Path(name).is_file():
            recipe = parse_recipe(["--config", name])
        else:
            raise UserError(f"--recipe {name} is neither a file nor one of {', '.join(RECIPES)}")
        cfg = recipe.model
        if cfg.arch != "deit":
            raise UserError(f"--recipe {name} trains a {cfg.arch}: only a DeiT's operations are measured")
        case = cfg, resolve(recipe, device), cfg.num_classes or options.classes
        for op in OPS:
            found.setdefault(kernel_table.key(card, op, *case), case)
    return found


def training_call(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `function`: forward and, if its results have gradients, backward; the call returns the gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    weights = [torch.randn_like(out) for out in function(*leaves) if out.requires_grad]

    def call() -> tuple[Tensor, ...]:
        outputs = [out for out in function(*leaves) if out.requires_grad]
        return torch.autograd.grad(outputs, leaves, weights) if outputs else ()

    return call


def _repeats(call: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether every call returns the same bits. Use a whole batch: with few samples, the bits often repeat anyway."""
    first = call()
    return all(all(map(torch.equal, first, call())) for _ in range(CALLS - 1))


def measure(op: str, case: Run, options: Options, clock: Clock) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Each candidate's windows in milliseconds, and why the other candidates were not timed."""
    allow_tf32(case[1])
    torch._dynamo.reset()  # a case must not inherit the recompilations of its predecessor
    check = training_check(op, *case, options.batch)
    calls: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    for name in (OURS, *candidates(op)):
        backend = name if name in BACKENDS else None
        function = check.kernel
        if name != OURS:
            function = check.reference if backend is None else with_backend(check.reference, backend)
            function = torch.compile(function, dynamic=False)
        try:
            reason = None if name == "torch" else failure(op, *case, backend)
            if reason is None:
                call = calls[name] = training_call(function, check.inputs)
                if not _repeats(call):
                    reason = "the bits of its gradients differ from call to call"
                elif not clock.graphed(call):
                    reason = "it does not run in a CUDA graph"
        except Exception as error:  # a backend that rejects the shape, a kernel that does not fit: any exception
            reason = first_line(error)
        if reason is not None:
            refused[name] = reason
    windows: dict[str, list[float]] = {name: [] for name in calls if name not in refused}
    for _ in range(options.windows):
        for name, times in windows.items():
            times += [round(ms, 5) for ms in clock.graphed(calls[name]) or []]
    return {name: times for name, times in windows.items() if times}, refused


def report(records: Sequence[dict[str, Any]]) -> Table:
    """Medians of the candidates, the choices, and the candidates that were not timed."""
    names = (OURS, *candidates("layer_norm"), *candidates("attention"))
    rows, notes = [], []
    for record in records:
        times = {name: f"{median(windows):.3f}" for name, windows in record["windows"].items()}
        case = record["op"], record["shape"], record["dtype"]
        rows.append((*case, *(times.get(name, "") for name in names), record["choice"]))
        notes += [f"{', '.join(case)}: {name} was not timed: {why}" for name, why in record["refused"].items()]
    columns = ("operation", "shape", "dtype", *names, "choice")
    return Table(
        title="milliseconds forward and backward",
        columns=columns,
        align="lll" + "r" * len(names) + "l",
        rows=rows,
        notes=notes,
    )


def choose(options: Options, device: torch.device | None = None, clock: Clock | None = None) -> bool:
    """Measure, print, and write the rows; return whether all of our kernels were right and could run.

    device  None: the GPU; raises UserError if there is none
    clock   None: the GPU's events
    """
    if device is None and not torch.cuda.is_available():
        raise UserError("measuring a card needs a GPU, and PyTorch sees none: fastdeit-doctor tells why")
    device = device or torch.device("cuda")
    clock = clock or gpu_clock(options.repeats, 1, seconds=0.5)
    begin, machine = time.perf_counter(), environment()
    card = machine["gpu"]["name"] if machine["gpu"] else str(machine["cpu"])
    before = kernel_table.read(options.table if options.table.exists() else kernel_table.PATH)
    todo, rows, records = cases(options, card, device), [], []
    for i, (key, case) in enumerate(bar := tqdm(todo.items(), desc="choose", unit="case", disable=None)):
        if 0 < options.budget < time.perf_counter() - begin:
            rest = "; ".join(", ".join(key[1:]) for key in [*todo][i:])
            print(f"left out, since the budget of {options.budget:.0f} s is used up: {rest}", flush=True)
            break
        bar.set_postfix_str(", ".join(key[1:]))
        windows, refused = measure(key[1], case, options, clock)
        choice = kernel_table.decide(windows) if OURS in windows else ""
        measured: dict[str, Any] = dict(zip(("card", "op", "shape", "dtype"), key, strict=True))
        measured |= {"choice": choice, "windows": windows, "batch": options.batch}
        records.append({"benchmark": "choose", **measured, "refused": refused})
        append(options.results, {**records[-1], "environment": machine})
        if choice:
            pytorch, triton = (str(machine["versions"][name]) for name in ("torch", "triton"))
            rows.append(Row(**measured, date=machine["date"], commit=machine["commit"], torch=pytorch, triton=triton))
            kernel_table.write(before.updated(rows), options.table)
    print(report(records).text(), flush=True)
    print(f"{len(rows)} rows of {card} are in {options.table}, version {before.version + 1}", flush=True)
    return all(OURS in record["windows"] for record in records)


def main(argv: Sequence[str]) -> None:
    """The command; exit status 1 if one of our kernels was wrong or could not run."""
    if not run(lambda: choose(parse(Options, "python -m benchmarks tune --choose", argv))):
        sys.exit(1)
