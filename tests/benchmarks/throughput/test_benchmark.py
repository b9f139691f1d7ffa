"""Ours and timm do the same step before either is timed; what differs is refused; what is timed is recorded."""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import pytest
import timm
import torch

from benchmarks.profiles import by_group, kernels_of
from benchmarks.throughput import benchmark, contenders, forms
from benchmarks.throughput.benchmark import Options, cases, is_complete, main, slowest
from benchmarks.throughput.forms import Form
from benchmarks.throughput.report import ratio
from fastdeit.model.deit import build_model
from fastdeit.precision import Precision
from refusals import refused
from system import run_python

ROOT = Path(__file__).parents[3]
PLAIN = Form(library="fastdeit")
SMALL = Options(models=("tiny",), sizes=(32,), batch=4, device="cpu", windows=3, window_seconds=0.02)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a machine that is busy make models this small twenty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_case(mode="train", *, name="tiny", distilled=False, drop_path=None, ema=False):
    """A case of two blocks instead of twelve."""
    (case,) = cases(dataclasses.replace(SMALL, models=(name,), mode=(mode,), distilled=distilled, ema=ema))
    model = dataclasses.replace(case.recipe.model, depth=2)
    if drop_path is not None:
        model = dataclasses.replace(model, drop_path=drop_path)
    return dataclasses.replace(case, recipe=dataclasses.replace(case.recipe, model=model))


@pytest.mark.parametrize(("name", "distilled"), [("tiny", False), ("tiny", True), ("deit3_small", False)])
def test_ours_and_timm_agree(name, distilled):
    case = one_case(name=name, distilled=distilled)
    assert contenders.disagreement(case, contenders.our_model(case, PLAIN)) is None


def test_both_are_compared_in_whole_float32(monkeypatch):
    """A convolution in TF32 and a GEMM in float32 differ by more than the limit, though both are right."""
    case, seen = one_case(), []
    forward = torch.nn.Conv2d.forward

    def looked_at(self, x):
        seen.append(torch.backends.cudnn.allow_tf32)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", looked_at)
    torch.backends.cudnn.allow_tf32 = True
    assert contenders.disagreement(case, contenders.our_model(case, PLAIN)) is None
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32


def test_other_logits_are_refused():
    case = one_case(distilled=True)
    ours = contenders.our_model(case, PLAIN)
    ours.head_dist.register_forward_hook(lambda module, inputs, output: output * 1.01)
    assert "logits of dist" in contenders.disagreement(case, ours)


def test_other_gradients_are_refused():
    case = one_case()
    ours = contenders.our_model(case, PLAIN)
    ours.blocks[1].mlp.fc1.weight.register_hook(lambda gradient: gradient * 1.01)
    assert "gradients of blocks.1.mlp.fc1.weight" in contenders.disagreement(case, ours)


@pytest.mark.slow
def test_a_missing_gradient_and_a_nan_are_refused():
    case = one_case()
    ours = contenders.our_model(case, PLAIN)
    ours.pos_embed.requires_grad_(False)
    assert "which parameters have gradients" in contenders.disagreement(case, ours)
    ours = contenders.our_model(case, PLAIN)
    ours.head.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    assert "logits of cls" in contenders.disagreement(case, ours)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "distilled"), [("tiny", False), ("tiny", True), ("deit3_small", False)])
