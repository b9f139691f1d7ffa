"""Kernels compile for every architecture without spills, and their figures match docs/kernels.md.

No other test compiles kernels. Here the first configuration of each is compiled for sm_90, and attention's also for
sm_86 and sm_100. With FASTDEIT_COMPILE_ALL=1, all configurations are compiled for all architectures.
"""

import json
import os
from pathlib import Path

import pytest

from refusals import refused
from system import run_python
from tests.compiled import report
from tests.compiled.report import ARCHITECTURES, LIMITS, Compiled, differences, updated

ROOT = Path(__file__).parents[2]
MATRIX = {90: "HGMMA", 100: "UTCHMMA"}  # elsewhere HMMA
ALL = bool(os.environ.get("FASTDEIT_COMPILE_ALL"))
# Attention differs most: 90 has warp-group products, 86 the least shared memory, 100 products of a multiprocessor.
TESTED = {"": ARCHITECTURES} if ALL else {"": (90,), "attention": (86, 100)}


@pytest.fixture(scope="module")
def found():
    """The output of the command; in its own process, because kernels here may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = []
    for match, architectures in TESTED.items():
        command = ["-m", "tests.compiled", "--json", "--architectures", *architectures]
        command += [*(["--match", match] if match else []), *([] if ALL else ["--first"])]
        done = run_python(*command, cwd=ROOT, env=environment, status=0)
        lines += done.stdout.splitlines()
    return [Compiled(**json.loads(line)) for line in lines]


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_architecture(found):
    kernels = {variant.name.partition(" ")[0] for variant in report.all_variants()}
    for match, architectures in TESTED.items():
        for architecture in architectures:
            compiled = {each.name.partition(" ")[0] for each in found if each.architecture == architecture}
            assert compiled == {kernel for kernel in kernels if match in kernel}


def test_whatever_launches_kernels_has_variants():
    """A kernel that no variant names is compiled by no test."""
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        if "**launch.options()" in text or ".options())" in text:
            assert "def variants()" in text or "import variants" in text, path.name


@pytest.mark.slow
def test_nothing_spills_or_needs_more_shared_memory_than_there_is(found):
    assert [each.fault() for each in found if each.fault()] == []


@pytest.mark.slow
def test_matrix_products_run_on_the_matrix_units(found):
    attention = [each for each in found if each.name.startswith("attention") and " fp32 " not in each.name]
    assert len(attention) >= 9
    for each in attention:
        assert each.mnemonics.get(MATRIX.get(each.architecture, "HMMA"), 0) > 0, (each.name, each.architecture)
        assert each.wgmma == (each.architecture == 90), (each.name, each.architecture)


@pytest.mark.slow
def test_the_document_has_these_figures(found):
    stale = differences((ROOT / "docs/kernels.md").read_text(), found)
    if stale is None:
        pytest.skip(f"docs/kernels.md is of other versions than {report.versions()}")
    assert stale == [], "run python -m tests.compiled --update docs/kernels.md"


def example(**changes):
    figures = {"name": "k bf16", "warps": 4, "architecture": 90, "registers": 40, "stack": 0, "shared": 2048}
    return Compiled(**{**figures, "mnemonics": {"HGMMA": 3, "LDG": 7, "NOP": 5}, "wgmma": True, **changes})


def test_the_table_has_registers_memory_programs_and_instructions():
    *_, row = report.table([example(architecture=80), example(), example(architecture=100, stack=8)])
    assert (
        row == "| k bf16 | 4 | 40 / 2.0 / 12 / 10 (3) | 40 / 2.0 / 12 / 10 (3) | 40 / 2.0 / 12 / 10 (3) / 8 B spilled |"
    )


@pytest.mark.parametrize(
    ("changes", "programs"),
    [({}, 12), ({"registers": 24}, 16), ({"registers": 24, "architecture": 86}, 12), ({"shared": 40 << 10}, 5),
     ({"shared": 40 << 10, "architecture": 120}, 2), ({"registers": 255, "warps": 8}, 1)],
)  # fmt: skip
def test_programs_a_multiprocessor(changes, programs):
    """As NVIDIA's occupancy calculator has it."""
    assert example(**changes).programs == programs


def test_a_figure_that_changed_is_found_and_other_versions_are_not_compared(monkeypatch):
    marks = "before\n<!-- compiled: begin -->\n<!-- compiled: end -->\nafter\n"
    text = updated(marks, [example()])
    assert text.startswith("before\n")
    assert text.endswith("<!-- compiled: end -->\nafter\n")
    assert differences(text, [example()]) == []
    assert "k bf16, sm_90: 41 / 2.0" in differences(text, [example(registers=41)])[0]
    assert differences(text, [example(architecture=80)]) == ["k bf16, sm_80: 40 / 2.0 / 12 / 10 (3)"]
    assert updated(text, [example()]) == text
    monkeypatch.setattr(report, "versions", lambda: "Triton 99")
    assert differences(text, [example(registers=41)]) is None
    refused("compiled: begin", updated, "no marks", [])


def test_faults_are_told():
    assert example().fault() is None
    assert "k bf16 on sm_90 spills registers: 24 bytes" in example(stack=24).fault()
    assert example(stack=report.SPILL).fault() is None
    assert "shared memory of" in example(shared=LIMITS[90].shared - 1023).fault()


def test_the_whole_table_is_written_or_nothing(ended):
    said = ended(2, report.main, ["--update", "kernels.md", "--first"]).err
    assert "leave --match, --first and --architectures away" in said


def test_a_name_that_no_kernel_has_is_an_error(ended):
    assert "no kernel has that in its name" in ended(2, report.main, ["--match", "atention"]).err
