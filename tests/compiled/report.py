"""Registers, spills, shared memory and instructions of compiled kernels; needs no GPU.

Triton compiles a cubin for any architecture; the `cuobjdump` that comes with it shows the rest.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton
import triton.backends.nvidia
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastdeit.kernels
from fastdeit.cli import parse, run
from fastdeit.kernels.variants import Variant
from fastdeit.pipelines.errors import UserError


class Limits(NamedTuple):
    """Of a multiprocessor (CUDA programming guide, technical specifications by compute capability).

    shared  bytes of shared memory; a program takes 1,024 more than it asks for, and may not have the last 1,024
    warps   that can be resident
    """

    shared: int
    warps: int


# A100; RTX 3090; RTX 4090, L4 and L40S; H100 and H200; B200; RTX 5090 and RTX PRO 6000.
LIMITS = {
    80: Limits(164 << 10, 64),
    86: Limits(100 << 10, 48),
    89: Limits(100 << 10, 48),
    90: Limits(228 << 10, 64),
    100: Limits(228 << 10, 64),
    120: Limits(100 << 10, 48),
}
ARCHITECTURES = tuple(LIMITS)
_REGISTERS = 65536  # of a multiprocessor; a warp takes them 256 at a time
_TOOLS = Path(next(iter(triton.backends.nvidia.__path__))) / "bin"
_MARKS = "<!-- compiled: begin -->", "<!-- compiled: end -->"


# Bytes a thread. Triton 3.9 spills so much of attention's keys kernel, outside its loop, within the limit of registers
# that lets four programs fit a multiprocessor; 3.6 and 3.8 spill nothing.
SPILL = 16


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture.

    name, warps  of the variant
    registers    per thread
    stack        bytes of local memory per thread; above 0 the kernel spills registers, above `SPILL` it is a fault
    shared       bytes of shared memory per program
    mnemonics    number of each machine instruction, by its name without suffixes
    wgmma        whether the PTX has warp-group matrix instructions
    """

    name: str
    warps: int
    architecture: int
    registers: int
    stack: int
    shared: int
    mnemonics: dict[str, int]
    wgmma: bool

    @property
    def instructions(self) -> int:
        return sum(self.mnemonics.values()) - self.mnemonics.get("NOP", 0)

    @property
    def matrix_instructions(self) -> int:
        """Those of the matrix units: of a warp (HMMA), of a warp group (HGMMA) or of a multiprocessor (UTCHMMA)."""
        return sum(count for name, count in self.mnemonics.items() if name.endswith("MMA"))

    @property
    def programs(self) -> int:
        """Programs that fit a multiprocessor at the same time."""
        limits, registers = LIMITS[self.architecture], -(-self.registers * 32 // 256) * 256
        return min(
            limits.warps // self.warps,
            _REGISTERS // (registers * self.warps),
            limits.shared // (self.shared + 1024),
        )

    def fault(self) -> str | None:
        """Why the kernel cannot be launched so, or should not be; None where all is well."""
        if self.stack > SPILL:
            return f"{self.name} on sm_{self.architecture} spills registers: {self.stack} bytes of stack a thread"
        limit = LIMITS[self.architecture].shared - 1024
        if self.shared > limit:
            return f"{self.name} on sm_{self.architecture} needs {self.shared} bytes of shared memory of {limit}"
        return None


def compile_variant(variant: Variant, architecture: int) -> Compiled:
    """Compile `variant` for compute capability `architecture` (80 is 8.0). Raises what Triton raises."""
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [name for name, kind in variant.signature.items() if (kind.startswith("*") or name in variant.multiples)]
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": variant.fp_fusion}
    if variant.registers and architecture == 90:
        options["maxnreg"] = variant.registers
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # A line of code: /*0010*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    return Compiled(
        name=variant.name,
        warps=variant.num_warps,
        architecture=architecture,
        registers=figures["REG"],
        stack=figures["STACK"] + figures["LOCAL"],
        shared=kernel.metadata.shared,
        mnemonics=dict(sorted(Counter(found).items())),
        wgmma="wgmma" in kernel.asm["ptx"],
    )


def _tool(name: str, *options: str) -> str:
    return subprocess.run([_TOOLS / name, *options], capture_output=True, text=True, check=True).stdout


def all_variants() -> list[Variant]:
    """The variants of every module of `fastdeit.kernels` that has a function `variants`."""
    variants: list[Variant] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(fastdeit.kernels.__path__)):
        own = getattr(importlib.import_module(f"fastdeit.kernels.{module}"), "variants", None)
        variants += own() if own is not None else []
    return variants


def first_of_each(variants: Iterable[Variant]) -> list[Variant]:
    """The first variant of every kernel and first word of a name."""
    first: dict[tuple[int, str], Variant] = {}
    for variant in variants:
        first.setdefault((id(variant.kernel), variant.name.partition(" ")[0]), variant)
    return list(first.values())


def compile_all(variants: Sequence[Variant], architectures: Sequence[int], jobs: int) -> Iterator[Compiled]:
    """Compile every variant for every architecture, in this order, `jobs` at a time."""
    # Kernels do not pickle; forked processes have them already.
    work = [(variant, architecture) for variant in variants for architecture in architectures]
    if jobs == 1:
        yield from (compile_variant(*each) for each in work)
        return
    _work[:] = work
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_compile_number, range(len(work)))


