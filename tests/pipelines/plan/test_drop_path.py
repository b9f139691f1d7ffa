"""Draws of stochastic depth: rates, uniform choice, and the same result for any processes and batches."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from timm.layers import calculate_drop_path_rates

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.plan.drop_path import draw_drop_path, draw_fixed_drop_path, drop_path_rates, dropped_samples
from refusals import refused


def test_drop_path_follows_timms_rates():
    count, depth, rate = 20_000, 6, 0.4
    masks = draw_drop_path(7, 3, np.arange(count), drop_path_rates(depth, rate))
    assert masks.shape == (depth, 2, count)
    assert masks.dtype == np.float32
    for layer, expected in enumerate(calculate_drop_path_rates(rate, depth)):
        for branch in range(2):
            dropped = masks[layer, branch] == 0
            assert abs(dropped.mean() - expected) < 4 * (expected * (1 - expected) / count) ** 0.5 + 1e-9
            np.testing.assert_allclose(masks[layer, branch][~dropped], 1 / (1 - expected), rtol=1e-6)
    # No block, branch, step or seed repeats another's draws.
    kept = masks[1:].reshape(-1, count) > 0
    correlation = np.corrcoef(kept)
    assert np.abs(correlation - np.eye(len(kept))).max() < 0.04
    for seed, step in ((7, 4), (8, 3)):
        other = draw_drop_path(seed, step, np.arange(count), drop_path_rates(depth, rate))
        assert abs(np.corrcoef(masks[-1, 0], other[-1, 0])[0, 1]) < 0.04


def test_drop_path_knows_neither_process_nor_batch():
    whole = draw_drop_path(1, 10, np.arange(64), drop_path_rates(4, 0.3))
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(draw_drop_path(1, 10, order, drop_path_rates(4, 0.3)), whole[..., order])
    np.testing.assert_array_equal(draw_drop_path(1, 10, np.arange(32, 64), drop_path_rates(4, 0.3)), whole[..., 32:])
    assert draw_drop_path(1, 10, np.array([], dtype=np.int64), drop_path_rates(4, 0.3)).shape == (4, 2, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": -1}, "step -1"),
        ({"positions": np.array([2**32])}, "position"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_drop_path_refuses_what_its_counter_cannot_hold(values, message):
    good = {"seed": 0, "step": 0, "positions": np.arange(2), "rates": drop_path_rates(3, 0.1)}
    with pytest.raises((UserError, ValueError), match=message):
        draw_drop_path(**{**good, **values})


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_rate_outside_its_range_is_refused(rate, uniform):
    refused("outside", drop_path_rates, 3, rate, uniform=uniform)


def test_uniform_rates_drop_as_many_samples_of_every_block():
    """DeiT III: `dpr = [drop_path_rate for i in range(depth)]` (arXiv 2204.07118, released code)."""
    count, rates = 20_000, drop_path_rates(5, 0.3, uniform=True)
    dropped = (draw_drop_path(7, 3, np.arange(count), rates) == 0).mean(-1)
    assert np.abs(dropped - 0.3).max() < 4 * (0.3 * 0.7 / count) ** 0.5
    assert dropped_samples(rates, 64).tolist() == [19] * 5


@pytest.mark.parametrize(("depth", "rate", "group"), [(12, 0.1, 64), (12, 0.05, 64), (6, 0.4, 8), (3, 0.5, 1024)])
def test_a_fixed_number_is_the_rates_rounded(depth, rate, group):
    dropped = dropped_samples(drop_path_rates(depth, rate), group)
    wanted = np.array(calculate_drop_path_rates(rate, depth)) * group
    assert np.abs(dropped - wanted).max() <= 0.5
    assert (np.diff(dropped) >= 0).all()


@pytest.mark.parametrize(
    ("rate", "group", "message"),
    [
        (0.005, 64, "0.005 drops none of a group's 64 samples.*larger model.drop_path"),
        (0.1, 4, "0.1 drops none of a group's 4 samples"),
        (0.99, 32, "0.99 drops all of a group's 32 samples in the last block.*smaller model.drop_path"),
        (1.0, 64, "outside"),
    ],
)
def test_a_number_that_drops_nothing_or_everything_is_refused(rate, group, message):
    refused(message, lambda: dropped_samples(drop_path_rates(12, rate), group))


def test_every_group_drops_exactly_its_number_and_the_expectation_is_one():
    dropped = np.array([0, 1, 6, 33, 63])
    masks = draw_fixed_drop_path(3, 5, np.arange(64, 64 * 9), dropped, 64)
    assert masks.shape == (5, 2, 64 * 8)
    assert masks.dtype == np.float32
    counts = (masks == 0).reshape(5, 2, 8, 64).sum(-1)
    assert (counts == dropped[:, None, None]).all()
    for layer, count in enumerate(dropped):
        kept = masks[layer][masks[layer] > 0]
        np.testing.assert_allclose(kept, 64 / (64 - count), rtol=1e-7)
    np.testing.assert_allclose(masks.reshape(5, 2, 8, 64).mean(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_every_set_of_samples_is_equally_likely(count):
    """A chi-square test over all sets of `count` out of 6 samples."""
    groups = 20_000
    masks = draw_fixed_drop_path(1, 2, np.arange(6 * groups), np.array([count]), 6)
    for branch in masks[0]:
        found = Counter(map(tuple, (branch.reshape(groups, 6) == 0).astype(int).tolist()))
        sets = [tuple(int(i in chosen) for i in range(6)) for chosen in itertools.combinations(range(6), count)]
        assert set(found) <= set(sets)
        assert stats.chisquare([found[one] for one in sets]).pvalue > 1e-3


def test_draws_of_branches_groups_steps_and_seeds_are_independent():
    groups, dropped = 4000, np.array([16, 16])
    masks = draw_fixed_drop_path(7, 3, np.arange(groups * 64), dropped, 64)
    rows = [*(masks == 0).reshape(4, -1)]
    for seed, step in ((7, 4), (8, 3)):
        rows.append((draw_fixed_drop_path(seed, step, np.arange(groups * 64), dropped, 64)[0, 0] == 0).ravel())
    rows.append(np.roll(rows[0], 64))  # the next group
    rows.append((draw_drop_path(7, 3, np.arange(groups * 64), drop_path_rates(2, 0.25))[1, 0] == 0).ravel())
    correlation = np.corrcoef(np.array(rows))
    assert np.abs(correlation - np.eye(len(rows))).max() < 0.01


def test_fixed_draws_know_neither_process_nor_micro_batch():
    dropped = np.array([0, 3, 7])
    whole = draw_fixed_drop_path(1, 10, np.arange(256), dropped, 16)
    for first, last in ((0, 128), (128, 256), (48, 64)):
        part = draw_fixed_drop_path(1, 10, np.arange(first, last), dropped, 16)
        np.testing.assert_array_equal(part, whole[..., first:last])


@pytest.mark.parametrize("positions", [np.arange(12), np.arange(4, 12), np.arange(8)[::-1], np.zeros(8, int)])
def test_positions_that_are_not_whole_groups_are_refused(positions):
    refused("whole groups of 8 samples", draw_fixed_drop_path, 0, 0, positions, np.array([1]), 8, error=ValueError)
