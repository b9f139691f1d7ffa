"""Each departure of the released code is one named choice that reaches the code it is about."""

import pytest
import torch

from fastdeit.data import EvaluationData, TrainingData
from fastdeit.distributed import World
from fastdeit.inputs import open_dataset
from fastdeit.precision import resolve
from fastdeit.recipes import deit_tiny
from fastdeit.sections import COMPAT, COMPAT_RUN, Departures
from fastdeit.training.evaluation import headline
from fastdeit.training.objective import build_objective
from refusals import refused
from runs import changed

ALONE = World(0, 1, 1, torch.device("cpu"))
SECOND = World(1, 2, 2, torch.device("cpu"))


@pytest.fixture
def released(tiny):
    """Function: the tiny recipe with one departure as released, the others as in the paper."""

    def make(name, **sections):
        recipe = tiny(deit_tiny, **sections)
        if name in COMPAT_RUN["released"]:
            return changed(recipe, run={name: COMPAT_RUN["released"][name]})
        return changed(recipe, departures={name: getattr(COMPAT["released"], name)})

    return make


def training(recipe, world=ALONE):
    data = TrainingData(recipe, open_dataset(recipe.data.train), world)
    data.close()
    return data


def test_single_process_repeats(released):
    recipe = released("single_process_repeats")
    assert training(recipe).repeats == 1
    assert training(recipe, SECOND).repeats == 3


def test_mix_group_is_a_process_batch(released):
    recipe = released("mix_group")
    assert training(recipe).order.group_size == 32
    assert training(recipe, SECOND).order.group_size == 16


def test_placement(released):
    # 32 samples in groups of 8: four groups, all of them one cell when copies are spread.
    recipe = released("placement", data={"cell_groups": 2})
    assert training(recipe).order.cell == 4
    assert training(changed(recipe, departures=Departures(mix_group=8)).resolved()).order.cell == 2


def test_epoch_multiple_and_order_seed(released):
    # 160 images are no whole 256, so the released code would train on none of them.
    refused("fewer than a global batch", training, released("epoch_multiple"))
    first = training(released("order_seed", run={"seed": 0})).order.permutation(1)
    other = training(released("order_seed", run={"seed": 5})).order.permutation(1)
    assert first.tolist() == other.tolist() == torch.randperm(160, generator=torch.Generator().manual_seed(1)).tolist()


def test_cutmix_box(released):
    assert training(released("cutmix_box")).drawer.cutmix_box == "floor"
    assert training(released("placement")).drawer.cutmix_box == "full"


def test_eval_sharding(released):
    recipe = released("eval_sharding")
    val = open_dataset(recipe.data.val)
    counts = []
    partition = changed(recipe, run={"eval_sharding": None}).resolved()
    for r in (recipe, partition):
        data = EvaluationData(r, val, SECOND)
        counts.append(sum(len(data.order.step(0, s).index) for s in range(data.order.steps)))
        data.close()
    assert counts == [44, 22]


def test_soft_reduction(released):
    paper, as_released = (
        build_objective(r.objective, False, r.departures).reduction
        for r in (released("placement"), released("soft_reduction"))
    )
    assert (paper, as_released) == ("batchmean", "elements")


def test_late_fusion_names_the_headline():
    scores = {"class": {"top1": 1.0}, "fused_probabilities": {"top1": 2.0}, "fused_logits": {"top1": 3.0}}
    assert headline(scores, COMPAT["paper"].late_fusion) == 2.0
    assert headline(scores, COMPAT["released"].late_fusion) == 3.0
    assert headline({"class": {"top1": 1.0}}, "probabilities") == 1.0


def test_precision_on_a_gpu(released, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    gpu = torch.device("cuda", 0)
    assert resolve(released("placement"), gpu).name == "bf16"
    assert resolve(released("amp_dtype"), gpu).name == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert resolve(released("placement"), gpu).name == "fp16"
    assert resolve(released("amp_dtype"), torch.device("cpu")).name == "fp32"
