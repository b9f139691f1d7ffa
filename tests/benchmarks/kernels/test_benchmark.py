"""A kernel is checked before it is timed; what is wrong is refused; what is timed is recorded as it comes."""

import dataclasses
import json
import sys
import time
import types

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks.kernels import augment, benchmark
from benchmarks.kernels.benchmark import Clock, KernelCase, Options, cases
from benchmarks.kernels.operations import OPS, Shape, disagreement, outputs

SMALL = Shape("tiny", 7, 32, 2)
PASSES = ("resize", "operations", "normalize_erase_mix", "augment", "stage", "stage from the host")


@pytest.fixture
def clock():
    def windows(call):
        start = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - start)]

    return Clock(windows, lambda call: None)


@pytest.mark.parametrize("op", list(OPS))
def test_ours_passes_and_a_wrong_one_is_refused(device, op):
    torch.manual_seed(0)
    operation = OPS[op](SMALL, 3, torch.float32, device)
    assert disagreement(operation, operation.contenders["fastdeit"], 2) is None
    assert operation.bytes[0] < operation.bytes[1]

    def off(*arguments):
        return tuple(out * 1.01 for out in outputs(operation.eager, arguments))

    def no_gradient(*arguments):
        return operation.eager(arguments[0] * 0.5 + arguments[0].detach() * 0.5, *arguments[1:])

    assert disagreement(operation, off, 2).startswith("output 0: error")
    assert disagreement(operation, no_gradient, 2).startswith("gradient of argument 0")


@pytest.mark.parametrize("shape", [Shape("tiny", 198, 192, 3), Shape("tiny", 197, 192, 3, prefix=1)])
@pytest.mark.parametrize("op", sorted(set(OPS) - {"distillation_loss"}))  # whose targets are no arguments
def test_the_byte_floor_is_what_goes_in_and_out(op, shape):
    operation = OPS[op](shape, 8, torch.bfloat16, torch.device("cpu"))
    given = [each.detach().requires_grad_() for each in operation.arguments]
    found = outputs(operation.eager, given)
    size = [sum(each.nbytes for each in some) for some in (given, found)]
    assert operation.bytes[0] == pytest.approx(sum(size), rel=0.1)
    # Backward at the very least: the outputs' gradients read, the arguments' written.
    assert operation.bytes[1] - operation.bytes[0] >= 0.9 * sum(size)


def test_attention_of_a_peer_takes_queries_keys_and_values(monkeypatch):
    """Whether it returns the output alone or, as flash-attn 4, with the log-sum-exp."""
    qkv = torch.randn(2, 7, 3, 2, 16)

    def attend(q, k, v):
        heads = [each.transpose(1, 2) for each in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)

    for function in (attend, lambda q, k, v: (attend(q, k, v), None)):
        module = types.SimpleNamespace(flash_attn_func=function)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
        operation = OPS["attention"](SMALL, 2, torch.float32, torch.device("cpu"))
        assert "flash-attn 4 (flash_attn/cute of its source)" in operation.absent
        torch.testing.assert_close(operation.contenders["flash-attn 3"](qkv), operation.eager(qkv))


def test_a_nan_is_refused(device):
    operation = OPS["layer_norm"](SMALL, 3, torch.float32, device)
    assert disagreement(operation, lambda *a: operation.eager(*a) * float("nan"), 2) is not None


def test_every_op_has_a_name_on_the_command_line():
    assert set(Options().ops) == {*OPS, "augment"}


def test_a_run_that_is_cut_has_had_every_op_at_the_largest_model():
    found = cases(Options())
    first = found[: len(Options().ops)]
    assert {case.op for case in first} == set(Options().ops)
    assert all(case.shape is None or (case.shape.model, case.shape.tokens) == ("base", 198) for case in first)
    assert len(found) == len(set(found)) == 5 * 6 + 2


def small_run(monkeypatch, tmp_path, device, clock, **options):
    monkeypatch.setattr(benchmark, "SHAPES", (Shape("tiny", 7, 32, 2), Shape("base", 7, 32, 2)))
    monkeypatch.setattr(augment, "SIZE", 16)
    monkeypatch.setattr(augment, "HEIGHT", 24)
    monkeypatch.setattr(augment, "WIDTH", 30)
    chosen = Options(tokens=(7,), batch=4, compile=False, results=tmp_path / "new" / "kernels.jsonl", **options)
    complete = benchmark.run_benchmark(chosen, device, clock)
    return complete, [json.loads(line) for line in chosen.results.read_text().splitlines()]


@pytest.mark.slow
def test_every_case_is_a_record(monkeypatch, tmp_path, device, clock, capsys):
    picture = tmp_path / "kernels.png"
    complete, records = small_run(monkeypatch, tmp_path, device, clock, ops=("bias_gelu", "augment"), plot=picture)
    assert complete
    assert picture.stat().st_size > 10_000
    assert [(r["op"], r.get("pass"), r.get("model")) for r in records] == [
        ("bias_gelu", None, "base"),
        *(("augment", name, None) for name in PASSES),
        ("bias_gelu", None, "tiny"),
    ]
    for record in records:
        assert record["sides"]["fastdeit"]
        assert record["environment"]["versions"]["torch"]
        assert record["roof"]["bytes_per_second"] > 0
    printed = capsys.readouterr().out
    assert "3 cases, about" in printed
    assert "augmentation, stage from the host" in printed


