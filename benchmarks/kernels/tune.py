"""`python -m benchmarks tune`: is any kernel faster when it is launched otherwise?

From a kernel's own launch the search goes to whichever neighbour is fastest, until none is: a neighbour has twice or
half the warps or the size of a tile, or one stage more or less. What gives another result than float64's, or does not
fit the GPU, is left out. Nothing is changed: a launch that wins belongs into its kernel's file, by hand, with the
record.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from benchmarks.kernels.main import CHECKED, Clock, gpu_clock
from benchmarks.kernels.operations import OPS, SHAPES, Shape, Work, disagreement, outputs
from benchmarks.record import RESULTS, append, environment, first_line
from fastdeit.cli import parse, run
from fastdeit.kernels.launch import Launch, trying
from fastdeit.pipelines.errors import UserError

Op = Literal["attention", "add_layer_norm", "layer_norm", "bias_gelu", "assemble_tokens"]
# Sizes of tiles that a kernel is right with whatever they are, and the least that each may be.
TILES = {"QUERIES": 16, "KEYS": 16, "ROWS": 1, "BLOCK_N": 1, "BLOCK_C": 16, "BLOCK_B": 1}
BETTER = 0.98  # of the time so far, that a neighbour must stay below


@dataclass(frozen=True, kw_only=True)
class Options:
    """Search for faster launches of the kernels, on random data in bf16; needs a GPU."""

    ops: tuple[Op, ...] = get_args(Op)
    models: tuple[Literal["tiny", "small", "base"], ...] = ("base", "small", "tiny")
    tokens: tuple[Literal[198, 578], ...] = (198,)  # 224 and 384 pixels
    batch: int = 256
    repeats: int = 10  # timed calls of a window; the figure is the median of the windows
    windows: int = 5
    budget: float = 0.0  # seconds, after which no other launch is tried; 0: until none is better
    results: Path = RESULTS / "tune.jsonl"


def neighbours(launch: Launch) -> Iterator[Launch]:
    """Launches that differ from `launch` in one number."""
    for warps in (launch.num_warps // 2, 2 * launch.num_warps):
        if 1 <= warps <= 16:
            yield dataclasses.replace(launch, num_warps=warps)
    constants = dict(launch.constants)
    for name, least in TILES.items():
        for size in (constants[name] // 2, 2 * constants[name]) if name in constants else ():
            if size >= least:
                yield _with(launch, name, size)
    if "STAGES" in constants:
        yield from (
            _with(launch, "STAGES", n) for n in (constants["STAGES"] - 1, constants["STAGES"] + 1) if 1 <= n <= 4
        )
    else:
        for stages in (launch.num_stages - 1, launch.num_stages + 1):
            if 1 <= stages <= 4:
                yield dataclasses.replace(launch, num_stages=stages)


def _with(launch: Launch, name: str, value: int) -> Launch:
    constants = tuple((key, value if key == name else old) for key, old in launch.constants)
    return dataclasses.replace(launch, constants=constants)


def changes(launch: Launch, default: Launch) -> str:
    """In what a launch differs from the default, e.g. "num_warps 4 -> 8"; empty where in nothing."""
    before, after = default.options(), launch.options()
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in after if before[key] != after[key])


def search(
    default: Launch, milliseconds: Callable[[Launch], float | str], done: Callable[[], bool] = lambda: False
) -> dict[Launch, float | str]:
    """What was tried: its time, or why it has none. The fastest is a launch whose neighbours are no better.

    done  whether time is up
    """
    tried: dict[Launch, float | str] = {default: milliseconds(default)}
    best = default
    while not isinstance(tried[default], str):
        for launch in neighbours(best):
            if launch not in tried and not done():
                tried[launch] = milliseconds(launch)
        times = {launch: time for launch, time in tried.items() if not isinstance(time, str)}
        fastest = min(times, key=lambda launch: times[launch])
        if times[fastest] >= BETTER * times[best]:
            break
        best = fastest
    return tried


def defaults(work: Work) -> dict[str, Launch]:
    """Name and launch of every kernel that an operation and its gradient run."""
    found: dict[str, Launch] = {}

    def note(name: str, default: Launch) -> Launch:
        return found.setdefault(name, default)

    with trying(note):
        _gradients(work)
    return found


def _gradients(work: Work) -> object:
    made = outputs(work.sides["fastdeit"], work.arguments)
    return torch.autograd.grad(made, work.arguments, [torch.ones_like(out) for out in made])


def measure(
    op: str, shape: Shape, options: Options, device: torch.device, clock: Clock, done: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """A record of each kernel of an operation at a shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work = OPS[op](shape, options.batch, dtype, device)
    side = work.sides["fastdeit"]

    def forward() -> None:
        with torch.no_grad():
            side(*work.arguments)

    for name, default in defaults(work).items():
        call = forward if name.endswith("forward") else lambda: _gradients(work)

        def milliseconds(launch: Launch, name: str = name, call: Callable[[], object] = call) -> float | str:
            try:
                with trying(lambda of, usual: launch if of == name else usual):
                    wrong = disagreement(work, side, CHECKED)
                    return wrong or statistics.median(clock.graphed(call) or clock.launched(call))
            except Exception as error:  # what does not compile or fit is no candidate
                return first_line(error)

        tried = search(default, milliseconds, done)
        about = {"benchmark": "tune", "op": op, "model": shape.model, "tokens": shape.tokens, "batch": options.batch}
        times = {launch: time for launch, time in tried.items() if not isinstance(time, str)}
        yield {
            **about,
            "kernel": name,
            "default": default.options(),
            "timed": "forward" if call is forward else "forward and backward",
            "tried": [{"launch": changes(launch, default), "outcome": outcome} for launch, outcome in tried.items()],
            "default_ms": times.get(default),
            "best_ms": min(times.values(), default=None),
            "best": changes(min(times, key=lambda launch: times[launch]), default) if times else None,
        }


