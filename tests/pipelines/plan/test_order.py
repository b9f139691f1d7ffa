"""The order of an epoch: partition, repeats, locality, random access, and the released sampler as judge."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.plan.order import EpochOrder, EvalOrder


def every_rank(length, world, epoch, step, **kwargs):
    return [EpochOrder(length, rank=r, world=world, **kwargs).step(epoch, step) for r in range(world)]


def joined(parts, name):
    return np.concatenate([getattr(p, name) for p in parts])


@pytest.mark.parametrize("placement", ["local", "spread"])
@pytest.mark.parametrize("world", [2, 4, 16])
def test_world_size_changes_nothing(world, placement):
    kwargs = {"global_batch": 1024, "seed": 3, "placement": placement}
    for epoch, step in itertools.product((0, 5), (0, 3)):
        one = EpochOrder(5000, **kwargs).step(epoch, step)
        many = every_rank(5000, world, epoch, step, **kwargs)
        for name in ("index", "repeat", "position"):
            np.testing.assert_array_equal(joined(many, name), getattr(one, name))
        groups = np.concatenate([p.group + p.first_group for p in many])
        np.testing.assert_array_equal(groups, one.group)


@pytest.mark.parametrize("placement", ["local", "spread"])
@pytest.mark.parametrize(("length", "batch", "repeats"), [(1000, 192, 3), (997, 64, 1), (640, 128, 2)])
def test_epoch_holds_each_selected_copy_once(length, batch, repeats, placement):
    order = EpochOrder(length, global_batch=batch, repeats=repeats, placement=placement)
    seen = set()
    for step in range(order.steps):
        s = order.step(1, step)
        seen.update(zip(s.index.tolist(), s.repeat.tolist(), strict=True))
    total = order.steps * batch
    assert order.steps == length // batch
    assert len(seen) == total  # none doubled
    images = {index for index, _ in seen}
    assert len(images) == math.ceil(total / repeats)
    complete = [i for i in images if all((i, r) in seen for r in range(repeats))]
    assert len(complete) >= total // repeats  # only the last image of the epoch may lack copies


def test_epochs_differ_and_repeat_exactly():
    order = EpochOrder(500, global_batch=64, seed=1)
    first, second = order.permutation(0), order.permutation(1)
    assert sorted(first) == sorted(second) == list(range(500))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, EpochOrder(500, global_batch=64, seed=1).permutation(0))
    assert not np.array_equal(first, EpochOrder(500, global_batch=64, seed=2).permutation(0))


def test_permutation_is_unbiased():
    # Position of image 0 over many epochs: uniform.
    order = EpochOrder(16, global_batch=16)
    counts = np.zeros(16)
    for epoch in range(3200):
        counts[np.flatnonzero(order.permutation(epoch) == 0)[0]] += 1
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert chi2 < 37.7  # 0.999 quantile at 15 degrees of freedom


def test_local_copies_share_a_cell_in_different_groups():
    order = EpochOrder(4000, global_batch=1024, placement="local", cell_groups=4)
    s = order.step(0, 0)
    for image in np.unique(s.index):
        groups = s.group[s.index == image]
        if len(groups) == 3 and len(set(groups // 4)) == 1:
            assert len(set(groups)) == 3
    cells_of = [len(set(s.group[s.index == i] // 4)) for i in np.unique(s.index)]
    # At most one image straddles each boundary between the four cells.
    assert sum(c > 1 for c in cells_of) <= 3


def test_released_order_is_the_released_sampler():
    """Written from deit's samplers.py: randperm by epoch, each index three times, every world-th entry."""
    length, world, batch = 3000, 4, 32
    released = {"group_size": 0, "placement": "spread", "order_seed": "epoch", "epoch_multiple": 256}
    for rank, epoch in itertools.product(range(world), (0, 7)):
        generator = torch.Generator().manual_seed(epoch)
        flat = torch.randperm(length, generator=generator).repeat_interleave(3)
        mine = flat[rank::world][: length // 256 * 256 // world]
        order = EpochOrder(length, global_batch=batch * world, rank=rank, world=world, **released)
        assert order.steps == len(mine) // batch
        for step in range(order.steps):
            expected = mine[step * batch : (step + 1) * batch].numpy()
            np.testing.assert_array_equal(order.step(epoch, step).index, expected)


def test_imagenet_steps():
    assert EpochOrder(1281167, global_batch=1024).steps == 1251
    assert EpochOrder(1281167, global_batch=1024, epoch_multiple=256).steps == 1251


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_batch": 100, "world": 3}, "not a multiple of the 3 processes"),
        ({"global_batch": 192, "world": 2}, "whole mixing groups of 64"),
        ({"global_batch": 4096}, "fewer than a global batch"),
        ({"global_batch": 64, "rank": 1}, "not in a world of 1"),
        ({"global_batch": 64, "repeats": 0}, "repeats is 0"),
    ],
)
def test_what_cannot_be_divided_is_named(kwargs, message):
    with pytest.raises((UserError, ValueError), match=message):
        EpochOrder(1000, **kwargs)


def test_step_outside_the_epoch():
    order = EpochOrder(1000, global_batch=64)
    with pytest.raises(IndexError):
        order.step(0, order.steps)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(world):
    seen = []
    for rank in range(world):
        order = EvalOrder(101, batch=8, rank=rank, world=world)
        for step in range(order.steps):
            seen.extend(order.step(0, step).index)
    assert sorted(seen) == list(range(101))
    copy = EvalOrder(101, batch=8, rank=0, world=world, replicate=True)
    assert sum(len(copy.step(0, s).index) for s in range(copy.steps)) == 101
