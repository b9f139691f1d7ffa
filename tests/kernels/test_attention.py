"""Attention on packed qkv against PyTorch's scaled_dot_product_attention, and its figures as compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import attention as module
from fastdeit.kernels.attention import attention
from operators import assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned")

# Triton 3.9's interpreter multiplies tiles of bfloat16 wrongly; there a GPU judges.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
LENGTHS = (5, 64, 65, 197, 198, 256, 257, 577, 578)


def by_pytorch(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def packed(device, batch, tokens, heads, head_dim, dtype, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, tokens, 3, heads, head_dim, generator=generator) * scale).to(device, dtype)


def compare(equals_pytorch, qkv):
    ours = equals_pytorch(attention, by_pytorch, [qkv.detach().requires_grad_()], ("out", "gradient"))
    assert all(tensor.is_contiguous() for tensor in ours)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 16, 64, 65, 197, 198])
def test_equals_pytorch_at_lengths(device, equals_pytorch, tokens, dtype):
    compare(equals_pytorch, packed(device, 1, tokens, 1, 64, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [207, 208, 209, 256, 257, 577, 578])
def test_equals_pytorch_where_another_launch_begins(device, equals_pytorch, tokens):
    compare(equals_pytorch, packed(device, 1, tokens, 1, 32, torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 32), (3, 64), (2, 96), (1, 128), (16, 16), (1, 40)])
def test_equals_pytorch_at_heads(device, equals_pytorch, heads, head_dim, dtype):
    compare(equals_pytorch, packed(device, 2 if heads < 16 else 1, 21, heads, head_dim, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (16, 32), (8, 96), (6, 128)])
def test_equals_pytorch_at_full_size(device, equals_pytorch, tokens, heads, head_dim, dtype):
    compare(equals_pytorch, packed(device, 8, tokens, heads, head_dim, dtype))


def test_reads_strided_views_and_nothing_beside_them(device, equals_pytorch):
    tokens, heads, head_dim = 19, 2, 32
    spaced = torch.full((2, 2 * tokens, 3, heads + 1, head_dim + 8), float("nan"), device=device, dtype=torch.float16)
    view = spaced[:, ::2, :, 1:, :head_dim]
    view.copy_(packed(device, 2, tokens, heads, head_dim, torch.float16))
    compare(equals_pytorch, view)
    # Channels of a head apart: copied.
    compare(equals_pytorch, packed(device, 2, tokens, heads, head_dim, torch.float16).mT.contiguous().mT)


@pytest.mark.slow
def test_large_scores_neither_overflow_nor_vanish(device, equals_pytorch):
    for sign in (1.0, -1.0):
        qkv = packed(device, 1, 37, 1, 64, torch.float32, scale=5.0)
        qkv[:, :, 0] = qkv[:, :, 0].abs()
        qkv[:, :, 1] = qkv[:, :, 1].abs() * sign
        compare(equals_pytorch, qkv)
        half = attention(qkv.half().requires_grad_())
        half.sum().backward()
        assert torch.isfinite(half).all()


def with_its_bias(rows):
    """Ours and PyTorch's attention as functions of qkv without its bias, and of the bias."""

    def ours(qkv, bias):
        return attention(qkv + bias.detach().view(qkv.shape[2:]), bias=bias, rows=rows)

    def theirs(qkv, bias):
        return by_pytorch(qkv + bias.view(qkv.shape[2:]))[:, :rows]

    return ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "head_dim"), [(21, None, 64), (75, None, 32), (130, 2, 64), (100, 70, 40)])
def test_first_rows_and_the_gradient_of_the_bias(device, equals_pytorch, tokens, rows, head_dim, dtype):
    qkv = packed(device, 2, tokens, 2, head_dim, dtype).requires_grad_()
    bias = torch.linspace(-1, 1, 6 * head_dim).to(device, dtype).requires_grad_()
    _, _, gradient = equals_pytorch(*with_its_bias(rows), [qkv, bias], ("out", "gradient", "bias"))
    # A bias of the keys adds the same to all scores of a query.
    assert not gradient.view(3, -1)[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows"), [(197, None), (198, 2), (577, 1), (578, 300)])
def test_first_rows_and_the_gradient_of_the_bias_at_full_size(device, equals_pytorch, tokens, rows, dtype):
    qkv = packed(device, 64, tokens, 12, 64, dtype).requires_grad_()
    bias = torch.linspace(-1, 1, 3 * 768).to(device, dtype).requires_grad_()
    equals_pytorch(*with_its_bias(rows), [qkv, bias], ("out", "gradient", "bias"))


def test_an_empty_batch(device):
    qkv = packed(device, 0, 197, 3, 64, torch.float16).requires_grad_()
    out = attention(qkv)
    assert out.shape == (0, 197, 192)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "dtype"), [(40, torch.float16), (70, torch.float32)])
def test_is_repeatable_to_the_bit(device, on_gpu, tokens, dtype):
    qkv = packed(device, 64 if on_gpu else 1, tokens, 2, 64, dtype).requires_grad_()

    def once():
        out = attention(qkv)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    assert_same_bits(once(), once())


@pytest.mark.slow
def test_opcheck_and_compile_without_a_graph_break(device):
    qkv = packed(device, 2, 9, 2, 16, torch.float32).requires_grad_()
    bias = torch.randn(96, device=device).requires_grad_()
    torch.library.opcheck(module._op, (qkv, bias, 3))
    torch.library.opcheck(module._op, (qkv, None, 9))
    whole = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expected, out = attention(qkv), whole(qkv)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(o.square().sum(), qkv)[0] for o in (out, expected)))


@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (2, 5, 2, 1, 16), (2, 5, 3, 1, 256)])
def test_what_does_not_fit_is_refused(device, shape):
    with pytest.raises(ValueError, match="head dim of at most 128"):
        attention(torch.zeros(shape, device=device))
