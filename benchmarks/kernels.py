"""`python -m benchmarks kernels`: every kernel beside its alternatives, forward and backward, with the roof."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro

from benchmarks.kernel_ops import OPS, SHAPES, Function, Shape, Work, disagreement, outputs
from benchmarks.record import RESULTS, append, environment
from fastdeit.cli import UserError, run

Op = Literal["attention", "assemble_tokens", "layer_norm", "add_layer_norm", "bias_gelu", "distillation_loss"]
CHECKED = 4  # samples that are checked before anything is timed


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time of every kernel on random data in bf16, the alternatives beside it in the same run; needs a GPU."""

    ops: tuple[Op, ...] = get_args(Op)
    models: tuple[Literal["tiny", "small", "base"], ...] = ("tiny", "small", "base")
    tokens: tuple[Literal[198, 578], ...] = (198, 578)  # 224 and 384 pixels
    batch: int = 256
    repeats: int = 20  # timed calls of a window; the figure is the median of the windows
    windows: int = 5
    compile: bool = True  # PyTorch's own under torch.compile too
    results: Path = RESULTS / "kernels.jsonl"


def milliseconds(call: Callable[[], Any], repeats: int, windows: int) -> list[float]:
    """Device milliseconds of a call in each window, after a warm-up."""
    for _ in range(3):
        call()
    found = []
    for _ in range(windows):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / repeats)
    return found


def roofs(options: Options) -> dict[str, float]:
    """What this GPU reaches: bytes per second of a copy (read and write), FLOP per second of a bf16 GEMM."""
    pair = torch.randn(2, 2**28, device="cuda")
    copy = statistics.median(milliseconds(lambda: pair[0].copy_(pair[1]), options.repeats, options.windows))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(milliseconds(lambda: a @ b, options.repeats, options.windows))
    return {"bytes_per_second": 2 * 2**30 / copy * 1e3, "flops_per_second": 2 * 8192**3 / product * 1e3}


def measure(op: str, shape: Shape, options: Options, roof: dict[str, float]) -> dict[str, Any]:
    """The record of an operation at a shape. A side whose check fails is not timed and named in `refused`."""
    torch._dynamo.reset()  # a case must not inherit the recompilations of the one before
    work = OPS[op](shape, options.batch, torch.bfloat16, torch.device("cuda"))
    record: dict[str, Any] = {"benchmark": "kernels", "op": op, "model": shape.model, "tokens": shape.tokens}
    record |= {"batch": options.batch, "absent": work.absent, "refused": {}, "failed": {}, "sides": {}, "roof": roof}
    floors = [
        1e3 * max(moved / roof["bytes_per_second"], flops / roof["flops_per_second"])
        for moved, flops in zip(work.bytes, work.flops, strict=True)
    ]
    record["floor_ms"] = dict(zip(("forward", "both"), floors, strict=True))
    for name, side in all_sides(work, options.compile).items():
        try:
            reason = disagreement(work, side, CHECKED)
            if reason is not None:
                record["refused"][name] = reason
                continue
            record["sides"][name] = _timed(work, side, options, floors)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            # A backend of SDPA that cannot take the shape says so with a RuntimeError.
            record["failed"][name] = str(error).splitlines()[0]
    return record


def all_sides(work: Work, compiled: bool) -> dict[str, Function]:
    """Ours and every other, PyTorch's own among them."""
    sides = {**work.sides, "eager": work.eager}
    return {**sides, "compiled": torch.compile(work.eager)} if compiled else sides


def _timed(work: Work, side: Function, options: Options, floors: list[float]) -> dict[str, Any]:
    def forward() -> None:
        with torch.no_grad():
            side(*work.arguments)

    grads = [torch.randn_like(out) for out in outputs(side, work.arguments)]

    def both() -> None:
        torch.autograd.grad(outputs(side, work.arguments), work.arguments, grads)

    figures: dict[str, Any] = {}
    for name, call, floor in zip(("forward", "both"), (forward, both), floors, strict=True):
        windows = milliseconds(call, options.repeats, options.windows)
        median = statistics.median(windows)
        figures[name] = {"ms": median, "windows": windows, "share_of_roof": floor / median}
    return figures


def _report(record: dict[str, Any]) -> None:
    floor = record["floor_ms"]
    print(f"{record['op']} {record['model']} N{record['tokens']}, batch {record['batch']}: ", end="")
    print(f"floor {floor['forward']:.3f} ms forward, {floor['both']:.3f} ms with backward")
    for name, figures in sorted(record["sides"].items(), key=lambda item: item[1]["both"]["ms"]):
        cells = (f"{f['ms']:8.3f} ms {100 * f['share_of_roof']:3.0f}%" for f in (figures["forward"], figures["both"]))
        print(f"  {name:16}", *cells, sep="  ")
    for kind in ("refused", "failed", "absent"):
        for name, reason in record[kind].items():
            print(f"  {name:16}  {kind}: {reason}", flush=True)


def kernels(options: Options) -> bool:
    """Measure, print and store every case; whether none of ours was refused or failed."""
    if not torch.cuda.is_available():
        raise UserError(
            "the kernels benchmark needs a GPU, and PyTorch sees none; "
            "`python -m benchmarks compiled` tells what can be known without one"
        )
    complete = True
    roof, where = roofs(options), environment()
    shapes = [s for s in SHAPES if s.model in options.models and s.tokens in options.tokens]
    for op in options.ops:
        # A loss has neither tokens nor width.
        for shape in shapes[:1] if op == "distillation_loss" else shapes:
            record = {**measure(op, shape, options, roof), "environment": where}
            append(options.results, record)
            _report(record)
            complete &= "fastdeit" in record["sides"]
    return complete


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where one of our kernels was wrong or could not run."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks kernels")
    if not run(lambda: kernels(options)):
        sys.exit(1)
