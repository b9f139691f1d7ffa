"""A step that is replayed is the step: chosen where it can be, the same bits, no waiting, no growing memory."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdeit import checkpoint
from fastdeit.data import TrainBatch
from fastdeit.distributed import World, world
from fastdeit.model.networks import build_network
from fastdeit.pipelines.batch import Batch
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import Precision, resolve
from fastdeit.recipes import convnet_teacher
from fastdeit.training import graphs, step
from fastdeit.training.graphs import WARM_UP, CudaRecorder, Replayed, choose_graphs, why_not
from fastdeit.training.nonfinite import NonFiniteLoss
from fastdeit.training.step import TrainingStep
from fastdeit.training.trainer import Trainer
from runs import rewind, train, trained

CLASSES = 4


class Tape:
    """A CUDA graph as a CPU can have it: what is recorded runs when it is replayed, into the same memory."""

    def __init__(self, device=None):
        self.ran = self.recorded = self.replayed = 0

    def run(self, function):
        self.ran += 1
        return function()

    def record(self, function):
        self.recorded += 1
        out = torch.full((3,), float("nan"))

        def replay():
            self.replayed += 1
            out.copy_(function())

        return replay, out


def gpu(size=1):
    return World(0, size, size, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("sections", "precision", "processes", "reason"),
    [
        ({}, "bf16", 1, None),
        ({"run": {"micro_batch": 8}, "optim": {"clip_grad": 1.0}}, "fp32", 1, None),
        ({}, "bf16", 2, "several processes"),
        ({}, "fp16", 1, "loss scale"),
        ({"optim": {"name": "sgd"}}, "bf16", 1, "SGD"),
        ({"model": {"drop_rate": 0.1}}, "bf16", 1, "dropout"),
        ({"model": {"drop_path_mode": "skip"}}, "bf16", 1, "tensor sizes"),
        ({"run": {"loss_sync": "every_step"}}, "bf16", 1, "loss_sync"),
    ],
)
def test_auto_is_on_where_nothing_needs_the_host(tiny, sections, precision, processes, reason):
    recipe = tiny(**sections)
    formats = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    found = Precision(precision, formats[precision], gpu().device)
    chosen, why = choose_graphs(recipe, gpu(processes), found)
    assert chosen == (reason is None)
    assert (reason or "nothing in a step") in why
    asked = {
        kind: tiny(**{**sections, "run": {**sections.get("run", {}), "cuda_graphs": kind}}) for kind in ("on", "off")
    }
    assert choose_graphs(asked["off"], gpu(processes), found) == (False, "as requested")
    if reason is None:
        assert choose_graphs(asked["on"], gpu(processes), found) == (True, "as requested")
    else:
        with pytest.raises(UserError, match=f"{reason}.*'auto'"):
            choose_graphs(asked["on"], gpu(processes), found)


def test_a_convnet_and_a_cpu_are_not_replayed(tiny):
    exact = Precision("fp32", None, gpu().device)
    assert "resnet10t" in why_not(tiny(convnet_teacher), gpu(), exact)
    with world("cpu") as joined:
        assert choose_graphs(tiny(), joined, exact) == (False, "there is no GPU")
        with pytest.raises(UserError, match="there is no GPU"):
            Trainer(tiny(run={"cuda_graphs": "on"}), joined)


def test_the_first_calls_run_and_the_others_are_replayed_from_memory_that_stays():
    tape, seen = Tape(), []

    def function(tensors):
        seen.append((tensors[0].data_ptr(), tensors[1]))
        return tensors[0].sum(0)

    replayed = Replayed(function, tape)
    given = [torch.arange(6.0).view(2, 3) + i for i in range(WARM_UP + 3)]
    results = [replayed((tensor, None)) for tensor in given]
    for tensor, result in zip(given, results, strict=True):
        assert result.tolist() == tensor.sum(0).tolist()  # each its own memory
    assert (tape.ran, tape.recorded, tape.replayed) == (WARM_UP, 1, 3)
    assert len({pointer for pointer, _ in seen}) == 1
    assert seen[0][0] not in {tensor.data_ptr() for tensor in given}
    for other in (torch.zeros(3, 3), torch.zeros(2, 3).double()):
        with pytest.raises(ValueError, match="recorded for tensors"):
            replayed((other, None))
    with pytest.raises(ValueError, match="recorded for tensors"):
        replayed((given[0], given[0]))


@pytest.fixture
def taped(monkeypatch):
    """Replays of a CPU's steps; the tapes of those that were made."""
    tapes = []

    def make(device):
        tapes.append(Tape())
        return tapes[-1]

    monkeypatch.setattr(step, "choose_graphs", lambda recipe, world, precision: (True, "as the test wants it"))
    monkeypatch.setattr(step, "CudaRecorder", make)
    return tapes


