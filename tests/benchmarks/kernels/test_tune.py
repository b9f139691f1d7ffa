"""The search for a faster launch: which are tried, that a wrong one is none, and that every kernel can be told."""

import json
import re

import pytest
import torch

from benchmarks.kernels import tune
from benchmarks.kernels.benchmark import Clock
from benchmarks.kernels.operations import OPS, Shape
from benchmarks.kernels.tune import Options, changes, defaults, neighbours, search
from fastdeit.kernels.launch import Launch
from tests.compiled.report import all_variants

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Shape("tiny", 7, 32, 2)
LAUNCH = Launch(constants=(("ROWS", 8), ("BLOCK", 64)), num_warps=4)


def test_a_neighbour_differs_in_one_number():
    found = {changes(launch, LAUNCH) for launch in neighbours(LAUNCH)}
    assert found == {
        "num_warps 4 -> 2", "num_warps 4 -> 8", "ROWS 8 -> 4", "ROWS 8 -> 16", "num_stages 2 -> 1", "num_stages 2 -> 3",
    }  # fmt: skip


def test_the_search_ends_where_no_neighbour_is_better():
    def milliseconds(launch):
        rows = dict(launch.constants)["ROWS"]
        return "does not fit" if launch.num_warps > 8 else abs(rows - 1) + abs(launch.num_warps - 8) + 1.0

    tried = search(LAUNCH, milliseconds)
    best = min((t for t in tried.items() if not isinstance(t[1], str)), key=lambda item: item[1])
    assert best[1] == 1.0
    assert changes(best[0], LAUNCH) == "ROWS 8 -> 1, num_warps 4 -> 8"
    assert "does not fit" in tried.values()
    assert len(search(LAUNCH, milliseconds, lambda: True)) == 1
    assert search(LAUNCH, lambda launch: "wrong") == {LAUNCH: "wrong"}


@pytest.mark.parametrize("op", tune.get_args(tune.Op))
def test_every_kernel_of_an_operation_asks_how_to_be_launched(op):
    names = set(defaults(OPS[op](SMALL, 2, torch.float32, DEVICE)))
    # The forms that skip samples or scale the branch have the same launches.
    compiled = {re.sub("_(kept|scaled)", "", variant.name.partition(" ")[0]) for variant in all_variants()}
    prefix = "add_layer_norm" if op == "layer_norm" else op
    assert names == {name for name in compiled if name.startswith(f"{prefix}_")}


@pytest.mark.slow
def test_launches_are_tried_and_recorded(tmp_path, monkeypatch, capsys):
    times = iter(range(1000, 0, -1))
    clock = Clock(lambda call: [call(), float(next(times))][1:], lambda call: None)
    monkeypatch.setattr(tune, "SHAPES", (SMALL,))
    path = tmp_path / "tune.jsonl"
    options = Options(ops=("bias_gelu",), models=("tiny",), tokens=(7,), batch=3, results=path)  # type: ignore[arg-type]
    monkeypatch.setattr(
        tune, "neighbours", lambda launch: list(neighbours(launch))[:3] if launch.num_warps == 4 else []
    )
    assert tune.tune_launches(options, DEVICE, clock)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["kernel"] for r in records] == ["bias_gelu_forward", "bias_gelu_backward"]
    assert records[0]["best"] == "ROWS 16 -> 8"
    assert [t["launch"] for t in records[0]["tried"]] == ["", "num_warps 4 -> 2", "num_warps 4 -> 8", "ROWS 16 -> 8"]
    assert "bias_gelu_forward tiny N7, forward: 1000.000 ms" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "SHAPES", (SMALL,))
    monkeypatch.setattr(tune, "disagreement", lambda *arguments: "output 0: error")
    options = Options(ops=("bias_gelu",), models=("tiny",), tokens=(7,), batch=3, results=tmp_path / "t")  # type: ignore[arg-type]
    assert not tune.tune_launches(options, DEVICE, Clock(lambda call: [1.0], lambda call: None))
    assert "its own launch fails: output 0: error" in capsys.readouterr().out
