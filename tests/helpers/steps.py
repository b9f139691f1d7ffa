"""Training steps on random images, in one process or two, with recorders that a CPU can have."""

from __future__ import annotations

import signal
import time
import uuid
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdeit.data import TrainBatch
from fastdeit.distributed import World
from fastdeit.inputs import open_data_sets
from fastdeit.loader import create_loader
from fastdeit.model import kernel_checks, kernel_choice, kernel_table
from fastdeit.model.kernel_choice import TORCH, choose_kernels
from fastdeit.model.networks import build_network
from fastdeit.pipelines.batch import Batch
from fastdeit.precision import Precision, resolve
from fastdeit.sections import ModelConfig, RunConfig
from fastdeit.setup import copied_here
from fastdeit.signals import StopSignals
from fastdeit.training import step
from fastdeit.training.divergence import DivergedError, DivergenceGuard
from fastdeit.training.gradients import SharedGradients
from fastdeit.training.graphs import WARM_UP, RecordingError
from fastdeit.training.step import TrainingStep
from fastdeit.training.stop import Stop
from forked import Forked, run_module_twice

CLASSES = 4


class Tape:
    """A CUDA graph as a CPU can have it: what is recorded runs when it is replayed, into the same memory."""

    def __init__(self, device=None):
        self.ran = self.recorded = self.replayed = self.discarded = 0

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

    def discard(self):
        self.discarded += 1


class Torn(Tape):
    """A recorder that fails."""

    def record(self, function):
        self.recorded += 1
        raise RecordingError("out of memory")


class Silent(Tape):
    """A recorder whose replay launches nothing, to time what the host does beside it."""

    def record(self, function):
        return (lambda: None), torch.zeros(3)


RECORDERS = {"tape": Tape, "torn": Torn, "silent": Silent}


def replay_with(make, patch):
    """Let every `TrainingStep` replay its steps with recorders that `make` returns; `patch` sets an attribute."""
    patch(step, "choose_graphs", lambda recipe, world, precision: (True, "as the test wants it"))
    patch(step, "CudaRecorder", make)


