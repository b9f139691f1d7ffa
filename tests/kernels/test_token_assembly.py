"""Token assembly against PyTorch's own cat and add."""

import pytest
import torch
from timm.layers import PatchEmbed

from fastdeit.kernels import token_assembly
from fastdeit.kernels.token_assembly import assemble_tokens, embed_patches
from operators import assert_same_bits, results

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(device, batch, patches, width, prefix, bias, dtype, seed=0, positioned=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    return (
        draw(batch, patches, width),
        draw(1, 1, width),
        draw(1, prefix - 1, width) if prefix > 1 else None,
        draw(1, patches + (prefix if positioned else 0), width),
        draw(width) if bias else None,
    )


def by_pytorch(patches, cls_token, dist_token, pos_embed, bias):
    patches = patches if bias is None else patches + bias
    tokens = [t.expand(len(patches), -1, -1) for t in (cls_token, dist_token) if t is not None]
    if pos_embed.shape[1] == patches.shape[1]:
        return torch.cat([*tokens, patches + pos_embed], 1)
    return torch.cat([*tokens, patches], 1) + pos_embed


def compare(equals_pytorch, arguments):
    names = [n for n, a in zip(("patches", "cls", "dist", "pos", "bias"), arguments, strict=True) if a is not None]
    equals_pytorch(assemble_tokens, by_pytorch, arguments, ["out", *names])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("prefix", "bias"), [(1, False), (2, True)])
@pytest.mark.parametrize(("batch", "patches", "width"), [(3, 4, 64), (2, 5, 200), (1, 1, 1), (70, 2, 32)])
def test_equals_pytorch(device, equals_pytorch, batch, patches, width, prefix, bias, dtype):
    compare(equals_pytorch, inputs(device, batch, patches, width, prefix, bias, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("positioned", [False, True])
def test_register_tokens_and_tokens_without_position(device, equals_pytorch, positioned, prefix, dtype):
    """As in DINOv2 (arXiv 2309.16588) and DeiT III (arXiv 2204.07118)."""
    compare(equals_pytorch, inputs(device, 70, 4, 40, prefix, True, dtype, positioned=positioned))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 384, 768])
@pytest.mark.parametrize("patches", [196, 576])
def test_equals_pytorch_at_full_size(device, equals_pytorch, patches, width):
    compare(equals_pytorch, inputs(device, 256, patches, width, 2, True, torch.bfloat16))


def test_mixed_dtypes_give_the_wider(device):
    patches, cls_token, dist_token, pos_embed, bias = inputs(device, 2, 3, 16, 2, True, torch.float32)
    low = patches.detach().half().requires_grad_()
    out = assemble_tokens(low, cls_token, dist_token, pos_embed, bias)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, by_pytorch(low.float(), cls_token, dist_token, pos_embed, bias))
    out.sum().backward()
    assert low.grad.dtype is torch.float16
    assert cls_token.grad.dtype is torch.float32


def test_a_narrower_dtype_rounds_once(device):
    arguments = inputs(device, 2, 3, 16, 2, True, torch.float32)
    exact = assemble_tokens(*arguments)
    out = assemble_tokens(*arguments, dtype=torch.float16)
    assert torch.equal(out, exact.half())
    gradients = [torch.autograd.grad(each.float().square().sum(), arguments) for each in (out, exact)]
    for mine, judge in zip(*gradients, strict=True):
        assert mine.dtype is torch.float32
        torch.testing.assert_close(mine, judge, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        assemble_tokens(*arguments, dtype=torch.float64)


def test_reads_a_convolution_output_where_it_lies(device, equals_pytorch):
    storage = torch.full((2, 24, 3, 8), float("nan"), device=device)
    storage[..., :3] = torch.randn(2, 24, 3, 3, device=device)
    arguments = list(inputs(device, 2, 9, 24, 1, True, torch.float32))
    view = storage[..., :3].flatten(2).transpose(1, 2)
    assert not view.is_contiguous()
    arguments[0] = view.requires_grad_()
    compare(equals_pytorch, arguments)
    apart = list(inputs(device, 2, 9, 48, 1, True, torch.float32))
    spaced = torch.full((2, 18, 96), float("nan"), device=device)
    spaced[:, ::2, ::2] = apart[0].detach()
    apart[0] = spaced[:, ::2, ::2].requires_grad_()
    compare(equals_pytorch, apart)


def test_an_empty_batch_has_gradients(device):
    arguments = inputs(device, 0, 4, 16, 2, True, torch.float32)
    out = assemble_tokens(*arguments)
    assert out.shape == (0, 6, 16)
    out.sum().backward()
    for argument in arguments:
        assert not argument.grad.any()


@pytest.mark.slow
def test_is_repeatable_to_the_bit(device):
    arguments = inputs(device, 130, 3, 40, 2, True, torch.float32)
    weights = torch.randn(1, 130, 5, 40, device=device)
    assert_same_bits(*(results(assemble_tokens, arguments, weights) for _ in range(2)))


def test_equals_timm_from_patches(device):
    """The convolution of timm's patch embedding, as a GEMM over patches that are laid out already."""
    embed = PatchEmbed(16, 4, 3, 32).to(device)
    images = torch.randn(2, 3, 16, 16, device=device)
    _, cls_token, dist_token, pos_embed, _ = inputs(device, 2, 16, 32, 2, False, torch.float32)
    pixels = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 48)
    out = embed_patches(pixels, embed.proj.weight, embed.proj.bias, cls_token, dist_token, pos_embed)
    torch.testing.assert_close(out, by_pytorch(embed(images), cls_token, dist_token, pos_embed, None))


@pytest.mark.slow
def test_opcheck_and_compile_without_a_graph_break(device):
    patches, cls_token, dist_token, pos_embed, bias = arguments = inputs(device, 2, 3, 16, 2, True, torch.float32)
    torch.library.opcheck(token_assembly._op, (patches, bias, cls_token, dist_token, pos_embed, torch.float32))
    torch.library.opcheck(token_assembly._op, (patches, None, cls_token, None, pos_embed[:, 1:], torch.float16))
    weights = torch.randn(1, 2, 5, 16, device=device)
    whole = torch.compile(assemble_tokens, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(whole, arguments, weights), results(assemble_tokens, arguments, weights))


def test_what_does_not_fit_is_refused(device):
    patches, cls_token, dist_token, pos_embed, bias = inputs(device, 2, 3, 16, 2, True, torch.float32)
    for message, arguments in (
        (r"pos_embed is \(1, 5, 16\), .* need \(1, 4, 16\)", (patches, cls_token, None, pos_embed)),
        (r"bias is \(8,\), .* need \(16,\)", (patches, cls_token, dist_token, pos_embed, bias[:8])),
        (
            r"cls_token is \(2, 1, 16\), .* need \(1, 1, 16\)",
            (patches, cls_token.expand(2, -1, -1), dist_token, pos_embed),
        ),
        (r"patches are \(6, 16\)", (patches.flatten(0, 1), cls_token, dist_token, pos_embed)),
        (r"patches is torch\.float64", (patches.double(), cls_token, dist_token, pos_embed)),
    ):
        with pytest.raises(ValueError, match=message):
            assemble_tokens(*arguments)
    with pytest.raises(ValueError, match="lay images out with"):
        embed_patches(torch.zeros(2, 3, 8, 8, device=device), bias.new_zeros(16, 3, 4, 4), None, *[cls_token] * 3)


def test_without_a_gpu_a_remedy_is_named(device, on_gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="or set TRITON_INTERPRET=1"):
        assemble_tokens(*inputs(torch.device("cpu"), 2, 3, 16, 2, True, torch.float32))
