"""The parts of a run, and the plans that are drawn for them."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastdeit.pipelines.plan.curriculum import Curriculum
from fastdeit.pipelines.plan.draw import PlanDrawer
from fastdeit.pipelines.plan.order import EpochOrder
from fastdeit.pipelines.plan.policy import Policy
from refusals import refused

TEN = (96, 96, 160, 160, 160, 160, 192, 192, 224, 224)


def test_the_parts_are_those_of_efficient_train():
    """Its script trains part i for 200 * (224 / side)^2 / 10 epochs: 108.9, 39.2, 27.2 and 20."""
    parts = Curriculum(469, 224, TEN)
    lengths = np.diff(parts.starts)
    for length, expected in zip(lengths, [108.9] * 2 + [39.2] * 4 + [27.2] * 2 + [20] * 2, strict=True):
        assert abs(length - expected) <= 1
    assert sum(lengths) == 469
    assert sum(parts.work(epoch) for epoch in range(469)) == pytest.approx(200, rel=0.002)
    assert [parts.size(epoch) for epoch in (0, 217, 218, 374, 375, 428, 429, 468, 1000)] == [
        96, 96, 160, 160, 192, 192, 224, 224, 224,
    ]  # fmt: skip


def test_computation_elapses_evenly():
    parts = Curriculum(469, 224, TEN)
    assert [parts.elapsed(start) for start in parts.starts] == pytest.approx([46.9 * part for part in range(11)])
    assert parts.elapsed(54.5) == pytest.approx(46.9 / 2)
    times = [parts.elapsed(step / 7) for step in range(7 * 469)]
    assert times == sorted(times)
    assert Curriculum(300, 224).elapsed(17.25) == 17.25


def drawer(policy, parts=None, img_size=64):
    sizes = np.full(64, 75, np.int32), np.full(64, 90, np.int32)
    return PlanDrawer(policy, 3, *sizes, img_size=img_size, curriculum=parts)


def test_the_sentence_keeps_the_order_of_the_parts():
    sentence = Curriculum(60, 32, (24, 24, 16, 32, 16, 32)).sentence()
    assert "images of 24 pixels in 16 epochs, 16 pixels in 17 epochs, 32 pixels in 5 epochs, 16 pixels in" in sentence


@pytest.mark.parametrize("policy", ["randaugment", "three_augment"])
def test_an_epochs_plan_is_that_of_a_run_with_its_size_and_magnitude(policy):
    sizes, magnitudes = (32, 48, 64), (0, 4.5, 9)
    parts = Curriculum(8, 64, sizes, magnitudes)
    assert parts.starts == [0, 5, 7, 8]
    ours = drawer(Policy(policy=policy), parts)
    order = EpochOrder(64, global_batch=32, group_size=16, seed=3, repeats=2)
    for epoch, part in enumerate([0, 0, 0, 0, 0, 1, 1, 2]):
        single = Policy(policy=policy, randaugment=f"rand-m{magnitudes[part]}-mstd0.5-inc1")
        expected = drawer(single, img_size=sizes[part]).draw(order.step(epoch, 1))
        plan = ours.draw(order.step(epoch, 1))
        assert plan.img_size == sizes[part]
        for name, value in vars(expected).items():
            assert_array_equal(getattr(plan, name), value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((300, 224, (96, 224), (1, 2, 3)), "curriculum.sizes has 2 parts, but curriculum.magnitudes has 3"),
        ((300, 384, (96, 224)), "curriculum.sizes end with 224, but model.img_size is 384"),
        ((300, 224, (), (9,) * 101), "the curriculum has 101 parts: it may have at most 100"),
        ((300, 0), "model.img_size is 0 and run.epochs 300: both must be at least 1"),
        ((300, 224, (0, 224)), "each must be from 1 to model.img_size, 224"),
        ((300, 224, (256, 224)), "each must be from 1 to model.img_size, 224"),
        ((300, 224, (), (9, 11)), "each must be from 0 to 10"),
        ((11, 224, TEN), "too short for the 10 parts of the curriculum: set --run.epochs 18 or more"),
        ((300, 10**4, (1, 10**4)), "too short for the 2 parts of the curriculum: leave curriculum.sizes"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, reason):
    refused(reason, Curriculum, *arguments)
