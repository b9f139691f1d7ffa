"""Layer normalisation with the residual addition against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import layer_norm as module
from fastdeit.kernels.layer_norm import add_layer_norm, layer_norm
from fastdeit.kernels.reference import Kept
from operators import assert_same_bits, results

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-6
NAMES = ("total", "out", "x", "branch", "weight", "bias")


def inputs(device, shape, dtype, masked=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, branch = (torch.randn(shape, generator=generator) * 3 + 1 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    mask = (torch.arange(shape[0]) % 3 / 2).to(device) if masked else None
    leaves = [t.to(device, dtype).requires_grad_() for t in (x, branch, weight, bias)]
    return *leaves, mask


def by_pytorch(x, branch, weight, bias, mask):
    if mask is not None:
        branch = branch * mask.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
    total = x + branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, EPS)


def ours(x, branch, weight, bias, mask):
    return add_layer_norm(x, branch, weight, bias, EPS, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 7, 200), (4, 1), (1, 1, 1025), (5, 130, 16)])
def test_equals_pytorch(device, equals_pytorch, shape, masked, dtype):
    equals_pytorch(ours, by_pytorch, inputs(device, shape, dtype, masked), NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 384, 768])
@pytest.mark.parametrize("tokens", [197, 578])
def test_equals_pytorch_at_full_size(device, equals_pytorch, tokens, width):
    equals_pytorch(ours, by_pytorch, inputs(device, (256, tokens, width), torch.bfloat16), NAMES)


def test_a_branch_of_half_precision_on_a_float32_stream(device):
    """As under autocast; the normalised rows go to a GEMM in half precision."""
    x, branch, weight, bias, mask = inputs(device, (3, 4, 32), torch.float32)
    low = branch.detach().bfloat16().requires_grad_()
    total, out = add_layer_norm(x, low, weight, bias, EPS, mask=mask, dtype=torch.bfloat16)
    sum_of_both, judge = by_pytorch(x, (low.float() * mask[:, None, None]).bfloat16(), weight, bias, None)
    assert total.dtype is torch.float32
    assert torch.equal(total, sum_of_both)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, judge.bfloat16(), rtol=8e-3, atol=1e-3)
    out.float().sum().backward()
    assert low.grad.dtype is torch.bfloat16
    assert x.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bias_of_the_branch_gets_its_gradient(device, equals_pytorch, dtype):
    """It is already part of the branch, detached, as a GEMM adds it."""
    x, branch, weight, bias, mask = inputs(device, (3, 50, 40), dtype)
    own = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()

    def fused(x, branch, weight, bias, own):
        return add_layer_norm(x, branch + own.detach(), weight, bias, EPS, mask=mask, branch_bias=own)

    def plain(x, branch, weight, bias, own):
        return by_pytorch(x, branch + own, weight, bias, mask)

    equals_pytorch(fused, plain, (x, branch, weight, bias, own), (*NAMES, "branch_bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_a_branch(device, equals_pytorch, dtype):
    x, _, weight, bias, _ = inputs(device, (2, 9, 48), dtype)
    equals_pytorch(
        lambda *arguments: layer_norm(*arguments, EPS),
        lambda x, *affine: F.layer_norm(x, x.shape[-1:], *affine, EPS),
        (x, weight, bias),
        ("out", "x", "weight", "bias"),
    )


def test_only_the_token_rows(device):
    x, _, weight, bias, _ = inputs(device, (3, 6, 32), torch.float32)
    out = layer_norm(x[:, :2], weight, bias, EPS)
    torch.testing.assert_close(out, F.layer_norm(x, (32,), weight, bias, EPS)[:, :2])
    out.sum().backward()
    assert not x.grad[:, 2:].any()


def keeping(device, *samples, batch):
    """A `Kept` of `samples` of a batch, each with a factor of its own."""
    slots = torch.full((batch,), -1, dtype=torch.int32)
    slots[list(samples)] = torch.arange(len(samples), dtype=torch.int32)
    return Kept(((slots >= 0) * torch.linspace(1, 2, batch)).to(device), slots.to(device), len(samples))


def kept_by_pytorch(x, branch, weight, bias, kept, only):
    """PyTorch's result, with each kept sample's branch multiplied and added one by one."""
    total = list(x.unbind() if kept is not None else (x + branch).unbind())
    if kept is not None:
        for sample, slot in enumerate(kept.slots.tolist()):
            if slot >= 0:
                total[sample] = total[sample] + branch[slot] * kept.mask[sample].to(branch.dtype)
    chosen = range(len(x)) if only is None else [i for i, slot in enumerate(only.slots.tolist()) if slot >= 0]
    return torch.stack(total), F.layer_norm(
        torch.stack([total[i] for i in chosen]), total[0].shape[-1:], weight, bias, EPS
    )


KEPT = {"all": None, "some": (0, 2, 3), "another": (1, 4), "one": (3,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("own", KEPT)
@pytest.mark.parametrize("following", KEPT)
@pytest.mark.parametrize("shape", [(5, 7, 40), (5, 3, 1100)])
def test_branches_of_the_kept_samples_alone(device, equals_pytorch, shape, own, following, dtype):
    kept, only = (None if KEPT[name] is None else keeping(device, *KEPT[name], batch=5) for name in (own, following))
    x, branch, weight, bias, _ = inputs(device, shape, dtype)
    branch = branch.detach()[: len(x) if kept is None else kept.count].requires_grad_()
    equals_pytorch(
        lambda *leaves: add_layer_norm(*leaves[:4], EPS, mask=kept, only=only),
        lambda *leaves: kept_by_pytorch(*leaves[:4], kept, only),
        (x, branch, weight, bias),
        NAMES,
    )


def layer_scale(device, width, dtype):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(width, generator=generator) / 10).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 50, 64), (2, 7, 200), (4, 1), (1, 1, 1025)])
def test_layer_scale_and_the_bias_of_the_branch(device, equals_pytorch, shape, masked, dtype):
    """As timm's block computes it: LayerScale, stochastic depth, addition, normalisation."""
    x, branch, weight, bias, mask = inputs(device, shape, dtype, masked)
    gamma = layer_scale(device, shape[-1], dtype)
    own = bias.detach().clone().requires_grad_()

    def fused(x, branch, weight, bias, gamma, own):
        return add_layer_norm(x, branch + own.detach(), weight, bias, EPS, scale=gamma, mask=mask, branch_bias=own)

    def plain(x, branch, weight, bias, gamma, own):
        return by_pytorch(x, (branch + own) * gamma, weight, bias, mask)

    equals_pytorch(fused, plain, (x, branch, weight, bias, gamma, own), (*NAMES, "scale", "branch_bias"))


