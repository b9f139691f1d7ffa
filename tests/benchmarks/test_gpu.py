"""The one command for a machine with a GPU: what each part of it ends with, and what it writes."""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Step, pytest_status, run_benchmark, run_loaders, run_tests, summary
from benchmarks.kernels import benchmark as kernels
from benchmarks.kernels import choose, tune
from benchmarks.loaders import report as loader_report
from benchmarks.throughput import benchmark as throughput
from system import run_python

ROOT = Path(__file__).parents[2]
WHERE = {"date": "2026-01-01T10:20:30", "gpu": {"name": "NVIDIA H200"}, "cpu": "Some CPU"}


@pytest.mark.slow
def test_pytest_runs_and_its_last_line_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORKERS", 1)
    (tmp_path / "test_good.py").write_text("def test_a():\n    pass\n")
    (tmp_path / "test_bad.py").write_text("def test_b():\n    assert False\n")
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_not_there\n")
    good = run_tests("good", [tmp_path / "test_good.py"], 60, tmp_path)
    assert (good.status, good.message.partition(" in ")[0]) == ("passed", "1 passed")
    every = run_tests("every", [tmp_path], 60, tmp_path)
    assert every.status == "failed"
    assert every.message.startswith("1 failed, 1 passed, ")
    assert "1 error" in every.message


@pytest.mark.slow
def test_tests_that_take_too_long_are_cut_with_their_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORKERS", 1)
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_a():\n    pass\ndef test_b():\n    while True:\n        time.sleep(0.1)\n"
    )
    found = run_tests("slow", [tmp_path], 6, tmp_path)
    assert found.status == "cut"
    assert found.message.startswith("1 passed")


def test_a_failure_before_the_cut_is_a_failure():
    assert pytest_status("1 passed in 3s", 0, False) == "passed"
    assert pytest_status("1 passed in 3s", 2, True) == "cut"
    assert pytest_status("1 failed, 1 passed in 3s", 2, True) == "failed"
    assert pytest_status("Segmentation fault", 139, False) == "failed"


def test_the_kernels_tests_come_first_and_none_of_the_benchmarks(tmp_path):
    marked = "@pytest.mark.gpu\ndef test_a():\n    pass\n"
    for name in ("kernels/test_add.py", "kernels/test_attention.py", "pipelines/test_x.py", "benchmarks/test_z.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(marked)
    (tmp_path / "pipelines/test_y.py").write_text("def test_a():\n    pass\n")
    kernels_first, others = gpu.test_runs(tmp_path).values()
    assert kernels_first == [tmp_path / "kernels/test_attention.py", tmp_path / "kernels/test_add.py"]
    assert others == ["-m", "gpu", tmp_path / "pipelines/test_x.py"]
    assert ROOT / "tests/fastdeit/training/test_graphs.py" in gpu.test_runs(ROOT / "tests")["other tests marked gpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("pass", "passed", ""),
        ("print('fastdeit: failed: why'); raise SystemExit(1)", "failed", "refused or failed: fastdeit: failed: why"),
        ("raise RuntimeError('no more memory')", "failed", "RuntimeError: no more memory"),
        ("print('error: no GPU', file=sys.stderr); raise SystemExit(2)", "failed", "exit status 2: error: no GPU"),
        ("print('CUDA error'); os.abort()", "failed", "exit status -6: CUDA error"),
        # As a kernel that never ends: the process does not even hear an interrupt.
        ("signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun'); time.sleep(99)", "cut", "its time was over"),
    ],
)
def test_a_benchmark_that_dies_or_hangs_ends_alone(tmp_path, monkeypatch, program, status, message):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text(f"import os, signal, sys, time\n{program}\n")
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    step = run_benchmark("kernels", tmp_path, 1.0, 2.0, tmp_path)
    assert (step.name, step.status) == ("kernels", status)
    assert message in step.message