def test_training_steps_move_both_models_alike(name, distilled, compiled, monkeypatch):
    built = {}
    ours, theirs = contenders.our_model, contenders.timm_model
    monkeypatch.setattr(contenders, "our_model", lambda *args: built.setdefault("fastdeit", ours(*args)))
    monkeypatch.setattr(contenders, "timm_model", lambda *args, **more: built.setdefault("timm", theirs(*args, **more)))
    monkeypatch.setattr("fastdeit.training.step.COMPILER", "aot_eager")
    case = one_case(name=name, distilled=distilled, drop_path=0.0, ema=True)
    inputs, state = contenders.Inputs.draw(case, case.batch), ours(case, PLAIN).state_dict()
    for library in ("fastdeit", "timm"):
        form = Form(library=library, compiled=compiled and library == "fastdeit")
        step = contenders.make_step(case, form, {k: v.clone() for k, v in state.items()}, inputs)
        assert [step() for _ in range(3)] == [case.batch] * 3
    moved = built["timm"].state_dict()
    for name, value in built["fastdeit"].state_dict().items():
        torch.testing.assert_close(value, moved[name], atol=2e-5, rtol=1e-4)
    assert not torch.equal(moved["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "distilled", "size", "wanted"),
    [
        ("tiny", False, 384, "deit_tiny_patch16_224"),
        ("small", False, 384, "deit_small_patch16_224"),
        ("base", False, 384, "deit_base_patch16_224"),
        ("tiny", True, 384, "deit_tiny_distilled_patch16_224"),
        ("base", True, 384, "deit_base_distilled_patch16_224"),
        ("deit3_base", False, 192, "deit3_base_patch16_224"),
        ("deit3_huge", False, 154, "deit3_huge_patch14_224"),
    ],
)
def test_the_student_has_the_shapes_of_timms_model(model, distilled, size, wanted):
    sizes = () if "deit3" in model else (size,)  # empty: the recipe's own
    (case,) = cases(dataclasses.replace(SMALL, models=(model,), distilled=distilled, mode=("infer",), sizes=sizes))
    with torch.device("meta"):
        wanted = timm.create_model(wanted, img_size=size)
        found = build_model(case.recipe.model, contenders.CLASSES)
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}


@pytest.mark.slow
def test_a_run_records_what_it_prints(tmp_path, capsys):
    path = tmp_path / "figures.jsonl"
    main(f"--models tiny --sizes 32 --batch 8 --device cpu --windows 3 --window-seconds 0.02 --results {path}".split())
    records = [json.loads(line) for line in path.read_text().splitlines()]
    printed = capsys.readouterr().out
    assert [r["mode"] for r in records] == ["train", "infer"]
    for record in records:
        skips = {"fastdeit eager + skip"} if record["mode"] == "train" else set()
        assert set(record["sides"]) == {"timm eager", "fastdeit eager"} | skips
        medians = {}
        for name, figures in record["sides"].items():
            assert len(figures["windows"]) == 3
            medians[name] = statistics.median(figures["windows"])
            assert figures["images_per_second"] == medians[name] > 0
        ours = medians["fastdeit eager"]  # the ratio leaves out skipping, which timm does not do
        assert f"{ours / medians['timm eager']:.3f}" in printed
        assert record["environment"]["versions"]["timm"] == timm.__version__


def test_what_disagrees_is_not_timed(tmp_path, monkeypatch, ended):
    monkeypatch.setattr(benchmark, "disagreement", lambda case, ours: "logits of cls differ")
    path = tmp_path / "figures.jsonl"
    words = f"--models tiny --sizes 32 --mode infer --device cpu --results {path}".split()
    assert "not timed" in ended(1, main, words).out
    record = json.loads(path.read_text())
    assert "logits of cls differ" in record["refused"]
    assert "sides" not in record


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "other", "error", "reason"),
    [
        ("timm", "fastdeit", torch.OutOfMemoryError("no"), "out of memory at batch 4"),
        ("fastdeit", "timm", RuntimeError("stream is capturing\nCompile with DSA"), "stream is capturing"),
    ],
)
def test_what_a_side_raises_leaves_it_out(monkeypatch, library, other, error, reason):
    def make_step(case, form, state, inputs):
        if form.library == library:
            raise error
        return lambda: case.batch

    monkeypatch.setattr(benchmark, "make_step", make_step)
    record = benchmark.measure(one_case("infer"), SMALL)
    assert record["failed"] == {f"{library} eager": reason}
    assert set(record["sides"]) == {f"{other} eager"}
    assert ratio(record) is None


