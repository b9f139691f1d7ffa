"""Known answers of Philox4x32-10 (Random123's kat_vectors) and the shape of its transforms."""

import numpy as np
import pytest
from scipy import stats

from fastdeit.pipelines.plan.philox import check_seed, normal_pair, philox, unit
from refusals import refused

ANSWERS = [
    ((0, 0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**64 - 1, *(2**32 - 1,) * 4), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x299F31D0A4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "words"), ANSWERS)
def test_known_answers(counter, words):
    seed, *rest = counter
    assert " ".join(f"{w:08x}" for w in philox(np.uint64(seed), *rest)) == words


def test_unit_stays_inside():
    assert 0.0 < unit(np.uint32(0)) < unit(np.uint32(2**32 - 1)) < 1.0


def test_normal_pair_is_normal():
    words = np.random.default_rng(0).integers(0, 2**32, (20000, 2), dtype=np.uint32)
    values = np.array([normal_pair(a, b) for a, b in words])
    assert stats.kstest(values[:, 0], "norm").pvalue > 1e-3
    assert stats.kstest(values[:, 1], "norm").pvalue > 1e-3
    assert abs(stats.pearsonr(values[:, 0], values[:, 1])[0]) < 0.03


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_64_bits(seed):
    refused("64-bit", check_seed, seed)
