"""Layer normalisation with the residual addition against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import layer_norm as module
from fastdeit.kernels.layer_norm import add_layer_norm, layer_norm

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-6


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


def results(function, arguments, weights):
    """Both outputs and the gradients, when both are used."""
    total, out = function(*arguments)
    loss = (total * weights[0].to(total.dtype)).sum() + (out * weights[1].to(out.dtype)).sum()
    return [total, out, *torch.autograd.grad(loss, [a for a in arguments if a is not None and a.requires_grad])]


def compare(at_most_twice, arguments):
    exact = [a if a is None or not a.requires_grad else a.detach().double().requires_grad_() for a in arguments]
    generator = torch.Generator().manual_seed(9)
    weights = [
        torch.randn(arguments[0].shape, generator=generator).bfloat16().float().to(arguments[0].device)
        for _ in range(2)
    ]
    sides = (results(f, a, weights) for f, a in ((ours, arguments), (by_pytorch, arguments), (by_pytorch, exact)))
    names = ("total", "out", "x", "branch", "weight", "bias")
    for name, mine, judge, truth in zip(names, *sides, strict=True):
        at_most_twice(mine, judge, truth, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 7, 200), (4, 1), (1, 1, 1025), (5, 130, 16)])
def test_equals_pytorch(device, at_most_twice, shape, masked, dtype):
    compare(at_most_twice, inputs(device, shape, dtype, masked))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 384, 768])
@pytest.mark.parametrize("tokens", [197, 578])
def test_equals_pytorch_at_full_size(device, at_most_twice, tokens, width):
    compare(at_most_twice, inputs(device, (256, tokens, width), torch.bfloat16))


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
def test_without_a_branch(device, at_most_twice, dtype):
    x, _, weight, bias, _ = inputs(device, (2, 9, 48), dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    sides = []
    for function, arguments in (
        (lambda *a: layer_norm(*a, EPS), (x, weight, bias)),
        (lambda x, *a: F.layer_norm(x, x.shape[-1:], *a, EPS), (x, weight, bias)),
        (lambda x, *a: F.layer_norm(x, x.shape[-1:], *a, EPS), exact),
    ):
        out = function(*arguments)
        sides.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
    for name, mine, judge, truth in zip(("out", "x", "weight", "bias"), *sides, strict=True):
        at_most_twice(mine, judge, truth, name)


def test_only_the_token_rows(device):
    x, _, weight, bias, _ = inputs(device, (3, 6, 32), torch.float32)
    out = layer_norm(x[:, :2], weight, bias, EPS)
    torch.testing.assert_close(out, F.layer_norm(x, (32,), weight, bias, EPS)[:, :2])
    out.sum().backward()
    assert not x.grad[:, 2:].any()


def test_a_row_far_from_zero_keeps_its_variance(device, at_most_twice):
    x, branch, weight, bias, mask = inputs(device, (2, 4, 64), torch.float32)
    compare(at_most_twice, ((x.detach() + 1000).requires_grad_(), branch, weight, bias, mask))


def test_a_dropped_sample_gives_its_branch_no_gradient(device):
    x, branch, weight, bias, mask = inputs(device, (3, 4, 32), torch.float32)
    sum(t.square().sum() for t in ours(x, branch, weight, bias, mask)).backward()
    assert mask[0] == 0
    assert not branch.grad[0].any()
    assert branch.grad[1:].all()


def test_strided_inputs(device, at_most_twice):
    x, branch, weight, bias, mask = inputs(device, (2, 10, 32), torch.float32)
    compare(
        at_most_twice,
        (x.detach()[:, ::2].requires_grad_(), branch.detach()[:, 5:].requires_grad_(), weight, bias, mask),
    )
    apart = [t.detach()[:1].expand(32).requires_grad_() for t in (weight, bias)]
    compare(at_most_twice, (x, branch, *apart, mask))


def test_an_empty_batch(device):
    arguments = inputs(device, (0, 4, 32), torch.float32)
    ours(*arguments)[1].sum().backward()
    for argument in arguments[2:4]:
        assert not argument.grad.any()


def test_is_repeatable_to_the_bit(device):
    arguments = inputs(device, (3, 250, 16), torch.float32)
    weights = [torch.randn(3, 250, 16, device=device) for _ in range(2)]
    for a, b in zip(*(results(ours, arguments, weights) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_opcheck_and_compile_without_a_graph_break(device):
    x, branch, weight, bias, mask = arguments = inputs(device, (2, 3, 16), torch.float32)
    torch.library.opcheck(module._op, (x, branch, mask, weight, bias, EPS, torch.float32))
    torch.library.opcheck(module._op, (x, None, None, weight, bias, EPS, torch.float32))
    weights = [torch.randn(2, 3, 16, device=device) for _ in range(2)]
    whole = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(whole, arguments, weights), results(ours, arguments, weights), strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_refused(device):
    x, branch, weight, bias, mask = inputs(device, (2, 3, 16), torch.float32)
    with pytest.raises(ValueError, match=r"give both \(16,\)"):
        layer_norm(x, weight[:8], bias)
    with pytest.raises(ValueError, match="branch is"):
        add_layer_norm(x, branch[:1], weight, bias)
    with pytest.raises(ValueError, match="each of 2 samples"):
        add_layer_norm(x, branch, weight, bias, mask=mask[:1])
    with pytest.raises(ValueError, match="each of 2 samples"):
        add_layer_norm(x, branch, weight, bias, mask=mask > 0)
    with pytest.raises(ValueError, match=r"x is \(16,\)"):
        layer_norm(x[0, 0], weight, bias)
    with pytest.raises(ValueError, match="at most 4096 channels"):
        layer_norm(x.new_zeros(1, 4097), weight.new_zeros(4097), bias.new_zeros(4097))
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        layer_norm(x, weight, bias, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weight is torch\.float64"):
        layer_norm(x, weight.double(), bias)
