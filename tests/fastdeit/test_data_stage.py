"""The device stage in the main path: the same run, wherever the images are made."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fastdeit.data import EvaluationData, TrainingData, open_dataset
from fastdeit.distributed import World


@pytest.fixture
def alone():
    """This process alone, on the GPU, or on the CPU, where Triton's interpreter runs the kernels."""
    return World(0, 1, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


@pytest.fixture
def opened(tiny, alone):
    """Function: training or evaluation data of a recipe, closed at the end."""
    there = []

    def open_one(kind, *arguments, stage, loader="torch", dtype=torch.float32, layout="nchw", **sections):
        sections = {"model": {"img_size": 16}, "run": {"global_batch": 16, "eval_batch": 16}, **sections}
        recipe = tiny(data={"stage": stage, "loader": loader}, **sections)
        dataset = open_dataset(recipe.data.train if kind is TrainingData else recipe.data.val, "data")
        there.append(kind(recipe, dataset, alone, dtype, layout, *arguments))
        return there[-1]

    yield open_one
    for data in there:
        data.close()


def assert_same(ours, theirs):
    for field in dataclasses.fields(theirs):
        a, b = (getattr(batch, field.name).cpu() for batch in (ours, theirs))
        assert a.dtype == b.dtype, field.name
        assert torch.equal(a, b), field.name


def taken(data, *start, count=2):
    with data.batches(*start) as batches:
        return list(itertools.islice(batches, count))


@pytest.mark.parametrize("start", [(0, 0), (1, 7)], ids=["from the start", "in the middle"])
def test_training_batches_are_the_same_to_the_bit(opened, start):
    ours, theirs = (taken(opened(TrainingData, stage=stage), *start) for stage in ("device", "host"))
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a.data, b.data)
        assert torch.equal(a.data.targets(4, 0.1).cpu(), b.data.targets(4, 0.1).cpu())
        np.testing.assert_array_equal(a.position, b.position)
    assert len({float(lam) for batch in ours for lam in batch.data.lam}) > 2


def test_evaluation_batches_are_the_same_to_the_bit(opened):
    ours, theirs = (taken(opened(EvaluationData, stage=stage), count=9) for stage in ("device", "host"))
    assert [len(batch.index) for batch in ours] == [16, 16, 12]
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)
