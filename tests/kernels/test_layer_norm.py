"""Layer normalisation with the residual addition against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import layer_norm as module
from fastdeit.kernels.layer_norm import add_layer_norm, layer_norm
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
    torch.library.opcheck(module._op, (x, branch, bias, mask, weight, bias, EPS, torch.float32))
    torch.library.opcheck(module._op, (x, None, None, None, weight, bias, EPS, torch.float32))
    weights = [torch.randn(2, 3, 16, device=device) for _ in range(2)]
    whole = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(whole, arguments, weights), results(ours, arguments, weights))


def test_what_does_not_fit_is_refused(device):
    x, branch, weight, bias, mask = inputs(device, (2, 3, 16), torch.float32)
    for message, call in (
        (r"give both \(16,\)", lambda: layer_norm(x, weight[:8], bias)),
        ("branch is", lambda: add_layer_norm(x, branch[:1], weight, bias)),
        ("each of 2 samples", lambda: add_layer_norm(x, branch, weight, bias, mask=mask[:1])),
        ("each of 2 samples", lambda: add_layer_norm(x, branch, weight, bias, mask=mask > 0)),
        (r"x is \(16,\)", lambda: layer_norm(x[0, 0], weight, bias)),
        ("at most 4096 channels", lambda: layer_norm(x.new_zeros(1, 4097), *x.new_zeros(2, 4097))),
        (r"dtype is torch\.float64", lambda: layer_norm(x, weight, bias, dtype=torch.float64)),
        (r"weight is torch\.float64", lambda: layer_norm(x, weight.double(), bias)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