def test_a_float32_layer_scale_of_a_branch_of_half_precision(device):
    """As under autocast: the product stays in float32, and only the sum is rounded."""
    x, branch, weight, bias, mask = inputs(device, (3, 4, 32), torch.float32)
    low, gamma = branch.detach().bfloat16().requires_grad_(), layer_scale(device, 32, torch.float32)
    total, _ = add_layer_norm(x, low, weight, bias, EPS, scale=gamma, mask=mask)
    torch.testing.assert_close(total, x + low * gamma * mask[:, None, None], rtol=1e-6, atol=1e-6)
    total, _ = add_layer_norm(x.bfloat16(), low, weight, bias, EPS, scale=gamma, mask=mask)
    assert total.dtype is torch.bfloat16
    total.float().sum().backward()
    assert (gamma.grad.dtype, low.grad.dtype) == (torch.float32, torch.bfloat16)


def test_layer_scale_of_kept_samples_has_the_bits_that_masks_give(device):
    kept, only = keeping(device, 0, 3, batch=5), keeping(device, 0, 1, 4, batch=5)
    x, branch, weight, bias, _ = inputs(device, (5, 60, 24), torch.float16)
    gamma = layer_scale(device, 24, torch.float32)

    def skipped(x, branch, weight, bias, gamma):
        return add_layer_norm(x, branch[kept.index], weight, bias, EPS, scale=gamma, mask=kept, only=only)

    def masked(x, branch, weight, bias, gamma):
        total, out = add_layer_norm(x, branch, weight, bias, EPS, scale=gamma, mask=kept.mask)
        return total, out[only.index]

    arguments = x, branch, weight, bias, gamma
    weights = [torch.randn(shape, device=device) for shape in (x.shape, (3, 60, 24))]
    assert_same_bits(results(skipped, arguments, weights), results(masked, arguments, weights))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [384, 768, 1024, 1280])
