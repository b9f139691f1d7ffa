"""The device stage in the main path: the same run, wherever the images are made."""

import gc
import itertools
import re
import shutil
import time
import weakref

import numpy as np
import pytest
import torch

import runs
from fastdeit import checkpoint, stage_choice
from fastdeit.data import EvaluationData, TrainingData
from fastdeit.distributed import World
from fastdeit.inputs import open_dataset
from fastdeit.kernels.reference import as_patches
from fastdeit.model.fused import fuse
from fastdeit.model.networks import build_network
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import Precision
from fastdeit.recipes import convnet_teacher
from fastdeit.stage_choice import choose_stage, image_dtype
from fastdeit.training.trainer import Trainer
from operators import assert_same_batch, never_waiting
from ordered import need_loader


@pytest.fixture
def alone():
    """This process alone, on the GPU, or on the CPU, where Triton's interpreter runs the kernels."""
    return World(0, 1, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


@pytest.fixture
def few(images, tmp_path):
    """Two small data sets of 8 images, `train` and `val`."""
    for split in ("train", "val"):
        for folder in (images / split).iterdir():
            to = tmp_path / split / folder.name
            to.mkdir(parents=True)
            for file in sorted(folder.iterdir())[:2]:
                shutil.copy(file, to)
        convert(str(tmp_path / split), tmp_path / f"{split}.beton", progress=False)
    return tmp_path


@pytest.fixture
def opened(tiny, alone):
    """Function: training or evaluation data of a recipe, closed at the end."""
    there = []

    def open_one(
        kind, *arguments, stage, loader="torch", dtype=torch.float32, layout="nchw", path=None, world=alone, **sections
    ):
        sections = {"model": {"img_size": 16}, "run": {"global_batch": 8, "eval_batch": 5}, **sections}
        recipe = tiny(data={"stage": stage, "loader": loader}, departures={"mix_group": 4}, **sections)
        dataset = open_dataset(path or recipe.data.train)
        there.append(kind(recipe, dataset, world, dtype, layout, *arguments))
        return there[-1]

    yield open_one
    for data in there:
        data.close()


def taken(data, *start, count=2):
    with data.batches(*start) as batches:
        return list(itertools.islice(batches, count))


@pytest.mark.slow
@pytest.mark.parametrize("start", [(0, 0), (1, 7)], ids=["from the start", "in the middle"])
def test_training_batches_are_the_same_to_the_bit(opened, start):
    ours, theirs = (taken(opened(TrainingData, stage=stage), *start) for stage in ("device", "host"))
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert_same_batch(a.data, b.data)
        assert torch.equal(a.data.targets(4, 0.1).cpu(), b.data.targets(4, 0.1).cpu())
        np.testing.assert_array_equal(a.position, b.position)
    assert len({float(lam) for batch in ours for lam in batch.data.lam}) > 2


@pytest.mark.slow
def test_evaluation_batches_are_the_same_to_the_bit(opened, few):
    path = few / "val.beton"
    ours, theirs = (taken(opened(EvaluationData, stage=stage, path=path)) for stage in ("device", "host"))
    assert [len(batch.index) for batch in ours] == [5, 3]
    for a, b in zip(ours, theirs, strict=True):
        assert_same_batch(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TrainingData, EvaluationData])
def test_a_batch_is_not_kept_while_the_next_is_made(opened, kind):
    data = opened(kind, stage="host")
    items = data._produce(0, 0) if kind is TrainingData else data._produce()
    item = next(items)
    images = weakref.ref((item.data if kind is TrainingData else item).images)
    del item
    assert images() is None
    items.close()


@pytest.mark.slow
def test_patches_are_the_same_from_both_stages(opened):
    stages = [taken(opened(TrainingData, stage=stage, layout="patches"), count=1) for stage in ("device", "host")]
    images = taken(opened(TrainingData, stage="host"), count=1)[0].data.images.cpu()
    assert_same_batch(stages[0][0].data, stages[1][0].data)
    expected = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
    assert torch.equal(stages[0][0].data.images.cpu(), expected)


