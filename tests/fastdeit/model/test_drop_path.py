"""A model that skips dropped samples, compared with PyTorch's operations in float64, which multiply them by 0."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import refusals
from fastdeit.kernels.reference import Kept, add_branch, select_kept
from fastdeit.model.deit import build_model
from fastdeit.model.drop_path import kept_samples
from fastdeit.model.fused import fuse
from fastdeit.pipelines.plan.drop_path import draw_fixed_drop_path
from fastdeit.sections import ModelConfig

refused = partial(refusals.refused, error=ValueError)

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
GROUP, BATCH = 4, 8
DROPPED = np.array([0, 1, 2])  # block 0 drops none, so a complete branch is followed by one that skips
KEPT = (BATCH // GROUP * (GROUP - DROPPED)).tolist()


def models(distilled=False, device="cpu", kernels=False, **fields):
    """A model that skips, with our kernels or without, and a float64 model of the same weights that multiplies."""
    torch.manual_seed(0)
    cfg = {**SMALL, "distilled": distilled, **fields}
    skips = build_model(ModelConfig(**cfg, drop_path_mode="skip"), 5).to(device).train()
    for parameter in skips.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    judge = build_model(ModelConfig(**cfg), 5).to(device).double().train()
    judge.load_state_dict(skips.state_dict())
    if kernels:
        fuse(skips)
    return skips, judge


def draw(step=0, device="cpu"):
    return torch.from_numpy(draw_fixed_drop_path(0, step, np.arange(BATCH), DROPPED, GROUP)).to(device)


def outcome(model, images):
    """Both heads' logits, all tokens, and the gradients of their sum of squares."""
    model.zero_grad()
    outputs = [o for o in model(images) if o is not None] + [model.forward_features(images)]
    sum(o.square().sum() for o in outputs).backward()
    return [o.detach() for o in outputs] + [p.grad for p in model.parameters()]


def assert_near(ours, exact, limit=3e-6):
    for place, (mine, truth) in enumerate(zip(ours, exact, strict=True)):
        assert (mine - truth).abs().max() <= limit * truth.abs().max(), place


@pytest.mark.parametrize("distilled", [False, True])
def test_skipping_equals_multiplying_by_zero_in_float64(distilled):
    skips, judge = models(distilled)
    images = torch.randn(BATCH, 3, 16, 16)
    for step in range(2):
        skips.set_drop_path(draw(step), KEPT)
        judge.set_drop_path(draw(step).double())
        assert_near(outcome(skips, images), outcome(judge, images.double()))


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("without", [(), ("layer_norm",), ("attention", "bias_gelu", "assemble_tokens")])
def test_the_kernels_skip_as_pytorch_does(device, distilled, without):
    skips, judge = models(distilled, device)
    swap = fuse(skips, dict.fromkeys(without, "the test leaves it out"))
    assert ("blocks.1" in swap.replaced) == ("layer_norm" not in without)
    images = torch.randn(BATCH, 3, 16, 16, device=device)
    skips.set_drop_path(draw(device=device), KEPT)
    judge.set_drop_path(draw(device=device).double())
    assert_near(outcome(skips, images), outcome(judge, images.double()))
    assert not fuse(skips).replaced or without


def test_only_kept_samples_are_computed():
    skips, _ = models()
    seen = []
    for block in skips.blocks:
        block.attn.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
        block.mlp.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    images = torch.randn(BATCH, 3, 16, 16)
    skips.set_drop_path(draw(), KEPT)
    skips(images)
    assert seen == [count for count in KEPT for _ in range(2)]
    seen.clear()
    skips.eval()(images)
    skips.train().set_drop_path(None)
    skips(images)
    assert seen == [BATCH] * 12


@pytest.mark.parametrize("kernels", [False, True])
def test_eval_mode_and_no_masks_skip_nothing(device, kernels):
    skips, judge = models(device=device, kernels=kernels)
    images = torch.randn(3, 3, 16, 16, device=device)  # another batch size, as in evaluation
    skips.set_drop_path(draw(device=device), KEPT)
    exact = judge.eval()(images.double()).cls
    assert_near([skips.eval()(images).cls], [exact], 1e-5)
    skips.train().set_drop_path(None)
    assert_near([skips(images).cls], [exact], 1e-5)


@pytest.mark.parametrize("kernels", [False, True])
def test_another_batch_size_is_refused(device, kernels):
    skips, _ = models(device=device, kernels=kernels)
    skips.set_drop_path(draw(device=device), KEPT)
    with pytest.raises(ValueError, match="the drop path masks are for 8 samples, but the batch has 4: call set_drop"):
        skips(torch.randn(4, 3, 16, 16, device=device))


def test_numbers_that_do_not_fit_the_masks_are_refused():
    skips, _ = models()
    refused("needs the number of samples that each of 3 blocks keeps", skips.set_drop_path, draw())
    refused("needs the number of samples", skips.set_drop_path, draw(), KEPT[:2])
    refused(r"keep \[8, 8, 6, 6, 4, 4\] samples .*, not \[8, 8, 6, 6, 5, 5\]", skips.set_drop_path, draw(), [8, 6, 5])
    refused(r"\(3, 2, batch\)", skips.set_drop_path, draw()[:2], KEPT)


def test_what_a_branch_keeps_has_slots_in_order():
    masks = torch.tensor([[0.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    first, whole, last = kept_samples(masks, [2, 4, 1])
    assert whole is None
    assert (first.slots.tolist(), first.index.tolist(), first.count) == ([-1, 0, 1, -1], [1, 2], 2)
    assert (last.slots.tolist(), last.index.tolist(), last.count) == ([-1, -1, -1, 0], [3], 1)
    x, branch = torch.arange(4.0)[:, None], torch.tensor([[10.0], [20.0]])
    assert select_kept(x, first).flatten().tolist() == [1, 2]
    assert add_branch(x, branch, first).flatten().tolist() == [0, 21, 42, 3]


def test_masks_and_slots_are_no_state():
    skips, judge = models()
    skips.set_drop_path(draw(), KEPT)
    assert set(skips.state_dict()) == set(judge.state_dict())
    assert isinstance(copy.deepcopy(skips).blocks[2].drop_path1.mask, Kept)


def test_bf16_autocast_stays_near_float32():
    for residual in ("float32", "bfloat16"):
        skips, _ = models(True, residual_dtype=residual)
        skips.set_drop_path(draw(), KEPT)
        images = torch.randn(BATCH, 3, 16, 16)
        exact = skips(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = skips(images)
        for low, high in zip(rough, exact, strict=True):
            assert (low.float() - high).abs().max() < 0.03 * high.abs().max()