def test_the_host_is_one_step_ahead_of_the_device():
    """As much as the training loop is, so that a window ends when its time is over."""
    told = []

    class Event:
        def __init__(self):
            self.number = sum(what == "step" for what, _ in told)

        def record(self):
            told.append(("recorded", self.number))

        def synchronize(self):
            told.append(("waited", self.number))

    number = itertools.count(1)
    step = benchmark.one_ahead(lambda: told.append(("step", next(number))) or 8, Event)
    assert [step() for _ in range(3)] == [8, 8, 8]
    assert told == [
        ("step", 1), ("recorded", 1),
        ("step", 2), ("recorded", 2), ("waited", 1),
        ("step", 3), ("recorded", 3), ("waited", 2),
    ]  # fmt: skip


@pytest.mark.slow
def test_what_a_budget_leaves_out_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "make_step", lambda case, form, state, inputs: lambda: case.batch)
    path = tmp_path / "figures.jsonl"
    benchmark.run_benchmark(dataclasses.replace(SMALL, budget=1e-3, results=path))
    assert len(path.read_text().splitlines()) == 1
    assert "left out, since the budget of 0 s is used up: deit_tiny infer" in capsys.readouterr().out


def names(case, **options):
    return [form.name for form in forms.forms(case, **{"peer": True, "compiled": True, "quick": False, **options})]


def test_our_forms_go_from_plain_to_all_that_helps(monkeypatch):
    case = one_case()
    ours = ["fastdeit eager", "fastdeit compiled + skip", "fastdeit compiled"]
    assert names(case) == ["timm eager", "timm compiled", *ours]
    assert names(case, compiled=False, peer=False) == ["fastdeit eager + skip", "fastdeit eager"]
    assert names(one_case(drop_path=0.0), compiled=False, peer=False) == ["fastdeit eager"]
    on_gpu = dataclasses.replace(case, precision=Precision("bf16", torch.bfloat16, torch.device("cuda", 0)))
    ours = ["fastdeit eager", "fastdeit compiled", "fastdeit compiled + kernels"]
    assert names(dataclasses.replace(on_gpu, mode="infer"), peer=False) == [*ours, f"{ours[-1]} + reduce-overhead"]
    ours.insert(2, "fastdeit compiled + kernels + skip")
    replayed = ["fastdeit compiled + graph", "fastdeit compiled + kernels + graph"]
    assert names(on_gpu, peer=False) == [*ours, "fastdeit compiled + kernels + skip + graph", *replayed]
    assert names(on_gpu, peer=False, quick=True) == [replayed[-1]]
    monkeypatch.setattr(forms.importlib.util, "find_spec", lambda name: object())
    assert names(on_gpu)[-1] == "fastdeit compiled + kernels + graph + apex"
    # An apex that cannot be used must not be all that is tried.
    assert names(on_gpu, peer=False, quick=True) == [replayed[-1], f"{replayed[-1]} + apex"]


def test_timm_gets_every_mode_the_whole_graph_and_both_attention_backends():
    on_gpu = dataclasses.replace(one_case(), precision=Precision("bf16", torch.bfloat16, torch.device("cuda", 0)))
    tuned = ["timm eager", "timm compiled", "timm compiled + reduce-overhead", "timm compiled + max-autotune"]
    graphs = [f"timm compiled + {what}graph" for what in ("", "max-autotune + ", "cudnn + ", "flash + ")]
    assert [name for name in names(on_gpu) if name.startswith("timm")] == [*tuned, *graphs]
    assert [name for name in names(on_gpu, quick=True) if name.startswith("timm")] == [tuned[2], graphs[0]]
    infer = dataclasses.replace(on_gpu, mode="infer")
    backends = [f"timm compiled + reduce-overhead + {backend}" for backend in ("cudnn", "flash")]
    assert [name for name in names(infer) if name.startswith("timm")] == [*tuned, *backends]
    assert [name for name in names(infer, quick=True) if name.startswith("timm")] == [tuned[2]]
    eager = [name for name in names(on_gpu, compiled=False) if name.startswith("timm")]
    assert eager == ["timm eager", *(f"timm eager + {what}graph" for what in ("", "cudnn + ", "flash + "))]