@pytest.mark.slow
def test_a_run_is_the_same_run_on_either_stage(tiny, few, alone, launch, events):
    """From its start on each stage, by the command too, and resumed in the middle of an epoch on the other one."""

    def recipe(name, stage, **run):
        return tiny(
            model={"img_size": 16},
            data={"train": few / "train.beton", "val": few / "val.beton", "stage": stage},
            run={"global_batch": 4, "eval_batch": 4, "checkpoint_every": 1, "keep_checkpoints": 9, "eval_every": 2}
            | {"device": "auto", "precision": "fp32", "compile": "off", "output": few / name, **run},
            ema={"enabled": False},
            departures={"mix_group": 4},
        )

    process = launch(recipe("device", "device"))
    assert "augmentation on the device: as requested" in process.out
    Trainer(recipe("host", "host"), alone).run()
    assert [events(few / name, "start")[0]["stage"] for name in ("device", "host")] == ["device", "host"]
    resumed = recipe("resumed", "device", resume=checkpoint.step_path(few / "host" / "checkpoints", 3))
    Trainer(resumed, alone).run()

    exact = {"rel": 1e-3 if alone.device.type == "cuda" else 0}
    there = {name: events(few / name) for name in ("device", "host", "resumed")}
    losses = {name: [e["loss"] for e in found if e["event"] == "train"] for name, found in there.items()}
    assert len(losses["host"]) == 4
    assert losses["device"] == pytest.approx(losses["host"], **exact)
    assert losses["resumed"] == pytest.approx(losses["host"][3:], **exact)
    scores = {name: [e["class"]["loss"] for e in found if e["event"] == "eval"] for name, found in there.items()}
    assert scores["device"] == pytest.approx(scores["host"], **exact)
    assert scores["resumed"] == pytest.approx(scores["host"], **exact)


def test_auto_on_a_cpu_is_the_host(tiny):
    with runs.opened(TrainingData, tiny(data={"stage": "auto"})) as data:
        assert (data.stage.name, data.stage.reason) == ("host", "there is no GPU")