def test_layer_scale_at_full_size(device, equals_pytorch, width):
    x, branch, weight, bias, mask = inputs(device, (128, 197, width), torch.bfloat16)
    gamma = layer_scale(device, width, torch.bfloat16)

    def fused(x, branch, weight, bias, gamma):
        return add_layer_norm(x, branch, weight, bias, EPS, scale=gamma, mask=mask)

    def plain(x, branch, weight, bias, gamma):
        return by_pytorch(x, branch * gamma, weight, bias, mask)

    equals_pytorch(fused, plain, (x, branch, weight, bias, gamma), (*NAMES, "scale"))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 384, 768])
def test_branches_of_the_kept_samples_at_full_size(device, equals_pytorch, width):
    kept = keeping(device, *(i for i in range(256) if i % 11), batch=256)
    only = keeping(device, *(i for i in range(256) if i % 7), batch=256)
    x, branch, weight, bias, _ = inputs(device, (256, 197, width), torch.bfloat16)
    branch = branch.detach()[: kept.count].requires_grad_()
    equals_pytorch(
        lambda *leaves: add_layer_norm(*leaves, EPS, mask=kept, only=only),
        lambda *leaves: kept_by_pytorch(*leaves, kept, only),
        (x, branch, weight, bias),
        NAMES,
    )


def test_the_stream_alone_is_normalised_for_the_kept_samples(device, equals_pytorch):
    only = keeping(device, 1, 2, batch=4)
    x, _, weight, bias, _ = inputs(device, (4, 6, 40), torch.float32)
    equals_pytorch(
        lambda *leaves: layer_norm(*leaves, EPS, only=only),
        lambda x, *affine: F.layer_norm(x[1:3], x.shape[-1:], *affine, EPS),
        (x, weight, bias),
        ("out", "x", "weight", "bias"),
    )


def test_kept_samples_have_the_bits_that_masks_give(device):
    """Sum, normalised rows and gradients, also that of the branch's bias, to which dropped rows add zeros."""
    kept, only = keeping(device, 0, 3, batch=5), keeping(device, 0, 1, 4, batch=5)
    x, branch, weight, bias, _ = inputs(device, (5, 60, 24), torch.float16)
    own = bias.detach().clone().requires_grad_()

    def skipped(x, branch, weight, bias, own):
        part = branch[kept.index]
        return add_layer_norm(x, part, weight, bias, EPS, mask=kept, only=only, branch_bias=own)

    def masked(x, branch, weight, bias, own):
        total, out = add_layer_norm(x, branch, weight, bias, EPS, mask=kept.mask, branch_bias=own)
        return total, out[only.index]

    arguments = x, branch, weight, bias, own
    weights = [torch.randn(shape, device=device) for shape in (x.shape, (3, 60, 24))]
    assert_same_bits(results(skipped, arguments, weights), results(masked, arguments, weights))


def test_slots_beyond_the_branch_touch_no_other_memory(device):
    """Samples that a wrong `count` leaves out are treated as dropped."""
    kept = keeping(device, 0, 1, 2, batch=3)._replace(count=2)
    x, branch, weight, bias, _ = inputs(device, (3, 4, 32), torch.float32)
    total, out = add_layer_norm(x, branch[:2], weight, bias, EPS, mask=kept, only=kept)
    assert torch.equal(total[2], x[2])
    assert out.shape == (2, 4, 32)
    assert not out.isnan().any()


def test_a_row_far_from_zero_keeps_its_variance(device, equals_pytorch):
    x, branch, weight, bias, mask = inputs(device, (2, 4, 64), torch.float32)
    far = (x.detach() + 1000).requires_grad_()
    equals_pytorch(ours, by_pytorch, (far, branch, weight, bias, mask), NAMES)