def test_a_part_is_what_its_process_runs(tmp_path, monkeypatch, ended):
    called = []
    monkeypatch.setattr(kernels, "run_benchmark", lambda options: called.append(options) or True)
    monkeypatch.setattr(throughput, "run_benchmark", lambda options: called.append(options) or False)
    monkeypatch.setattr(choose, "choose", lambda options: called.append(options) or True)
    monkeypatch.setattr(tune, "tune_launches", lambda options: called.append(options) or True)
    for name in ("kernels", "augment", "tune"):
        gpu.main(["--in-process", name, "--budget", "9", "--results", str(tmp_path)])
    ended(1, gpu.main, ["--in-process", "throughput", "--budget", "8", "--results", str(tmp_path)])
    *_, augment, chosen, tuned, throughputs = called
    assert all(0 < options.budget <= 9 for options in called)
    assert [options.results.stem for options in called] == ["kernels"] * 5 + ["tune", "tune", "throughput"]
    assert augment.ops == ("augment",)
    assert (chosen.budget, chosen.table) == (4.5, tmp_path / "kernel_table.json")
    assert tuned.budget == pytest.approx(9.0, abs=0.5)  # the part before it took no time
    assert throughputs.profile
    # Every operation at every model, and attention with odd and even numbers of tokens.
    cases = [case for options in called[:4] for case in kernels.cases(options)]
    assert len(set(cases)) == len(cases) == 3 * (4 + 4 * 2) + 1
    assert {case.shape.tokens for case in cases if case.op == "attention"} == {197, 198, 577, 578}
    assert all(case.shape.model == "base" for case in cases[:4])


def test_the_summary_names_steps_peers_and_targets(monkeypatch):
    monkeypatch.setattr(gpu, "_is_installed", lambda module: module in ("pytest", "kornia"))
    targets = [{"text": "1.3x of at least 1.2x", "reached": True}, {"text": "2x of at least 5x", "reached": False}]
    monkeypatch.setattr(gpu.tables, "markdown", lambda records: "### Kernels")
    records = [{"benchmark": "kernels", "targets": targets}, {"benchmark": "profiles"}]
    text = summary([Step("tests", "cut", 61.2, "9 passed in 60s")], records, WHERE)
    assert text.startswith("# GPU run, NVIDIA H200, 2026-01-01 10:20 UTC")
    assert "| tests | cut | 61 | 9 passed in 60s |" in text
    missing = "flash-attn, flash-attn 3, flash-attn 4, liger-kernel, apex, nvidia-dali, tyro (for the loaders)"
    assert f"Not installed: {missing}." in text
    assert "1 of 2 targets reached." in text
    assert text.endswith("### Kernels\n")
    assert "Nothing was timed." in summary([], [], {**WHERE, "gpu": None})
    launch = {"benchmark": "tune", "kernel": "bias_gelu_forward", "model": "base", "tokens": 198, "timed": "forward"}
    launch |= {"tried": [{}] * 7, "default_ms": 0.2, "best_ms": 0.2, "best": ""}
    assert "- bias_gelu_forward base N198, forward: 0.200 ms, the best of 7" in summary([], [launch], WHERE)


@pytest.fixture
def parts(monkeypatch):
    """Stand-ins of everything that a part runs, and what they were given: name and seconds."""
    given = []

    def tests(name, arguments, seconds, root=ROOT):
        given.append((name, seconds))
        return Step(name, "passed", 0.1, "3 passed")

    def timed(name, results, budget, seconds):
        assert budget < seconds
        given.append((name, seconds))
        if name != "augment":
            (results / f"{name}.jsonl").open("a").write(json.dumps({"benchmark": name, "targets": []}) + "\n")
        return Step(name, "passed", 0.1)

    def loaders(results, seconds):
        given.append((results.stem, seconds))
        return Step("loaders", "missing", 0.1, "no photographs")

    monkeypatch.setattr(gpu, "run_tests", tests)
    monkeypatch.setattr(gpu, "run_loaders", loaders)
    monkeypatch.setattr(gpu, "run_benchmark", timed)
    monkeypatch.setattr(gpu.tables, "markdown", lambda records: f"{len(records)} records")
    monkeypatch.setattr(gpu.tune, "report", lambda record: "a launch")
    return given


def test_parts_are_independent_and_each_takes_less_than_nine_minutes(tmp_path, parts, capsys):
    (tmp_path / "throughput.jsonl").write_text('{"benchmark": "throughput", "old": true}\n')
    assert gpu.run_parts(tmp_path, device="any")
    names = [name for name, _ in parts]
    assert names[:5] == ["throughput", "tests of the kernels", "other tests marked gpu", "kernels", "augment"]
    assert names[5:] == ["loaders", "tune"]
    seconds = dict(parts)
    assert seconds["tests of the kernels"] <= seconds["other tests marked gpu"] <= 480
    assert max(seconds.values()) < 540
    printed = capsys.readouterr().out
    assert printed.startswith(gpu.not_installed())
    texts = {name: (tmp_path / f"gpu-{name}.md").read_text() for name in gpu.PARTS}
    assert all(text in printed for text in texts.values())
    assert "1 records" in texts["throughput"]  # not the old one
    assert "| kernels | passed |" in texts["kernels"]
    assert "a launch" in texts["tune"]
    assert "no photographs" in texts["augmentation"]