@pytest.mark.slow
def test_compiled_pytorch_is_timed_at_the_sizes_of_the_batch(monkeypatch, tmp_path, device, clock):
    """After the check's few samples, torch.compile would otherwise make code for any number of them."""
    compiled, compile_ = [], torch.compile

    def look(graph, examples):
        compiled.append([size for each in examples if isinstance(each, torch.Tensor) for size in each.shape])
        assert not any(isinstance(each, torch.SymInt) for each in examples)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=look, **options))
    options = Options(batch=6, results=tmp_path / "kernels.jsonl")
    (record,) = benchmark.measure(
        KernelCase("layer_norm", SMALL), options, {"bytes_per_second": 1e10, "flops_per_second": 1e11}, device, clock
    )
    assert "compiled" in record["sides"]
    assert all(isinstance(size, int) for sizes in compiled for size in sizes)
    assert [sorted({4, 6} & set(sizes)) for sizes in compiled[:1] + compiled[-1:]] == [[4], [6]]


def test_what_a_budget_leaves_out_is_named(monkeypatch, tmp_path, device, clock, capsys):
    _, records = small_run(monkeypatch, tmp_path, device, clock, ops=("bias_gelu",), budget=1e-3)
    assert [r["model"] for r in records] == ["base"]
    assert "left out, since the budget of 0 s is used up: bias_gelu tiny N7" in capsys.readouterr().out


def test_a_wrong_kernel_is_no_figure_and_ends_with_status_1(monkeypatch, tmp_path, device, clock, capsys):
    right = OPS["bias_gelu"]

    def wrong(*arguments):
        operation = right(*arguments)
        return dataclasses.replace(operation, contenders={"fastdeit": lambda x, b: operation.eager(x, b) * 1.1})

    monkeypatch.setitem(OPS, "bias_gelu", wrong)
    complete, (record, *_) = small_run(monkeypatch, tmp_path, device, clock, ops=("bias_gelu",))
    assert not complete
    assert set(record["sides"]) == {"eager"}
    assert "error" in record["refused"]["fastdeit"]
    assert "fastdeit: refused: output 0" in capsys.readouterr().out


def test_a_side_that_raises_anything_ends_alone(monkeypatch, tmp_path, device, clock, capsys):
    """Triton's and an extension's exceptions are no RuntimeErrors."""
    right = OPS["layer_norm"]

    def broken(error):
        def side(*arguments):
            raise error

        return side

    def operation(*arguments):
        made = right(*arguments)
        raised = {"triton": OutOfResources(300_000, 232_448, "shared memory"), "apex": ModuleNotFoundError("no kernel")}
        return dataclasses.replace(made, contenders={k: broken(error) for k, error in raised.items()} | made.contenders)

    monkeypatch.setitem(OPS, "layer_norm", operation)
    complete, records = small_run(monkeypatch, tmp_path, device, clock, ops=("layer_norm",))
    assert complete
    assert [set(record["sides"]) for record in records] == [{"fastdeit", "eager"}] * 2
    assert records[0]["failed"]["triton"].startswith("OutOfResources: out of resource: shared memory")
    assert records[0]["failed"]["apex"] == "ModuleNotFoundError: no kernel"
    assert "apex: failed: ModuleNotFoundError" in capsys.readouterr().out


def test_another_project_of_a_peers_name_is_told(monkeypatch, tmp_path, device):
    """PyPI's apex is no NVIDIA's, and written for Python 2."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("print 'hello'\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    absent = OPS["layer_norm"](SMALL, 2, torch.float32, device).absent
    assert "SyntaxError" in absent["apex (NVIDIA's, from its source)"]


def test_an_estimate_has_the_compilers_in_it():
    attention = KernelCase("attention", SMALL)
    assert attention.estimate(Options()) > attention.estimate(Options(compile=False)) > 0


@pytest.mark.gpu
def test_the_records_of_a_run_on_a_gpu(tmp_path):
    results = tmp_path / "kernels.jsonl"
    chosen = Options(ops=("layer_norm", "augment"), models=("tiny",), tokens=(198,), batch=8, results=results)
    assert benchmark.run_benchmark(chosen)
    record, *passes = map(json.loads, results.read_text().splitlines())
    assert {"fastdeit", "eager", "compiled"} <= set(record["sides"])
    assert [r["pass"] for r in passes] == list(PASSES)
    for figures in (record["sides"][name]["both"] for name in ("fastdeit", "eager", "compiled")):
        assert 0 < figures["graph_ms"] < figures["ms"]
        assert record["floor_ms"]["both"] < figures["graph_ms"] * 10