_work: list[tuple[Variant, int]] = []


def _compile_number(number: int) -> Compiled:
    return compile_variant(*_work[number])


def versions() -> str:
    """The versions of Triton and its assemblers."""

    def release(assembler: str) -> str:
        match = re.search(r"release [\d.]+, V([\d.]+)", _tool(assembler, "--version"))
        return match[1] if match else "unknown"

    named = [f"{name} {release(name)}" for name in ("ptxas", "ptxas-blackwell") if (_TOOLS / name).exists()]
    return ", ".join([f"Triton {triton.__version__}", *named])


def table(kernels: Iterable[Compiled]) -> list[str]:
    """Lines of a Markdown table: one row per variant, one column per architecture."""
    rows: dict[str, dict[int, Compiled]] = {}
    for each in kernels:
        rows.setdefault(each.name, {})[each.architecture] = each
    shown = sorted({architecture for row in rows.values() for architecture in row})
    lines = [f"| kernel | warps | {' | '.join(f'sm_{a}' for a in shown)} |", "|---|---:|" + "---:|" * len(shown)]
    for name, row in rows.items():
        cells = (cell(row[architecture]) if architecture in row else "" for architecture in shown)
        lines.append(f"| {name} | {next(iter(row.values())).warps} | {' | '.join(cells)} |")
    return lines


def cell(kernel: Compiled) -> str:
    """Registers / KiB of shared memory / programs a multiprocessor / instructions (matrix instructions)."""
    matrix = f" ({kernel.matrix_instructions})" if kernel.matrix_instructions else ""
    spilled = f" / {kernel.stack} B spilled" if kernel.stack else ""
    figures = kernel.registers, f"{kernel.shared / 1024:.1f}", kernel.programs, kernel.instructions
    return f"{' / '.join(map(str, figures))}{matrix}{spilled}"


def updated(text: str, kernels: Iterable[Compiled]) -> str:
    """`text` with versions and table between its marks. Raises UserError if it has no marks."""
    before, _, after = _cut(text)
    return "\n".join([before + _MARKS[0], f"{versions()}.", "", *table(kernels), _MARKS[1] + after])


def differences(text: str, kernels: Sequence[Compiled]) -> list[str] | None:
    """Figures that are missing or different in the table between the marks of `text`.

    None if other versions made that table. Raises UserError if there are no marks.
    """
    _, between, _ = _cut(text)
    lines = between.strip().splitlines()
    if not lines or lines[0] != f"{versions()}.":
        return None
    heads, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]
    written = {(row[0], head): value for row in rows for head, value in zip(heads, row, strict=True)}
    found = {(each.name, f"sm_{each.architecture}"): cell(each) for each in kernels}
    return [f"{name}, {head}: {value}" for (name, head), value in found.items() if written.get((name, head)) != value]


def _cut(text: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition(_MARKS[0])
    between, end, after = rest.partition(_MARKS[1])
    if not (begin and end):
        raise UserError(f"no place for the table: the file needs the lines {_MARKS[0]} and {_MARKS[1]}")
    return before, between, after


@dataclass(frozen=True)
class Options:
    """Compile the kernels: registers per thread / KiB of shared memory / programs a multiprocessor / instructions.

    Needs no GPU. The exit status is 1 if a kernel spills registers or needs too much shared memory.
    """

    match: str = ""  # only kernels whose name contains this
    first: bool = False  # only the first configuration of each kernel
    architectures: tuple[int, ...] = ARCHITECTURES  # compute capabilities; 90 is 9.0
    update: Path | None = None  # write the table between the marks of this file, e.g. docs/kernels.md
    json: bool = False  # print one JSON object per kernel and architecture, with its instruction counts
    jobs: int = len(os.sched_getaffinity(0))  # compilers at a time


def compile_and_report(options: Options) -> bool:
    """Compile and print; return whether a kernel has a fault. Raises UserError for conflicting options."""
    if options.update is not None and (options.match or options.first or options.architectures != ARCHITECTURES):
        raise UserError("--update writes the whole table: leave --match, --first and --architectures away")
    if unknown := set(options.architectures) - set(ARCHITECTURES):
        known = ", ".join(map(str, ARCHITECTURES))
        raise UserError(f"--architectures {min(unknown)}: choose from {known}")
    variants = [variant for variant in all_variants() if options.match in variant.name]
    if not variants:
        raise UserError(f"--match {options.match}: no kernel has that in its name; without --match all are shown")
    variants = first_of_each(variants) if options.first else variants
    total = len(variants) * len(options.architectures)
    compiled = compile_all(variants, options.architectures, options.jobs)
    kernels = list(tqdm(compiled, desc="compile", total=total, disable=None))
    if options.json:
        print(*(json.dumps(dataclasses.asdict(each)) for each in kernels), sep="\n")
    elif options.update is not None:
        options.update.write_text(updated(options.update.read_text(), kernels))
    else:
        print(f"{versions()}.", "", *table(kernels), sep="\n")
    faults = [fault for each in kernels if (fault := each.fault()) is not None]
    print(*faults, sep="\n", end="\n" * bool(faults), file=sys.stderr)
    return bool(faults)


def main(args: list[str]) -> None:
    sys.exit(run(lambda: compile_and_report(parse(Options, "python -m tests.compiled", args))))