def synthetic(recipe, device, count=32, world=None):
    """Function: the batch of a step, of random images; with `world`, its process's share of `count` images."""
    generator = torch.Generator().manual_seed(0)
    size = recipe.model.img_size
    rank, processes = (world.rank, world.size) if world is not None else (0, 1)
    share = slice(rank * count // processes, (rank + 1) * count // processes)

    def make(number):
        labels = torch.randint(CLASSES, (2, count), generator=generator)
        tensors = (
            torch.randn(count, 3, size, size, generator=generator),
            *labels,
            torch.rand(count, generator=generator),
        )
        data = Batch(*(t[share].to(device) for t in (*tensors, torch.arange(count))))
        position = np.arange(count)[share]
        return TrainBatch(data, position, np.zeros(len(position), np.int32), [], [])

    return make


def build(recipe, joined, seed=0):
    """A step of the recipe with a fresh network, the same in every process; with kernels if the recipe names them."""
    torch.manual_seed(seed)
    precision = resolve(recipe, joined.device)
    named = recipe.model.kernels == "triton"
    kernels = choose_kernels(recipe.model, precision, CLASSES, joined) if named else TORCH
    model = build_network(recipe.model, CLASSES, kernels).to(joined.device).train()
    return TrainingStep(recipe, joined, precision, model, kernels, num_classes=CLASSES, steps_per_epoch=100)


def weights_of(training):
    """Copies of the weights and their average."""
    state = {**training.model.state_dict(), **{f"ema.{k}": v for k, v in training.ema.shadow.items()}}
    return {name: value.clone() for name, value in state.items()}


def in_two_processes(function, folder: Path, *arguments) -> list:
    """What `function(joined, *arguments)` returns in each of two gloo processes; it is a function of this module."""
    store = folder / uuid.uuid4().hex
    processes = [Forked(_work, function, rank, store, arguments) for rank in range(2)]
    for process in processes:
        process.finish()
    return [torch.load(f"{store}-{rank}.pt", weights_only=True) for rank in range(2)]


def _work(function, rank, store, arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        torch.save(function(World(rank, 2, 2, torch.device("cpu")), *arguments), f"{store}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def train_replaying(words):
    """What `torchrun --nproc_per_node=2 -m fastdeit.train WORDS` does, its steps replayed."""
    replay_with(lambda device: Tape(), setattr)
    run_module_twice("fastdeit.train", words)


def run_steps(joined, recipe, steps, recorders=None):
    """Take `steps` steps; the state at the end, losses, warnings, and what the recorders did.

    recorders  replay the steps with this recorder of `RECORDERS`, one name for each process
    """
    tapes, losses, warned = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        if recorders is not None:
            replay_with(lambda device: tapes.append(RECORDERS[recorders[joined.rank]]()) or tapes[-1], patch.setattr)
        training = build(recipe, joined)
        training.warn = warned.append
        training.distribute()
        make = synthetic(recipe, joined.device, world=joined)
        for number in range(steps):
            losses.append(float(training(make(number), 0, number, number).loss))
    counts = [(tape.ran, tape.recorded, tape.replayed, tape.discarded) for tape in tapes]
    return {"state": training.state(), "losses": losses, "warned": warned, "counts": counts}


def host_milliseconds(joined, recipe, recorder, count=32, steps=200):
    """CPU time of the main thread in the fastest of `steps` steps after the recording, on a machine that others use."""
    with pytest.MonkeyPatch.context() as patch:
        replay_with(RECORDERS[recorder], patch.setattr)
        training = build(recipe, joined)
        training.distribute()
        make = synthetic(recipe, joined.device, count, joined)
        batches, taken = [make(number) for number in range(2)], []
        for number in range(WARM_UP + 1 + steps):
            began = time.thread_time_ns()
            training(batches[number % 2], 0, number, number)
            taken.append((time.thread_time_ns() - began) / 1e6)
    return min(taken[WARM_UP + 1 :])


class Branched(nn.Module):
    """Convolutions, two dtypes, and a head that only some calls use."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(8, 5)
        self.narrow = nn.Linear(5, 4).bfloat16()
        self.extra = nn.Parameter(torch.ones(4))

    def forward(self, images, extra):
        out = self.narrow(self.linear(self.conv(images).mean((2, 3))).bfloat16()).float()
        return out * self.extra if extra else out


def sums_and_ddp(joined, passes):
    """Gradients of a network after `passes` backward passes: `SharedGradients` and DistributedDataParallel."""
    out = {}
    for kind in ("ours", "ddp"):
        torch.manual_seed(0)
        model = Branched()
        named = dict(model.named_parameters())
        called, shared = model, None
        if kind == "ddp":
            called = DistributedDataParallel(model, find_unused_parameters=True)
        else:
            shared = SharedGradients(named.items(), bucket_bytes=100)
        torch.manual_seed(1 + joined.rank)
        for number in range(passes):
            last = number == passes - 1
            images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
            if shared is not None:
                with shared.summing() if last else nullcontext():
                    (called(images, number == 0).square().mean() / 2).backward()
            else:
                with nullcontext() if last else called.no_sync():
                    called(images, number == 0).square().mean().backward()
        out[kind] = {name: parameter.grad for name, parameter in named.items()}
    return out


def sums_without_a_parameter(joined):
    """What `SharedGradients` says of a parameter that the loss does not depend on."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared = SharedGradients(model.named_parameters())
    try:
        with shared.summing():
            (model[0](torch.ones(1, 2)) @ model[1].weight).sum().backward()
    except RuntimeError as error:
        return str(error)


def sums_after_an_error(joined):
    """Gradients of two sums, the second after a backward pass that stopped in the middle."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    shared = SharedGradients(model.named_parameters(), bucket_bytes=8)
    out = []
    for fails in (False, True):
        if fails:
            model.zero_grad()
            middle = model[0](torch.ones(1, 2))
            middle.register_hook(lambda gradient: 1 / 0)
            with pytest.raises(ZeroDivisionError), shared.summing():
                model[1](middle).sum().backward()
        model.zero_grad()
        with shared.summing():
            model(torch.full((1, 2), 1.0 + joined.rank)).sum().backward()
        out.append([parameter.grad.clone() for parameter in model.parameters()])
    return out


def start_apart(joined, recipes):
    """Weights and average of a process before and after it joined the others; each has another seed."""
    training = build(recipes[joined.rank], joined, seed=joined.rank)
    states = {}
    for kind in ("before", "after"):
        if kind == "after":
            training.distribute()
        states[kind] = weights_of(training)
    return states


def kernels_on_two_cards(joined):
    """The choice of kernels on two processes with different cards; one check fails on process 1."""
    cfg, card = ModelConfig(img_size=16, patch_size=8, embed_dim=32, num_heads=2), f"card {joined.rank}"
    precision = Precision("fp32", None, joined.device)
    windows = {"ours": [2.0], "flash" if joined.main else "efficient": [1.0]}
    where = kernel_table.key(card, "attention", cfg, precision, CLASSES)
    row = kernel_table.Row(
        **dict(zip(("card", "op", "shape", "dtype"), where, strict=True)), choice=kernel_table.decide(windows),
        windows=windows, batch=1, date="", commit=None, torch="", triton="",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice, "_on_gpu", lambda device: True)
        patch.setattr(kernel_choice, "_card", lambda device: card)
        patch.setattr(kernel_table, "read", lambda: kernel_table.Table(1, {where: row}))
        fails = ("bias_gelu", 1)
        patch.setattr(
            kernel_checks, "failure", lambda op, *_: f"wrong on {card}" if (op, joined.rank) == fails else None
        )
        chosen = kernel_choice.choose_kernels(cfg, precision, CLASSES, joined)
    return {"name": chosen.name, **chosen.event()}


def worlds_agree(joined):
    """What `World.same` and `World.first` return for equal and different values."""
    texts = [(None, None), (None, "one"), ("zero", "one")]
    state = {"model": {"a": torch.arange(6.0).view(2, 3).t()}, "list": [torch.tensor(True), None, (3, "x")], 4: 5}
    return {
        "same": [joined.same(1e300), joined.same(joined.rank), joined.same(-1.5 * joined.rank)],
        "from_main": joined.from_main(("main", joined.rank)),
        "first": [joined.first(text[joined.rank]) for text in texts],
        "share": joined.share(state if joined.main else None),
    }


def copy_here(joined, recipe):
    """The paths that `copied_here` gives, and what it says."""
    said = []
    sets = copied_here(recipe, open_data_sets(recipe), joined, said.append)
    return {"paths": [str(sets.train.path), str(sets.val.path)], "said": said}


def rewind_when_one_diverges(joined):
    """What `DivergenceGuard` raises if process 1 has a bad loss in step 6, and what `Stop` says after each step."""
    guard, deciding = DivergenceGuard(RunConfig(on_divergence="rewind"), joined), Stop(joined, None)
    for number in range(1, 50):
        if joined.rank == 1 and number == 6:
            guard._bad = DivergedError("step 6 of process 1", 6)
        if deciding.due(number, diverged=guard.found) == "rewind":
            try:
                guard.raise_together()
            except DivergedError as error:
                return number, str(error), error.global_step
    return None


def stop_when_one_is_asked(joined, asked_at):
    """The step after which this process stops, if the second process gets a signal during step `asked_at`."""
    signals = StopSignals()
    deciding = Stop(joined, signals)
    for number in range(1, 50):
        if joined.rank == 1 and number == asked_at:
            signals.asked = signal.SIGTERM
        if deciding.due(number) == "stop":
            return number
    return None


def load_batches(joined, path, recipe):
    """The images of an epoch that `create_loader` gives this process."""
    with create_loader(path, recipe, batch_size=32, device="cpu", threads=1) as loader:
        return [images.clone() for images, _ in loader]
