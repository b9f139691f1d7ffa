"""`python -m benchmarks tune`: search for faster launches of the kernels.

Starting from a kernel's own launch, the search moves to its fastest neighbour until no neighbour is faster. A neighbour
has twice or half the warps or a tile's size, or one stage more or less. A launch with wrong results, or one that does
not fit the GPU, is skipped. The search changes no file: copy a winning launch into its kernel's file by hand, and keep
the record.

`--choose` runs another measurement: see `benchmarks/kernels/choose.py`.
"""

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

from benchmarks.kernels import choose
from benchmarks.kernels.benchmark import CHECKED, Clock, gpu_clock
from benchmarks.kernels.operations import OPS, SHAPES, Operation, Shape, disagreement, outputs
from benchmarks.record import RESULTS, append, environment, first_line
from fastdeit.cli import parse, run
from fastdeit.kernels.launch import Launch, trying
from fastdeit.pipelines.errors import UserError

Op = Literal["attention", "add_layer_norm", "layer_norm", "bias_gelu", "assemble_tokens"]
# Tile sizes that do not affect a kernel's results, and the smallest value of each.
TILES = {"QUERIES": 16, "KEYS": 16, "ROWS": 1, "BLOCK_N": 1, "BLOCK_C": 16, "BLOCK_B": 1}
BETTER = 0.98  # a neighbour must take less than this share of the best time so far


@dataclass(frozen=True, kw_only=True)
class Options:
    """Search for faster launches of the kernels, on random data in bf16; needs a GPU.

    With --choose: find what PyTorch runs faster, for `model.kernels auto`; --choose --help lists its options.
    """

    ops: tuple[Op, ...] = get_args(Op)
    models: tuple[Literal["tiny", "small", "base"], ...] = ("base", "small", "tiny")
    tokens: tuple[Literal[198, 578], ...] = (198,)  # 224 and 384 pixels
    batch: int = 256
    repeats: int = 10  # timed calls per window; the figure is the median of the windows
    windows: int = 5
    budget: float = 0.0  # seconds after which no further launch is tried; 0: no limit
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
    """Differences of a launch from the default, e.g. "num_warps 4 -> 8"; empty if there are none."""
    before, after = default.options(), launch.options()
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in after if before[key] != after[key])


def search(
    default: Launch, milliseconds: Callable[[Launch], float | str], done: Callable[[], bool] = lambda: False
) -> dict[Launch, float | str]:
    """Every launch tried: its time, or why it has none. The neighbours of the fastest launch are no faster.

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


def defaults(operation: Operation) -> dict[str, Launch]:
    """Name and launch of every kernel that an operation and its gradient run."""
    launches: dict[str, Launch] = {}

    def record(name: str, default: Launch) -> Launch:
        return launches.setdefault(name, default)

    with trying(record):
        _gradients(operation)
    return launches


def _gradients(operation: Operation) -> object:
    out = outputs(operation.contenders["fastdeit"], operation.arguments)
    return torch.autograd.grad(out, operation.arguments, [torch.ones_like(each) for each in out])


def measure(
    op: str, shape: Shape, options: Options, device: torch.device, clock: Clock, done: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each kernel of an operation at a shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    operation = OPS[op](shape, options.batch, dtype, device)
    ours = operation.contenders["fastdeit"]

    def forward() -> None:
        with torch.no_grad():
            ours(*operation.arguments)

    for name, default in defaults(operation).items():
        call = forward if name.endswith("forward") else lambda: _gradients(operation)

        def milliseconds(launch: Launch, name: str = name, call: Callable[[], object] = call) -> float | str:
            try:
                with trying(lambda kernel, own: launch if kernel == name else own):
                    reason = disagreement(operation, ours, CHECKED)
                    return reason or statistics.median(clock.graphed(call) or clock.launched(call))
            except Exception as error:  # a launch that does not compile or fit is no candidate
                return first_line(error)

        tried = search(default, milliseconds, done)
        case = {"benchmark": "tune", "op": op, "model": shape.model, "tokens": shape.tokens, "batch": options.batch}
        times = {launch: time for launch, time in tried.items() if not isinstance(time, str)}
        yield {
            **case,
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
    kernel = f"{record['kernel']} {record['model']} N{record['tokens']}, {record['timed']}"
    tried = len(record["tried"])
    if record["default_ms"] is None:
        return f"{kernel}: its own launch fails: {record['tried'][0]['outcome']}"
    if not record["best"]:
        return f"{kernel}: {record['default_ms']:.3f} ms, the best of {tried}"
    ratio = record["default_ms"] / record["best_ms"]
    return f"{kernel}: {record['default_ms']:.3f} ms, {ratio:.2f}x as fast with {record['best']} (of {tried})"


def tune_launches(options: Options, device: torch.device | None = None, clock: Clock | None = None) -> bool:
    """Search, print and store; return whether every kernel's own launch runs and is right.

    device, clock  None: the GPU, and its events. Raises UserError if there is none
    """
    if device is None and not torch.cuda.is_available():
        raise UserError("launches are tuned on a GPU, and PyTorch sees none: fastdeit-doctor tells why")
    device = device or torch.device("cuda")
    clock = clock or gpu_clock(options.repeats, options.windows, seconds=0.5)
    begin, machine, complete = time.perf_counter(), environment(), True
    shapes = [s for s in SHAPES if s.model in options.models and s.tokens in options.tokens]
    shapes.sort(key=lambda shape: (shape.tokens, options.models.index(shape.model)))
    todo = [(op, shape) for shape in shapes for op in options.ops]

    def done() -> bool:
        return 0 < options.budget < time.perf_counter() - begin

    for i, (op, shape) in enumerate(bar := tqdm(todo, desc="tune", unit="case", disable=None)):
        if done():
            rest = ", ".join(f"{op} {shape.model} N{shape.tokens}" for op, shape in todo[i:])
            print(f"left out, since the budget of {options.budget:.0f} s is used up: {rest}", flush=True)
            break
        bar.set_postfix_str(f"{op} {shape.model} N{shape.tokens}")
        for record in measure(op, shape, options, device, clock, done):
            append(options.results, {**record, "environment": machine})
            tqdm.write(report(record))
            complete &= record["default_ms"] is not None
    return complete


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if a kernel's own launch was wrong or could not run."""
    words = sys.argv[1:] if argv is None else [*argv]
    if "--choose" in words:
        words.remove("--choose")
        return choose.main(words)
    if not run(lambda: tune_launches(parse(Options, "python -m benchmarks tune", words))):
        sys.exit(1)