def test_torch_compile_gets_the_mode_that_records_no_graph_inside_ours():
    assert Form(library="timm", compiled=True).mode is None
    assert Form(library="timm", compiled=True, tuning="max-autotune").mode == "max-autotune"
    assert Form(library="timm", compiled=True, tuning="max-autotune", graph=True).mode == "max-autotune-no-cudagraphs"
    assert Form(library="timm", compiled=True, tuning="reduce-overhead").mode == "reduce-overhead"


class AsIfRecorded:
    """A recorder whose replays run the function on the same memory, as a CUDA graph would; counts them."""

    def __init__(self):
        self.replays = 0

    def run(self, function):
        return function()

    def record(self, function):
        out = function().clone()  # recording does not run: the replay below makes up for it

        def replay():
            self.replays += 1
            out.copy_(function())

        return replay, out


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True])
def test_timms_replayed_step_is_its_step(distilled):
    """Batch, targets and weights of a replayed step are those of the step called as it is."""
    case = one_case(distilled=distilled, drop_path=0.0, ema=True)
    inputs = contenders.Inputs.draw(case, case.batch)
    state = contenders.our_model(case, PLAIN).state_dict()
    moved = []
    for graph, steps in ((False, 5), (True, 4)):
        model = contenders.timm_model(case, both_heads=True, drop_path=0.0).train()
        model.load_state_dict({name: value.clone() for name, value in state.items()})
        recorder = AsIfRecorded()
        step = contenders._timm_train_step(model, model, case, inputs, graph=graph, recorder=recorder)
        assert [step() for _ in range(steps)] == [case.batch] * steps
        assert recorder.replays == (1 if graph else 0)
        moved.append(model.state_dict())
    # The stand-in's recording is one more step.
    for name, value in moved[0].items():
        torch.testing.assert_close(moved[1][name], value)
    assert not torch.equal(moved[0]["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


def test_what_was_compiled_for_one_attention_backend_does_not_serve_another():
    """torch.compile would otherwise find the code of the first backend and time it twice."""
    seen = []

    class Attending(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    def look(graph, example):
        seen.append(graph.print_readable(print_output=False))
        return graph.forward

    backends = {"cudnn": torch.nn.attention.SDPBackend.MATH, "flash": torch.nn.attention.SDPBackend.FLASH_ATTENTION}
    x = torch.randn(2, 3, 8, 16)
    for name, backend in backends.items():
        module = contenders._WithSdpa(Attending(), name)
        module.backend = backend  # those that a CPU has
        torch.compile(module, backend=look)(x)
    assert len(seen) == 2
    assert "MATH" in seen[0]
    assert "FLASH" in seen[1]


def test_the_slowest_form_makes_room_but_no_fastest():
    rates = {"timm eager": 1.0, "timm compiled": 5.0, "fastdeit eager": 2.0, "fastdeit compiled": 9.0}
    assert slowest(rates) == "timm eager"
    del rates["timm eager"]
    assert slowest(rates) == "fastdeit eager"
    del rates["fastdeit eager"]
    assert slowest(rates) is None
    assert slowest({}) is None


def test_a_form_of_a_peer_may_fail_but_none_of_ours():
    def complete(sides, failed=(), peer=True):
        return is_complete(
            {"sides": dict.fromkeys(sides), "failed": dict.fromkeys(failed)},
            {"fastdeit", "timm"} if peer else {"fastdeit"},
        )

    assert complete(["timm eager", "fastdeit eager"], ["timm compiled + flash + graph"])
    assert not complete(["timm eager", "fastdeit eager"], ["fastdeit compiled"])
    assert not complete(["fastdeit eager"], ["timm eager"])
    assert complete(["fastdeit eager"], peer=False)
    assert not is_complete({"refused": "they differ"}, {"fastdeit", "timm"})


def test_a_profile_needs_a_gpu(tmp_path, ended):
    words = f"--models tiny --sizes 32 --device cpu --profile --results {tmp_path / 'figures.jsonl'}".split()
    assert "--profile needs a GPU" in ended(2, main, words).err
    assert not list(tmp_path.iterdir())


def test_the_targets_are_judged_on_the_gpu_that_they_are_of():
    sides = {"timm compiled": 3000.0, "timm eager": 2000.0, "fastdeit eager": 2500.0, "fastdeit compiled": 4500.0}
    record = {
        "mode": "train", "img_size": 224, "model": "deit_base", "environment": {"gpu": {"name": "NVIDIA H200"}},
        "sides": {name: {"images_per_second": rate} for name, rate in sides.items()},
    }  # fmt: skip
    assert [target["reached"] for target in benchmark.targets(record)] == [True, True]
    record["sides"]["timm compiled"]["images_per_second"] = 4000.0
    assert [target["reached"] for target in benchmark.targets(record)] == [True, False]
    assert not benchmark.targets({**record, "environment": {"gpu": {"name": "Tesla T4"}}})
    (rate, _) = benchmark.targets({**record, "environment": {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}})
    assert rate["text"] == "deit_base: 4,500 im/s of more than 3,300"


@pytest.mark.slow
def test_forms_are_chosen_by_name(tmp_path, ended):
    path = tmp_path / "throughput.jsonl"
    command = f"--models tiny --sizes 32 --batch 4 --mode infer --device cpu --windows 2 --results {path}".split()
    main([*command, "--forms", "fastdeit eager"])  # exit status 0, though timm was not timed
    assert [*json.loads(path.read_text())["sides"]] == ["fastdeit eager"]
    said = ended(2, main, [*command, "--forms", "fastdeit eager", "timm + graph"]).err
    assert "--forms 'timm + graph': the forms here are timm eager, fastdeit eager" in said


def test_quick_times_one_form_of_each_side(tmp_path):
    path = tmp_path / "figures.jsonl"
    main(f"--models tiny --sizes 32 --batch 4 --mode train --device cpu --quick --windows 2 --results {path}".split())
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(record["sides"]) == {"timm eager", "fastdeit eager"}


@pytest.mark.slow
def test_windows_alternate(monkeypatch):
    order = []
    monkeypatch.setattr(benchmark, "timed_window", lambda step, seconds, wait: order.append(step()) or 1.0)
    monkeypatch.setattr(benchmark, "make_step", lambda case, form, state, inputs: lambda: form.library)
    benchmark.measure(one_case("infer"), dataclasses.replace(SMALL, windows=4))
    assert order[2:] == ["timm", "fastdeit", "fastdeit", "timm"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named():
    refused("sees no GPU", list, cases(Options(device="cuda")))


@pytest.mark.gpu
def test_on_a_gpu_every_form_is_timed_with_its_memory(tmp_path):
    """In a process of its own: memory that earlier tests free meanwhile would be missing from a form's figure."""
    path = tmp_path / "figures.jsonl"
    words = ["--models", "tiny", "--sizes", "64", "--batch", "8", "--device", "cuda", "--windows", "2"]
    words += ["--window-seconds", "0.1", "--quick", "--profile", "--results", str(path)]
    run_python("-m", "benchmarks", "throughput", *words, status=0, cwd=ROOT)
    for record in map(json.loads, path.read_text().splitlines()):
        assert not record["failed"]
        assert len(record["sides"]) >= (3 if record["mode"] == "train" else 2)
        assert all(figures["peak_memory_mib"] > 0 for figures in record["sides"].values())
    (profile,) = map(json.loads, (tmp_path / "profiles.jsonl").read_text().splitlines())
    assert {"attention", "GEMM", "optimizer"} <= set(by_group(kernels_of(profile)))
