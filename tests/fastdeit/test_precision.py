"""What a precision means to the process."""

import dataclasses

import pytest
import torch

from fastdeit import setup
from fastdeit.distributed import world
from fastdeit.precision import Precision, allow_tf32
from fastdeit.recipes import deit_tiny
from fastdeit.teacher.labelling import label_run
from fastdeit.training.trainer import Trainer
from refusals import refused
from runs import changed, evaluated


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_float32_that_was_asked_for_is_never_cut_to_tf32(dtype):
    """Neither in a product nor in a convolution, whose TF32 is on by default."""
    torch.backends.cudnn.allow_tf32 = True
    allow_tf32(Precision("any", dtype, torch.device("cuda", 0)))
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (dtype is not None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_residual_stream_in_bf16_needs_bf16(precision, tiny):
    recipe = tiny(deit_tiny, model={"residual_dtype": "bfloat16"}, run={"precision": precision})
    with world("cpu") as joined:
        if precision == "bf16":
            Trainer(recipe, joined).close()
            return
        refused(r"needs run\.precision bf16, but this run's precision is fp32", Trainer, recipe, joined)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("command", ["train", "eval", "label"])
def test_every_command_sets_float32_alike(command, precision, tiny, taught, teacher_checkpoint, tmp_path, monkeypatch):
    """As `test_float32_that_was_asked_for_is_never_cut_to_tf32` has it, though the run itself is on the CPU."""
    monkeypatch.setattr(setup, "allow_tf32", lambda p: allow_tf32(dataclasses.replace(p, device=torch.device("cuda"))))
    torch.backends.cudnn.allow_tf32 = precision == "fp32"
    if command == "eval":
        evaluated(checkpoint=teacher_checkpoint, val=tiny().data.val, precision=precision, device="cpu", loader="torch")
    else:
        recipe = tiny(run={"precision": precision, "epochs": 1})
        if command == "label":
            recipe = changed(changed(recipe, **taught), teacher={"labels": tmp_path / "labels"})
        with world("cpu") as joined:
            if command == "label":
                label_run(recipe, joined, first_epoch=0, end_epoch=1, topk=0)
            else:
                Trainer(recipe, joined).close()
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision != "fp32")
