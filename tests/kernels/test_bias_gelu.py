"""Bias and GELU against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import bias_gelu as module
from fastdeit.kernels.bias_gelu import bias_gelu
from operators import assert_same_bits, results

pytestmark = pytest.mark.usefixtures("poisoned")

NAMES = ("out", "x", "bias")


def by_pytorch(x, bias):
    return F.gelu(x + bias)


def inputs(device, shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(shape, generator=generator) * 2, torch.randn(shape[-1], generator=generator)
    return x.to(device, dtype).requires_grad_(), bias.to(device, dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 300), (5, 3), (260, 8), (0, 4, 8)])
def test_equals_pytorch(device, equals_pytorch, shape, dtype):
    equals_pytorch(bias_gelu, by_pytorch, inputs(device, shape, dtype), NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1536, 3072])
def test_equals_pytorch_at_full_size(device, equals_pytorch, width):
    equals_pytorch(bias_gelu, by_pytorch, inputs(device, (256, 197, width), torch.bfloat16), NAMES)


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


def test_strided_inputs(device, equals_pytorch):
    x, bias = inputs(device, (4, 12), torch.float32)
    strided = x.detach().T.contiguous().T.requires_grad_(), bias.detach().repeat(2)[::2].requires_grad_()
    equals_pytorch(bias_gelu, by_pytorch, strided, NAMES)


@pytest.mark.slow
def test_is_repeatable_to_the_bit(device):
    arguments = inputs(device, (520, 16), torch.float32)
    weights = torch.randn(1, 520, 16, device=device)
    assert_same_bits(*(results(bias_gelu, arguments, weights) for _ in range(2)))


@pytest.mark.slow
def test_opcheck_and_compile_without_a_graph_break(device):
    arguments = inputs(device, (3, 16), torch.float32)
    torch.library.opcheck(module._op, arguments)
    weights = torch.randn(1, 3, 16, device=device)
    whole = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(whole, arguments, weights), results(bias_gelu, arguments, weights))


def test_another_width_is_refused(device):
    x, bias = inputs(device, (3, 16), torch.float32)
    with pytest.raises(ValueError, match=r"bias is \(4,\), x is \(3, 16\)"):
        bias_gelu(x, bias[:4])
    with pytest.raises(ValueError, match=r"x is \(\)"):
        bias_gelu(x[0, 0], bias[:1])