def test_a_limit_for_all_goes_to_the_first_parts(tmp_path, parts):
    assert gpu.run_parts(tmp_path, minutes=6.0, device="any")
    assert parts[0] == ("throughput", pytest.approx(330, abs=1))
    assert [name for name, _ in parts].count("kernels") == 1  # the stand-ins before it took no time
    parts.clear()
    assert gpu.run_parts(tmp_path, ["throughput"], minutes=8.0, device="any")
    assert parts == [("throughput", pytest.approx(480, abs=1))]
    parts.clear()
    assert gpu.run_parts(tmp_path, ["tune"], minutes=0.4, device="any")
    assert parts == []
    assert "| tune | left out | 0 | no time was left |" in (tmp_path / "gpu-tune.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("print('im/s')", "passed", "im/s"),
        ("print('error: no photographs', file=sys.stderr); raise SystemExit(2)", "missing", "error: no photographs"),
        ("raise SystemExit(1)", "failed", "exit status 1"),
        ("import time; print('begun', flush=True); time.sleep(60)", "cut", ""),
    ],
)
def test_loaders_are_timed_in_a_process_of_their_own(tmp_path, program, status, message):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text(
        f"import sys\nassert sys.argv[1] == 'loaders' and 'fastdeit-dali-x3-gpu' in sys.argv\n{program}\n"
    )
    step = run_loaders(tmp_path / "loaders.jsonl", 2, tmp_path)
    assert (step.name, step.status) == ("loaders", status)
    assert message in step.message


def test_the_whole_loader_has_a_target():
    sides = {"fastdeit-dali-x3-gpu": {"images_per_second": 31_000.0}, "fastdeit-turbo-x3": {"images_per_second": 9.0}}
    (target,) = loader_report.targets({"sides": sides})
    assert target == {"text": "fastdeit-dali-x3-gpu: 31,000 samples/s of at least 25,000", "reached": True}
    assert loader_report.targets({"sides": {"timm": {"images_per_second": 1.0}}}) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (gpu.main, ["--results", "."], "PyTorch sees no GPU"),
        (kernels.main, ["--results", "kernels.jsonl"], "the kernels benchmark needs a GPU"),
        (tune.main, [], "launches are tuned on a GPU, and PyTorch sees none: fastdeit-doctor tells why"),
        (tune.main, ["--choose", "--recipe", "deit_tiny"], "measuring a card needs a GPU, and PyTorch sees none: fast"),
        (throughput.main, ["--device", "cuda"], "--device cuda: PyTorch sees no GPU"),
    ],
)
def test_without_a_gpu_one_sentence_says_so(tmp_path, monkeypatch, ended, main, words, said):
    monkeypatch.chdir(tmp_path)
    assert ended(2, main, words).err.startswith(f"error: {said}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_checkout_needs_no_installation_and_no_tyro(tmp_path):
    """As on a machine where nothing can be fetched: neither fastdeit nor tyro is installed."""
    for name in ("fastdeit", "kernels", "pipelines", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    program = (
        "import importlib.abc, sys\n"
        "class Bare(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('tyro', 'ffcv', 'tensorboard'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path[:] = [Bare(), *(f for f in sys.meta_path if 'ditable' not in repr(f))]\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks import gpu\n"
        "import fastdeit, fastdeit.kernels.attention, fastdeit.pipelines.plan.plan\n"
        "assert all(m.__file__.startswith(sys.argv[1]) for m in (fastdeit, fastdeit.kernels, fastdeit.pipelines))\n"
        "gpu.main(['--help'])\n"
    )
    done = run_python("-c", program, tmp_path, cwd=tmp_path, status=0)
    assert "--minutes" in done.stdout


@pytest.mark.slow
def test_a_package_that_is_not_there_is_told_in_a_sentence(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run_python("-m", "benchmarks", "throughput", cwd=ROOT, env=environment, status=2)
    assert done.stderr.splitlines()[-1].startswith("error: No module named 'tyro'")
    assert "Traceback" not in done.stderr