def test_the_device_stage_needs_a_device(tiny, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    needs = pytest.raises(UserError, match=r"data\.stage device needs a GPU.*--data\.stage host")
    with needs, runs.opened(TrainingData, tiny(data={"stage": "device"})):
        pass


class Fake:
    """A stage that takes so many seconds; an exception is raised at its first batch."""

    def __init__(self, seconds, error=None):
        self.seconds, self.error, self.made = seconds, error, 0

    def __call__(self, decoded, plan):
        self.made += 1
        if self.error is not None:
            raise self.error
        time.sleep(self.seconds)


def choose(**stages):
    openers = {name: lambda stage=stage: stage for name, stage in stages.items()}
    return choose_stage(openers, (None, range(100)), torch.device("cpu"))


def test_auto_keeps_the_faster_stage_and_says_why():
    slow, fast = Fake(0.05), Fake(0.01)
    name, reason, stage = choose(device=slow, host=fast)
    assert (name, stage) == ("host", fast)
    assert slow.made == fast.made == 1 + stage_choice.ROUNDS
    found = re.fullmatch(r"samples/s measured: device ([\d,]+), host ([\d,]+)", reason)
    device, host = (float(rate.replace(",", "")) for rate in found.groups())
    assert 1000 < device <= 2000 < host <= 10_000
    assert choose(device=Fake(0.01), host=Fake(0.05))[0] == "device"


def test_auto_goes_on_with_the_stage_that_works():
    name, reason, _ = choose(device=Fake(0, RuntimeError("no compiler")), host=Fake(0.01))
    assert name == "host"
    assert reason.endswith("; not device: no compiler")
    assert choose(device=Fake(0, RuntimeError("ptxas failed\nline 1")), host=Fake(0))[1].endswith(
        "; not device: ptxas failed"
    )
    with pytest.raises(RuntimeError, match="no compiler"):
        choose(device=Fake(0, RuntimeError("no compiler")), host=Fake(0, ValueError("a bad plan")))


def test_auto_lets_go_of_the_stage_that_fails():
    memory = []

    class Full(Fake):
        def __call__(self, decoded, plan):
            image = np.zeros(3)
            memory.append(weakref.ref(image))
            raise torch.OutOfMemoryError("no room")

    gc.disable()
    try:
        assert choose(device=Full(0), host=Fake(0))[0] == "host"
        assert [image() for image in memory] == [None]
    finally:
        gc.enable()


def test_a_patch_embedding_rounds_images_as_autocast_does(tiny, alone):
    """What `image_dtype` relies on: loss and gradients are the same bits, whoever rounds."""
    model = build_network(tiny().model, 4).to(alone.device)
    images = torch.randn(8, 3, 32, 32, device=alone.device)
    for dtype in (torch.bfloat16, torch.float16):
        found = []
        for given in (images, images.to(dtype)):
            model.zero_grad()
            with torch.autocast(alone.device.type, dtype=dtype), torch.backends.cudnn.flags(True, deterministic=True):
                out = model(given)
                # Alone, since not all of PyTorch's backward passes on a GPU repeat themselves.
                model.patch_embed(given).float().square().sum().backward()
            found.append((out.cls, out.dist, *(p.grad.clone() for p in model.patch_embed.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_a_fused_deit_computes_the_same_of_images_and_patches(tiny, alone):
    """So labels that were stored, with which images come in patches, give the run that the teacher itself gives."""
    model = build_network(tiny().model, 4).to(alone.device)
    fuse(model)
    images = torch.randn(2, 3, 32, 32, device=alone.device)
    found = []
    for given in (images, as_patches(images, 8)):
        model.zero_grad()
        out = model(given)
        (out.cls.logsumexp(1).sum() + out.dist.square().sum()).backward()
        found.append((out.cls, out.dist, *(p.grad.clone() for p in model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*(one[:2] for one in found), strict=True))
    bound = 0.0 if alone.device.type == "cpu" else 1e-5  # sums of a GPU may have another order each time
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def test_images_are_rounded_only_where_nothing_else_reads_them(tiny):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    bf16 = Precision("bf16", torch.bfloat16, gpu)
    assert image_dtype(tiny(), bf16, teacher=False) is torch.bfloat16
    assert image_dtype(tiny(), Precision("fp16", torch.float16, gpu), teacher=False) is torch.float16
    assert image_dtype(tiny(), Precision("fp32", None, gpu), teacher=False) is torch.float32
    assert image_dtype(tiny(), bf16, teacher=True) is torch.float32
    assert image_dtype(tiny(convnet_teacher), bf16, teacher=False) is torch.float32
    assert image_dtype(tiny(), Precision("bf16", torch.bfloat16, cpu), teacher=False) is torch.float32


@pytest.mark.parametrize("loader", ["torch", "turbo", "ffcv", "dali"])
@pytest.mark.parametrize("batch", [48, 32])
def test_an_image_is_decoded_once_for_its_copies(opened, loader, batch):
    """Counted where every decoder gets its bytes. A batch of 32 leaves copies of its last image to the next."""
    need_loader(loader)
    data = opened(TrainingData, stage="host", loader=loader, run={"global_batch": batch, "eval_batch": 16})
    reads, read = [], data.loader.dataset.read
    data.loader.dataset.read = lambda index: reads.append(index) or read(index)
    with data.batches(1) as batches:
        samples = [index for one in batches for index in one.data.index.tolist()]
    assert len(samples) == data.steps * batch
    assert sorted(reads) == sorted(set(samples))
    assert data.loader.decoded == len(reads)
    if batch == 48:
        assert 3 * len(reads) == len(samples)


@pytest.mark.gpu
def test_auto_on_a_gpu_times_both(opened):
    data = opened(TrainingData, stage="auto")
    assert data.stage.name in ("device", "host")
    assert re.fullmatch(r"samples/s measured: device [\d,]+, host [\d,]+", data.stage.reason)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["device", "host"])
def test_in_the_steady_state_nothing_waits_for_the_gpu(opened, stage):
    data = opened(TrainingData, stage=stage)
    total = torch.zeros((), device="cuda")
    with data.batches() as batches:
        for _ in range(6):
            total += next(batches).data.images.sum()
        with never_waiting():
            for _ in range(12):
                total += next(batches).data.images.sum()
    assert total.isfinite()
    if stage == "device":
        assert data.stage._stage.passed_on == 0  # pixels are decoded into pinned memory


class Late:
    """A stage on a GPU that is late: what does not wait for its batches reads what was there before."""

    def __init__(self, stage):
        self.stage = stage

    def __call__(self, decoded, plan):
        torch.cuda._sleep(20_000_000)
        return self.stage(decoded, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["device", "host"])
@pytest.mark.parametrize("late", ["making", "using"])
def test_batches_are_whole_whichever_stream_is_late(opened, stage, late):
    data = opened(TrainingData, stage=stage)
    if late == "making":
        data.stage._stage = Late(data.stage._stage)
    found = []
    with data.batches() as batches:
        for batch in itertools.islice(batches, 12):
            if late == "using":
                torch.cuda._sleep(20_000_000)
            found.append([tensor.clone() for tensor in batch.data.tensors()])
            del batch
    with opened(TrainingData, stage="host", world=World(0, 1, 1, torch.device("cpu"))).batches() as batches:
        for ours, theirs in zip(found, batches, strict=False):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs.data.tensors(), strict=True))


@pytest.mark.gpu
def test_memory_stays_what_it_was(opened):
    data = opened(TrainingData, stage="device", run={"global_batch": 8, "eval_batch": 5, "epochs": 12})
    total = torch.zeros((), device="cuda")
    with data.batches() as batches:
        for step in range(220):
            total += next(batches).data.images.sum()
            if step == 20:
                reserved, growths = torch.cuda.memory_reserved(), data.stage._stage.growths
    assert torch.cuda.memory_reserved() <= reserved + (8 << 20)
    assert data.stage._stage.growths <= growths + 12  # ever larger batches, ever more rarely