def report(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    where = f"{record['kernel']} {record['model']} N{record['tokens']}, {record['timed']}"
    tried = len(record["tried"])
    if record["default_ms"] is None:
        return f"{where}: its own launch fails: {record['tried'][0]['outcome']}"
    if not record["best"]:
        return f"{where}: {record['default_ms']:.3f} ms, the best of {tried}"
    ratio = record["default_ms"] / record["best_ms"]
    return f"{where}: {record['default_ms']:.3f} ms, {ratio:.2f}x as fast with {record['best']} (of {tried})"


def tune(options: Options, device: torch.device | None = None, clock: Clock | None = None) -> bool:
    """Search, print and store; whether every kernel's own launch is right and runs.

    device, clock  None: the GPU, and its events. Raises UserError where there is none
    """
    if device is None and not torch.cuda.is_available():
        raise UserError("launches are tuned on a GPU, and PyTorch sees none: fastdeit-doctor tells why")
    device = device or torch.device("cuda")
    clock = clock or gpu_clock(options.repeats, options.windows, seconds=0.5)
    begin, where, whole = time.perf_counter(), environment(), True
    shapes = [s for s in SHAPES if s.model in options.models and s.tokens in options.tokens]
    shapes.sort(key=lambda shape: (shape.tokens, options.models.index(shape.model)))
    work = [(op, shape) for shape in shapes for op in options.ops]

    def done() -> bool:
        return 0 < options.budget < time.perf_counter() - begin

    for place, (op, shape) in enumerate(bar := tqdm(work, desc="tune", unit="case", disable=None)):
        if done():
            rest = ", ".join(f"{op} {shape.model} N{shape.tokens}" for op, shape in work[place:])
            print(f"left out, since the budget of {options.budget:.0f} s is used up: {rest}", flush=True)
            break
        bar.set_postfix_str(f"{op} {shape.model} N{shape.tokens}")
        for record in measure(op, shape, options, device, clock, done):
            append(options.results, {**record, "environment": where})
            tqdm.write(report(record))
            whole &= record["default_ms"] is not None
    return whole


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where a kernel's own launch was wrong or could not run."""

    if not run(lambda: tune(parse(Options, "python -m benchmarks tune", argv))):
        sys.exit(1)
