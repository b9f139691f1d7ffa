"""Dropout by the samples' keys: the right share, unrelated patterns, and the same on any number of processes."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from fastdeit.model.deit import DeiT
from fastdeit.model.dropout import KeyedDropout
from fastdeit.pipelines.plan.drop_path import draw_drop_path, draw_fixed_drop_path, drop_path_rates
from fastdeit.pipelines.plan.dropout import draw_dropout_keys


def drop(x, p=0.3, place=0, keys=None, step=0):
    module = KeyedDropout(p, place).train()
    module.keys = torch.from_numpy(draw_dropout_keys(1, step, np.arange(len(x)))) if keys is None else keys
    return module(x)


def small(**options):
    torch.manual_seed(0)
    return DeiT(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=5, **options).train()


def keys_of(positions, step=0):
    return torch.from_numpy(draw_dropout_keys(1, step, np.asarray(positions)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_dropped_or_scaled_as_pytorch_does(p, dtype):
    x = torch.rand(8, 50, 40, dtype=dtype) + 1
    found = drop(x, p)
    assert found.dtype is dtype
    kept = found != 0
    pytorchs = F.dropout(x, p)
    both = kept & (pytorchs != 0)
    assert both.any()
    torch.testing.assert_close(found[both], pytorchs[both])
    # The number of dropped values of 16,000 is binomial.
    assert stats.binomtest(int((~kept).sum()), kept.numel(), p).pvalue > 1e-4


def test_patterns_have_no_relation():
    """Between samples, places in the network and steps, and along a sample."""
    x = torch.ones(6, 197, 64)
    patterns = [*drop(x), *drop(x, place=1)[:3], *drop(x, step=1)[:3]]
    patterns = [(pattern != 0).double().flatten().numpy() for pattern in patterns]
    count = len(patterns[0])
    bound = stats.norm.isf(1e-5) / np.sqrt(count)
    for a, b in itertools.combinations(patterns, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < bound
    for pattern in patterns:
        for shift in (1, 2, 64, 128, 197):
            assert abs(np.corrcoef(pattern[shift:], pattern[:-shift])[0, 1]) < 1.1 * bound
    # How many values of a token are kept is binomial.
    tokens = np.stack(patterns).reshape(-1, 64).sum(1)
    edges = np.array([0, 40, 42, 44, 45, 46, 48, 50, 65])
    expected = np.diff(stats.binom.cdf(edges - 1, 64, 0.7)) * len(tokens)
    assert stats.chisquare(np.histogram(tokens, edges)[0], expected, sum_check=False).pvalue > 1e-4


def test_a_gradient_passes_where_the_value_did():
    x = torch.rand(4, 9, 8, requires_grad=True)
    found = drop(x)
    found.sum().backward()
    torch.testing.assert_close(x.grad, (found != 0) / 0.7)


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_a_part_of_a_batch_drops_what_the_whole_batch_drops(mode):
    """As when processes or micro batches share it."""
    model = small(drop_rate=0.3, drop_path_mode=mode)
    images, dropped = torch.randn(16, 3, 32, 32), np.array([0, 2])

    def logits(start, stop, step=0):
        positions = np.arange(start, stop)
        if mode == "skip":
            masks = draw_fixed_drop_path(1, 0, positions, dropped, 8)
            model.set_drop_path(torch.from_numpy(masks), [(stop - start) // 8 * (8 - d) for d in dropped.tolist()])
        else:
            model.set_drop_path(torch.from_numpy(draw_drop_path(1, 0, positions, drop_path_rates(2, 0.3))))
        model.set_dropout(keys_of(positions, step))
        return model(images[start:stop]).cls

    whole = logits(0, 16)
    torch.testing.assert_close(torch.cat([logits(0, 8), logits(8, 16)]), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(0, 16, step=1), whole, atol=1e-3)


def test_every_dropout_of_the_network_draws_its_own():
    model, seen = small(drop_rate=0.5), []
    dropouts = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    assert len(dropouts) == 1 + 3 * 2
    assert len({dropout.place for dropout in dropouts}) == len(dropouts)
    for dropout in dropouts:
        dropout.register_forward_hook(lambda module, args, out: seen.append((args[0] != 0) & (out == 0)))
    model.set_dropout(keys_of(range(4)))
    model(torch.randn(4, 3, 32, 32))
    assert len(seen) == len(dropouts)
    assert all(0.45 < pattern.double().mean() < 0.55 for pattern in seen)


def test_keys_for_another_batch_are_refused():
    with pytest.raises(ValueError, match="the dropout keys are for 4 samples, but the batch has 6: call set_dropout"):
        drop(torch.rand(6, 3), keys=keys_of(range(4)))


def test_without_keys_pytorch_draws():
    model, x = KeyedDropout(0.5, 0).train(), torch.rand(8, 100)
    assert not torch.equal(model(x), model(x))
    assert model.eval()(x) is x


def test_without_dropout_the_network_is_timms():
    assert not any(isinstance(module, KeyedDropout) for module in small().modules())
    assert {*small(drop_rate=0.5).state_dict()} == {*small().state_dict()}