def same_bits(a, b):
    for kind in ("model", "ema"):
        assert all(torch.equal(value, b[kind][name]) for name, value in a[kind].items())
    for name, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][name][key]) for key, value in state.items())


def variants(tiny, teacher_checkpoint, tmp_path, **run):
    """Recipes with all that a step has, straight and stopped in the middle of an epoch."""
    options = {
        "model": {"drop_path": 0.3},
        "objective": {"distillation": "hard"},
        "teacher": {"name": "resnet10t", "checkpoint": teacher_checkpoint},
        "optim": {"clip_grad": 1.0},
    }
    return [tiny(**options, run={"micro_batch": 12, "output": tmp_path / name, **run}) for name in ("eager", "graph")]


@pytest.mark.slow
def test_a_replayed_run_has_the_same_bits(tiny, teacher_checkpoint, tmp_path, events, request):
    eager, graph = variants(tiny, teacher_checkpoint, tmp_path)
    first = trained(eager)
    tapes = request.getfixturevalue("taped")
    second = trained(graph)
    (tape,) = tapes
    assert (tape.ran, tape.recorded, tape.replayed) == (WARM_UP, 1, 10 - WARM_UP)
    same_bits(first, second)
    losses = [[e["loss"] for e in events(recipe.run.output, "train")] for recipe in (eager, graph)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_replayed_run_resumes_in_the_middle_with_the_same_bits(tiny, teacher_checkpoint, tmp_path, taped):
    straight, stopped = variants(tiny, teacher_checkpoint, tmp_path, checkpoint_every=2, keep_checkpoints=9)
    first = trained(straight)
    train(stopped)
    rewind(stopped, 4)
    second = trained(stopped)
    assert taped[-1].replayed == 10 - 4 - WARM_UP
    same_bits(first, second)


def synthetic(recipe, device, count=32):
    """Function: the batch of a step, of random images."""
    generator = torch.Generator().manual_seed(0)
    size = recipe.model.img_size

    def make(number):
        labels = torch.randint(CLASSES, (2, count), generator=generator)
        tensors = (
            torch.randn(count, 3, size, size, generator=generator),
            *labels,
            torch.rand(count, generator=generator),
        )
        data = Batch(*(t.to(device) for t in (*tensors, torch.arange(count))))
        return TrainBatch(data, np.arange(count), np.zeros(count, np.int32), [], [])

    return make


def build(recipe, joined):
    torch.manual_seed(0)
    precision = resolve(recipe, joined.device)
    model = build_network(recipe.model, CLASSES).to(joined.device).train()
    return TrainingStep(recipe, joined, precision, model, num_classes=CLASSES, steps_per_epoch=100)


def test_loading_a_state_records_anew(tiny, taped):
    recipe = tiny()
    with world("cpu") as joined:
        training = build(recipe, joined)
        make = synthetic(recipe, joined.device)
        for number in range(WARM_UP + 1):
            training(make(number), 0, number, number)
        training.load(training.state())
        training(make(0), 0, 0, 0)
    assert [(tape.ran, tape.recorded) for tape in taped] == [(WARM_UP, 1), (1, 0)]


def test_a_step_that_cannot_be_recorded_is_told_with_the_remedy(monkeypatch):
    class Refusing:
        def __init__(self, graph, **options):
            assert options["capture_error_mode"] == "thread_local"

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture\nCUDA kernel errors"
            )

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", Refusing)
    with pytest.raises(UserError, match=r"previous error during capture\): set --run.cuda_graphs off"):
        CudaRecorder(torch.device("cuda")).record(lambda: torch.zeros(3))


@pytest.fixture
def deterministic():
    """Kernels that repeat themselves, so that two runs may be compared to the bit."""
    before = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = before


def on_gpu(tiny, **sections):
    run = {"device": "cuda", "precision": "bf16", "compile": "off", **sections.pop("run", {})}
    return tiny(**{"model": {"drop_path": 0.3}, **sections}, run=run)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("micro_batch", [0, 12])