def test_a_dropped_sample_gives_its_branch_no_gradient(device):
    x, branch, weight, bias, mask = inputs(device, (3, 4, 32), torch.float32)
    sum(t.square().sum() for t in ours(x, branch, weight, bias, mask)).backward()
    assert mask[0] == 0
    assert not branch.grad[0].any()
    assert branch.grad[1:].all()


def test_strided_inputs(device, equals_pytorch):
    x, branch, weight, bias, mask = inputs(device, (2, 10, 32), torch.float32)
    strided = x.detach()[:, ::2].requires_grad_(), branch.detach()[:, 5:].requires_grad_()
    equals_pytorch(ours, by_pytorch, (*strided, weight, bias, mask), NAMES)
    apart = [t.detach()[:1].expand(32).requires_grad_() for t in (weight, bias)]
    equals_pytorch(ours, by_pytorch, (x, branch, *apart, mask), NAMES)


def test_an_empty_batch(device):
    arguments = inputs(device, (0, 4, 32), torch.float32)
    ours(*arguments)[1].sum().backward()
    for argument in arguments[2:4]:
        assert not argument.grad.any()


def test_is_repeatable_to_the_bit(device):
    arguments = inputs(device, (3, 250, 16), torch.float32)
    weights = [torch.randn(3, 250, 16, device=device) for _ in range(2)]
    assert_same_bits(*(results(ours, arguments, weights) for _ in range(2)))


@pytest.mark.slow
def test_opcheck_and_compile_without_a_graph_break(device):
    x, branch, weight, bias, mask = arguments = inputs(device, (2, 3, 16), torch.float32)
    slots = torch.tensor([-1, 0], dtype=torch.int32, device=device)
    rest = weight, bias, EPS, torch.float32
    torch.library.opcheck(module._op, (x, branch, bias, None, mask, None, None, 2, *rest))
    torch.library.opcheck(module._op, (x, branch, bias, bias, mask, None, None, 2, *rest))
    torch.library.opcheck(module._op, (x, None, None, None, None, None, None, 2, *rest))
    torch.library.opcheck(module._op, (x, branch[:1].detach(), bias, weight, mask, slots, slots, 1, *rest))
    weights = [torch.randn(2, 3, 16, device=device) for _ in range(2)]
    whole = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(whole, arguments, weights), results(ours, arguments, weights))


def test_what_does_not_fit_is_refused(device):
    x, branch, weight, bias, mask = inputs(device, (2, 3, 16), torch.float32)
    kept = keeping(device, 1, batch=2)
    for message, call in (
        (r"give both \(16,\)", lambda: layer_norm(x, weight[:8], bias)),
        (r"scale is \(8,\): give it \(16,\)", lambda: add_layer_norm(x, branch, weight, bias, scale=bias[:8])),
        ("branch is", lambda: add_layer_norm(x, branch[:1], weight, bias)),
        ("each of 2 samples", lambda: add_layer_norm(x, branch, weight, bias, mask=mask[:1])),
        ("each of 2 samples", lambda: add_layer_norm(x, branch, weight, bias, mask=mask > 0)),
        (r"branch is \(2, 3, 16\), not \(1, 3, 16\)", lambda: add_layer_norm(x, branch, weight, bias, mask=kept)),
        ("an int32 for each of 2", lambda: layer_norm(x, weight, bias, only=kept._replace(slots=kept.slots[:1]))),
        ("an int32 for each of 2", lambda: layer_norm(x, weight, bias, only=kept._replace(slots=kept.slots.long()))),
        (r"x is \(16,\)", lambda: layer_norm(x[0, 0], weight, bias)),
        ("at most 4096 channels", lambda: layer_norm(x.new_zeros(1, 4097), *x.new_zeros(2, 4097))),
        (r"dtype is torch\.float64", lambda: layer_norm(x, weight, bias, dtype=torch.float64)),
        (r"weight is torch\.float64", lambda: layer_norm(x, weight.double(), bias)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
