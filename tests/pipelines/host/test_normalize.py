"""Normalising, erasing noise and bfloat16 against torchvision and PyTorch."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import functional

from fastdeit.pipelines.batch import normalized_levels
from fastdeit.pipelines.host import normalize
from fastdeit.pipelines.host.noise import NOISE_ROWS, noise_rows, noise_scratch
from fastdeit.pipelines.plan.philox import NOISE, normal_pair, philox

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(("mean", "std"), [IMAGENET, HALF])
def test_levels_are_normalised_as_torchvision_does_to_the_bit(mean, std):
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    expected = functional.normalize(functional.to_tensor(levels), list(mean), list(std))[:, :, 0]
    assert torch.equal(torch.from_numpy(normalized_levels(mean, std)), expected)


def test_bfloat16_is_rounded_as_pytorch_does():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 3, 100_000).astype(np.float32), np.array([0.0, -0.0, 1.0, 3.3e38])])
    values = values.astype(np.float32)
    ties = values.view(np.uint32) & np.uint32(0xFFFF0000) | np.uint32(0x8000)
    values = np.concatenate([values, ties.view(np.float32)])
    out = np.empty(len(values), np.uint16)
    normalize._write(normalize.output(out[None]), 0, 0, values)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(out).view(torch.bfloat16).view(torch.int16), expected.view(torch.int16))


def drawn(seed: int, first: int, pitch: int, rows: int, count: int) -> np.ndarray:
    out = np.full(NOISE_ROWS * count, np.nan, np.float32)
    noise_rows(np.uint64(seed), 7, 3, 1, first, pitch, rows, count, out, noise_scratch(count))
    return out[: rows * count].reshape(rows, count)


def test_noise_is_that_of_the_generator_within_an_ulp_or_a_millionth():
    count, pitch, first = 37, 50, 123
    ours = drawn(5, first, pitch, NOISE_ROWS, count)
    with np.errstate(over="ignore"):
        for row in range(0, NOISE_ROWS, 5):
            for i in range(count):
                at = first + row * pitch + i
                words = philox(5, at // 4, 7, 3, NOISE | np.uint32(1))
                pair = normal_pair(words[0], words[1]) if at % 4 < 2 else normal_pair(words[2], words[3])
                expected = np.float32(pair[at % 2])
                assert abs(ours[row, i] - expected) <= max(np.spacing(abs(expected)), np.float32(1e-6))


def test_noise_is_standard_normal():
    values = np.concatenate([drawn(seed, 0, 5000, NOISE_ROWS, 4999).reshape(-1) for seed in range(3)])
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_noise_does_not_depend_on_how_it_is_cut_into_rows():
    whole = drawn(9, 40, 0, 1, 200)[0]
    pieces = drawn(9, 40, 20, 10, 20).reshape(-1)
    np.testing.assert_array_equal(whole, pieces)