def test_on_a_gpu_replayed_steps_are_the_eager_ones(tiny, deterministic, compile, micro_batch):
    """To the bit, with kernels that repeat themselves: the graph holds the very launches of the steps before it."""
    losses, weights = [], []
    for how in ("off", "on"):
        torch._dynamo.reset()
        recipe = on_gpu(tiny, run={"cuda_graphs": how, "compile": compile, "micro_batch": micro_batch})
        with world("cuda") as joined:
            training = build(recipe, joined)
            make = synthetic(recipe, joined.device)
            losses.append([training(make(i), 0, i, i).loss.item() for i in range(WARM_UP + 5)])
            weights.append({**training.model.state_dict(), **{f"ema.{k}": v for k, v in training.ema.shadow.items()}})
    assert losses[0] == losses[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.gpu
def test_on_a_gpu_a_replayed_run_resumes_with_the_same_bits(tiny, deterministic, tmp_path):
    runs = [
        on_gpu(tiny, run={"cuda_graphs": "on", "checkpoint_every": 2, "keep_checkpoints": 9, "output": tmp_path / name})
        for name in ("straight", "stopped")
    ]
    first = trained(runs[0])
    train(runs[1])
    rewind(runs[1], 4)
    same_bits(first, trained(runs[1]))
    # A run of one kind goes on as the other.
    rewind(runs[1], 6)
    eager = dataclasses.replace(runs[1], run=dataclasses.replace(runs[1].run, cuda_graphs="off"))
    same_bits(first, trained(eager))


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["on", "off"])
def test_on_a_gpu_a_step_waits_for_nothing_and_keeps_its_memory(tiny, how):
    recipe = on_gpu(tiny, run={"cuda_graphs": how})
    with world("cuda") as joined:
        training = build(recipe, joined)
        make = synthetic(recipe, joined.device)
        batches = [make(i) for i in range(4)]
        for number in range(graphs.WARM_UP + 3):
            training(batches[number % 4], 0, number, number)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(6, 36):
                training(batches[number % 4], 0, number, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= held + 2**20


@pytest.mark.gpu
def test_on_a_gpu_the_loop_waits_for_nothing(tiny, monkeypatch):
    """Data, step, check of the loss, log lines: nothing asks the device while an epoch runs."""
    recipe = on_gpu(tiny, run={"epochs": 1, "global_batch": 16, "log_every": 2}, data={"val": None})
    call, number = TrainingStep.__call__, 0

    def watched(self, *args):
        nonlocal number
        number += 1
        if number == WARM_UP + 3:
            torch.cuda.set_sync_debug_mode("error")
        out = call(self, *args)
        if number == 9:  # the last but one
            torch.cuda.set_sync_debug_mode("default")
        return out

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    try:
        train(recipe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert number == 10


@pytest.mark.slow
def test_late_looks_log_the_same_lines(tiny, events, tmp_path):
    """What is looked at one step late, as on a GPU, is said of the same step, and before anything is saved."""
    runs = [tiny(run={"output": tmp_path / name, "log_every": 2, "checkpoint_every": 3}) for name in ("now", "late")]
    train(runs[0])
    with world("cpu") as joined:
        trainer = Trainer(runs[1], joined)
        trainer.deferred = True
        trainer.run()
    kept = ("event", "epoch", "step", "global_step", "loss", "loss_base", "lr")
    lines = [[{k: e[k] for k in kept if k in e} for e in events(r.run.output)] for r in runs]
    assert [line for line in lines[0] if line["event"] in ("train", "checkpoint")] == [
        line for line in lines[1] if line["event"] in ("train", "checkpoint")
    ]


def test_a_late_look_at_a_loss_that_is_not_finite_names_its_step(tiny, events):
    recipe = tiny(optim={"lr": 1e30, "warmup_epochs": 0})
    with world("cpu") as joined:
        trainer = Trainer(recipe, joined)
        trainer.deferred = True
        with pytest.raises(NonFiniteLoss, match=r"epoch 1, step 1, .*; the batch are in"):
            trainer.run()
    (record,) = events(recipe.run.output, "nonfinite")
    saved = checkpoint.read_checkpoint(recipe.run.output / "nonfinite-rank0.pt")
    assert (record["step"], saved["step"], saved["model"]) == (1, 1, None)
    assert saved["index"].tolist() == record["indices"]
