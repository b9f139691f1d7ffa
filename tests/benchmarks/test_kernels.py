"""A kernel is checked before it is timed; what is wrong is refused."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernel_ops import OPS, Shape, disagreement, outputs
from benchmarks.kernels import main

SMALL = Shape("tiny", 7, 32, 2)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("op", list(OPS))
def test_ours_passes_and_a_wrong_one_is_refused(device, op):
    torch.manual_seed(0)
    work = OPS[op](SMALL, 3, torch.float32, device)
    assert disagreement(work, work.sides["fastdeit"], 2) is None
    assert work.bytes[0] < work.bytes[1]

    def off(*arguments):
        return tuple(out * 1.01 for out in outputs(work.eager, arguments))

    def no_gradient(*arguments):
        return work.eager(arguments[0] * 0.5 + arguments[0].detach() * 0.5, *arguments[1:])

    assert disagreement(work, off, 2).startswith("output 0: error")
    assert disagreement(work, no_gradient, 2).startswith("gradient of argument 0")


def test_a_nan_is_refused(device):
    work = OPS["layer_norm"](SMALL, 3, torch.float32, device)
    assert disagreement(work, lambda *a: work.eager(*a) * float("nan"), 2) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: its figures are another test")
def test_without_a_gpu_one_sentence_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--results", str(tmp_path / "kernels.jsonl")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: the kernels benchmark needs a GPU")
    assert not (tmp_path / "kernels.jsonl").exists()


@pytest.mark.gpu
def test_the_record_of_a_case(tmp_path):
    results = tmp_path / "kernels.jsonl"
    main(["--ops", "layer_norm", "--models", "tiny", "--tokens", "198", "--batch", "8", "--results", str(results)])
    (record,) = map(json.loads, results.read_text().splitlines())
    assert {"fastdeit", "eager", "compiled"} <= set(record["sides"])
    assert record["floor_ms"]["forward"] < record["sides"]["fastdeit"]["forward"]["ms"]


def test_every_op_has_a_name_on_the_command_line():
    assert set(kernels.Options().ops) == set(OPS)
