"""A batch that does not fit into memory ends in a sentence with a remedy."""

import re

import pytest
import torch

from fastdeit.memory import enough_for, enough_memory, enough_to_train, moved
from fastdeit.model.deit import DeiT
from fastdeit.pipelines.machine import MachineError
from fastdeit.recipes import RECIPES
from runs import changed, train

CPU = torch.device("cpu")


def fill_memory(*_):
    return torch.empty(1 << 62, dtype=torch.uint8)  # PyTorch's own error, whatever the machine has


def test_what_pytorch_says_of_this_machine_is_recognised():
    with pytest.raises(MachineError) as told, enough_memory("sorting", "sort less", CPU):
        fill_memory()
    assert str(told.value) == "sorting: the machine's memory is full: sort less"


@pytest.mark.parametrize(
    "said",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_every_library_of_a_gpu_is_understood(monkeypatch, said):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 << 30)
    sentence = "evaluating: GPU 1 is full, 70.0 GiB of its 80.0 are this process's and other programs 8.0: less"
    with (
        pytest.raises(MachineError, match=re.escape(sentence)),
        enough_memory("evaluating", "less", torch.device("cuda:1")),
    ):
        raise said


def test_a_network_that_finds_no_room(monkeypatch):
    network = torch.nn.Linear(2, 2)
    assert moved(network, CPU) is network
    monkeypatch.setattr(network, "to", fill_memory)
    with pytest.raises(MachineError, match="moving the network's weights: the machine's memory is full: end the other"):
        moved(network, CPU)


def test_other_errors_pass():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as told, enough_for("evaluating", torch.zeros(2, 3, 8, 8), "--batch", CPU):
        raise error
    assert told.value is error


@pytest.mark.parametrize(
    ("run", "model", "processes", "remedy"),
    [
        ({}, {}, 1, "training with 1024 images of 224 x 224 at once: .*: set --run.micro_batch 512 or less"),
        ({}, {}, 8, "training with 128 images .*: set --run.micro_batch 64 or less"),
        ({"micro_batch": 96}, {}, 8, "training with 96 images .*: set --run.micro_batch 48 or less"),
        ({"micro_batch": 1024}, {}, 8, "training with 128 images .*: set --run.micro_batch 64 or less"),
        ({"micro_batch": 192}, {"drop_path_mode": "skip"}, 1, "with 192 images .*: set --run.micro_batch 64 or less"),
        (
            {"micro_batch": 64},
            {"drop_path_mode": "skip"},
            1,
            "with 64 images .*: take a smaller model or smaller images",
        ),
        ({"micro_batch": 1}, {}, 1, "with 1 images .*: take a smaller model or smaller images"),
    ],
)
def test_the_remedy_is_a_batch_that_the_recipe_allows(run, model, processes, remedy):
    recipe = changed(RECIPES["deit_base"](), run=run, model=model).resolved()
    with pytest.raises(MachineError, match=remedy) as told, enough_to_train(recipe, processes, CPU):
        fill_memory()
    named = re.search(r"--run.micro_batch (\d+)", str(told.value))
    if named:
        changed(recipe, run={"micro_batch": int(named[1])}).resolved()


@pytest.mark.parametrize(
    ("training", "sentence"),
    [
        (
            True,
            "training with 8 images of 32 x 32 at once: the machine's memory is full: set --run.micro_batch 4 or less",
        ),
        (False, "evaluating 6 images of 32 x 32 at once: the machine's memory is full: set --run.eval_batch 3 or less"),
    ],
)
def test_a_run_says_which_batch_was_too_large(tiny, monkeypatch, training, sentence):
    forward = DeiT.forward

    def full(self, images):
        return fill_memory() if self.training is training else forward(self, images)

    monkeypatch.setattr(DeiT, "forward", full)
    with pytest.raises(MachineError, match=re.escape(sentence)):
        train(tiny(run={"global_batch": 8, "eval_batch": 6, "epochs": 1}))


@pytest.mark.gpu
def test_a_gpu_that_is_full():
    device = torch.device("cuda", 0)
    images = torch.zeros(4, 3, 8, 8, device=device)
    sentence = r"GPU 0 is full, \d+\.\d GiB of its \d+\.\d are this process's"
    with pytest.raises(MachineError, match=sentence), enough_for("evaluating", images, "--batch", device):
        torch.empty(1 << 45, dtype=torch.uint8, device=device)
