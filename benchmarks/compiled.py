"""What the compiler makes of a kernel for a GPU that need not be there: registers, spills, shared memory, instructions.

Triton compiles down to a cubin for any architecture; its own `cuobjdump` tells the rest.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.backends.nvidia
import tyro
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastdeit.kernels
from fastdeit.kernels.variants import Variant

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
# Bytes of shared memory a program can have (CUDA programming guide, technical specifications by compute capability).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_TOOLS = Path(next(iter(triton.backends.nvidia.__path__))) / "bin"


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture.

    registers    of a thread
    stack        bytes of local memory of a thread; more than none means that registers were spilled
    shared       bytes of shared memory of a program
    mnemonics    how often each machine instruction is there, by its name without suffixes
    ptx          the assembly that it was made of
    """

    variant: Variant
    architecture: int
    registers: int
    stack: int
    shared: int
    mnemonics: Counter[str]
    ptx: str

    @property
    def instructions(self) -> int:
        return self.mnemonics.total() - self.mnemonics["NOP"]


def compile_variant(variant: Variant, architecture: int) -> Compiled:
    """Compile `variant` for compute capability `architecture` (80 is 8.0). Raises what Triton raises."""
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [
        name
        for name, kind in variant.signature.items()
        if (kind.startswith("*") or name in variant.multiples) and name not in variant.unaligned
    ]
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("-res-usage", file.name)
        code = _tool("-sass", file.name)
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # A line of code: /*0010*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    return Compiled(
        variant=variant,
        architecture=architecture,
        registers=figures["REG"],
        stack=figures["STACK"] + figures["LOCAL"],
        shared=kernel.metadata.shared,
        mnemonics=Counter(found),
        ptx=kernel.asm["ptx"],
    )


def _tool(option: str, path: str) -> str:
    return subprocess.run([_TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def all_variants() -> list[Variant]:
    """Those of every module of `fastdeit.kernels` that has a function `variants`."""
    found: list[Variant] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(fastdeit.kernels.__path__)):
        own = getattr(importlib.import_module(f"fastdeit.kernels.{module}"), "variants", None)
        found += own() if own is not None else []
    return found


def table(rows: list[list[Compiled]]) -> str:
    """A Markdown table: a row a variant, its compiled forms one architecture after another."""
    heads = " | ".join(f"sm_{a}" for a in ARCHITECTURES)
    lines = [f"| kernel | warps | {heads} |", "|---|---:|" + "---:|" * len(ARCHITECTURES)]
    for row in rows:
        cells = " | ".join(f"{c.registers} / {c.shared / 1024:.1f} / {c.instructions}" for c in row)
        lines.append(f"| {row[0].variant.name} | {row[0].variant.num_warps} | {cells} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Options:
    """Compile the kernels for every architecture: registers of a thread / KiB of shared memory / instructions.

    Needs no GPU. The exit status is 1 where a kernel spills registers or asks for more shared memory than there is.
    """

    match: str = ""  # only kernels whose name contains this
    update: Path | None = None  # write the table between the marks of this file, e.g. docs/kernels.md
    json: bool = False  # print one JSON object a kernel and architecture, with its counts of instructions


def main(args: list[str]) -> None:
    options = tyro.cli(Options, args=args, prog="python -m benchmarks compiled")
    variants = [variant for variant in all_variants() if options.match in variant.name]
    rows = [[compile_variant(v, a) for a in ARCHITECTURES] for v in tqdm(variants, desc="compile", disable=None)]
    found = [compiled for row in rows for compiled in row]
    if options.json:
        for c in found:
            figures = {"name": c.variant.name, "architecture": c.architecture, "registers": c.registers}
            figures |= {"stack": c.stack, "shared": c.shared, "mnemonics": c.mnemonics, "wgmma": "wgmma" in c.ptx}
            print(json.dumps(figures))
    elif options.update is not None:
        options.update.write_text(updated(options.update.read_text(), table(rows)))
    else:
        print(table(rows))
    bad = [c for c in found if c.stack or c.shared > SHARED_LIMIT[c.architecture]]
    for c in bad:
        print(
            f"{c.variant.name} on sm_{c.architecture}: {c.stack} bytes of stack, {c.shared} bytes of shared memory "
            f"of {SHARED_LIMIT[c.architecture]}",
            file=sys.stderr,
        )
    sys.exit(bool(bad))


MARKS = "<!-- compiled: begin -->", "<!-- compiled: end -->"


def updated(text: str, table: str) -> str:
    """`text` with `table` between its marks. Raises ValueError where it has none."""
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise ValueError(f"no place for the table: the file needs the lines {MARKS[0]} and {MARKS[1]}")
    return f"{before}{begin}\n{table}\n{end}{after}"
