"""The command prints the prediction beside what was measured of the same step, and of no other."""

import json

import pytest

from benchmarks.roof.benchmark import Options, forecasts, main
from benchmarks.roof.report import part_table

ENVIRONMENT = {
    "date": "2026-01-02", "commit": "0123456789", "versions": {"torch": "2.11", "triton": "3.6"},
    "gpu": {"name": "NVIDIA H200", "driver": "580"},
}  # fmt: skip
CASE = {
    "model": "deit_tiny", "img_size": 224, "mode": "train", "batch": 256, "ema": False, "precision": "bf16",
    "environment": ENVIRONMENT,
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    kernels = [["nvjet_a", 3, 4000.0], ["_attention_forward", 1, 2000.0], ["nobody_knows", 1, 500.0]]
    old = {**ENVIRONMENT, "date": "2026-01-01"}
    lines = [
        {**CASE, "form": "all", "ms_per_step": 8.0, "kernels": kernels},
        {**CASE, "form": "all", "ms_per_step": 99.0, "kernels": [], "environment": old},
    ]
    (tmp_path / "profiles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sides = {"timm compiled": {"images_per_second": 2e4}, "fastdeit compiled": {"images_per_second": 1e4}}
    line = {**CASE, "model": "deit_small", "sides": sides}
    (tmp_path / "throughput.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def test_the_newest_measurement_of_the_same_step_is_beside_it(results):
    tiny, small, base = forecasts(Options(results=results))
    assert tiny.profile is not None
    assert tiny.profile["ms_per_step"] == 8.0
    assert small.profile is None
    assert small.throughput == (1e4, "0123456")
    assert (base.profile, base.throughput) == (None, None)
    rows = {row[0]: row for row in part_table(tiny).rows}
    assert rows["GEMM"][4:6] == ["3", "4.00"]
    assert rows["gaps"][5] == "1.50"
    assert rows["other"][4:6] == ["1", "0.50"]
    assert rows["step"][4:6] == ["5", "8.00"]


@pytest.mark.parametrize("changes", [{"batch": 128}, {"img_size": 384}, {"card": ("H100",)}, {"ema": True},
                                     {"distilled": True}, {"inputs": "patches"},
                                     {"graph": False}, {"skip": True}])  # fmt: skip
def test_another_step_is_not_compared(results, changes):
    for forecast in forecasts(Options(results=results, **changes)):
        assert forecast.profile is None
        assert forecast.throughput is None


def test_the_command_prints_parts_gemms_and_rates(results, capsys):
    main(["--models", "tiny", "--card", "H200", "b200", "--gemms", "--results", str(results)])
    printed = capsys.readouterr().out
    assert "deit_tiny, H200, batch 256" in printed
    assert "GEMMs of deit_tiny, B200" in printed
    assert "fc1, last block" in printed
    assert "32,000" in printed  # measured: 256 images in 8 ms
    assert "assumed shares of the datasheet (NVIDIA HGX B200 datasheet" in printed


def test_an_unknown_card_and_a_wrong_size_are_named(ended):
    assert "no card 'V100'" in ended(2, main, ["--card", "V100"]).err
    assert "not a multiple" in ended(2, main, ["--img-size", "225"]).err
