"""Bias and GELU against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import bias_gelu as module
from fastdeit.kernels.bias_gelu import bias_gelu

pytestmark = pytest.mark.usefixtures("poisoned")


def by_pytorch(x, bias):
    return F.gelu(x + bias)


def inputs(device, shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(shape, generator=generator) * 2, torch.randn(shape[-1], generator=generator)
    return x.to(device, dtype).requires_grad_(), bias.to(device, dtype).requires_grad_()


def results(function, arguments, weights):
    out = function(*arguments)
    return [out, *torch.autograd.grad(out, arguments, weights.to(out.dtype))]


def compare(at_most_twice, arguments):
    exact = [a.detach().double().requires_grad_() for a in arguments]
    weights = (
        torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(9))
        .bfloat16()
        .float()
        .to(arguments[0].device)
    )
    sides = (results(f, a, weights) for f, a in ((bias_gelu, arguments), (by_pytorch, arguments), (by_pytorch, exact)))
    for name, mine, judge, truth in zip(("out", "x", "bias"), *sides, strict=True):
        at_most_twice(mine, judge, truth, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 300), (5, 3), (260, 8), (0, 4, 8)])
def test_equals_pytorch(device, at_most_twice, shape, dtype):
    compare(at_most_twice, inputs(device, shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1536, 3072])
def test_equals_pytorch_at_full_size(device, at_most_twice, width):
    compare(at_most_twice, inputs(device, (256, 197, width), torch.bfloat16))


def test_far_from_zero(device):
    x = torch.tensor([[-60.0, -10.0, 0.0, 10.0, 60.0]], device=device, requires_grad=True)
    zero = torch.zeros(5, device=device)
    out = bias_gelu(x, zero)
    torch.testing.assert_close(out, F.gelu(x), rtol=1e-6, atol=1e-12)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(F.gelu(x).sum(), x)[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_half_precision(device, dtype):
    """Value and slope are float64's but for the rounding, and a millionth of float32's before it."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)
    x = numbers[numbers.isfinite()].view(-1, 256).requires_grad_()
    out = bias_gelu(x, torch.zeros(256, dtype=dtype, device=device))
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    exact = x.detach().double().requires_grad_()
    right = F.gelu(exact)
    (slope,) = torch.autograd.grad(right.sum(), exact)
    # The interpreter cuts a float32 off where a GPU rounds it to bfloat16.
    rounding = torch.finfo(dtype).eps / (1 if dtype is torch.bfloat16 and device.type == "cpu" else 2)
    for mine, truth in ((out, right), (grad, slope)):
        assert mine.isfinite().all()
        assert ((mine.double() - truth).abs() <= truth.abs() * (rounding + 1e-6) + 1e-7).all()


def test_strided_inputs(device, at_most_twice):
    x, bias = inputs(device, (4, 12), torch.float32)
    compare(
        at_most_twice, (x.detach().T.contiguous().T.requires_grad_(), bias.detach().repeat(2)[::2].requires_grad_())
    )


@pytest.mark.slow
def test_is_repeatable_to_the_bit(device):
    arguments = inputs(device, (520, 16), torch.float32)
    weights = torch.randn(520, 16, device=device)
    for a, b in zip(*(results(bias_gelu, arguments, weights) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_opcheck_and_compile_without_a_graph_break(device):
    arguments = inputs(device, (3, 16), torch.float32)
    torch.library.opcheck(module._op, arguments)
    weights = torch.randn(3, 16, device=device)
    whole = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(whole, arguments, weights), results(bias_gelu, arguments, weights), strict=True):
        assert torch.equal(a, b)


def test_another_width_is_refused(device):
    x, bias = inputs(device, (3, 16), torch.float32)
    with pytest.raises(ValueError, match=r"bias is \(4,\), x is \(3, 16\)"):
        bias_gelu(x, bias[:4])
    with pytest.raises(ValueError, match=r"x is \(\)"):
        bias_gelu(x[0, 0], bias[:1])
