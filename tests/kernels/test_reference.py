"""The reference operations against PyTorch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import reference
from fastdeit.kernels.reference import assemble_tokens, hard_distillation, soft_cross_entropy, soft_distillation


def logits(seed, rows=7, classes=11, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("distilled", [False, True])
def test_tokens_are_laid_out_as_by_hand(distilled):
    patches, cls, dist = torch.randn(3, 4, 5), torch.randn(1, 1, 5), torch.randn(1, 1, 5) if distilled else None
    positions = torch.randn(1, 6 if distilled else 5, 5)
    out = assemble_tokens(patches, cls, dist, positions)
    for b in range(3):
        rows = [cls[0, 0], *([dist[0, 0]] if distilled else []), *patches[b]]
        for n, row in enumerate(rows):
            torch.testing.assert_close(out[b, n], row + positions[0, n], rtol=0, atol=0)


def test_tokens_keep_the_wider_dtype():
    half = torch.bfloat16
    args = torch.randn(1, 1, 5), None, torch.randn(1, 5, 5)
    assert assemble_tokens(torch.randn(2, 4, 5).to(half), *args).dtype is torch.float32
    low = [None if a is None else a.to(half) for a in args]
    assert assemble_tokens(torch.randn(2, 4, 5).to(half), *low).dtype is half


def test_attention_is_a_softmax_over_the_keys():
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64)
    q, k, v = qkv.unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 2
    torch.testing.assert_close(
        reference.attention(qkv), torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
    )


def test_a_masked_branch_is_added_and_normalised():
    x, branch = torch.randn(3, 4, 8), torch.randn(3, 4, 8).bfloat16()
    mask, weight, bias = torch.tensor([0.0, 1.1, 2.0]), torch.randn(8), torch.randn(8)
    total, out = reference.add_layer_norm(x, branch, weight, bias, mask=mask)
    assert torch.equal(total[0], x[0])
    assert torch.equal(total[1], x[1] + (branch[1].float() * 1.1).bfloat16())
    norm = torch.nn.LayerNorm(8, eps=1e-6)
    norm.weight.data, norm.bias.data = weight, bias
    assert torch.equal(out, norm(total))


def test_bias_gelu_keeps_the_dtype_of_its_input():
    x, bias = torch.randn(3, 8).bfloat16(), torch.randn(8)
    assert torch.equal(reference.bias_gelu(x, bias), F.gelu(x.float() + bias).bfloat16())


def test_heads_are_ranked_as_by_topk():
    cls, dist, labels = logits(3), logits(4), torch.arange(7)
    rank, decision, loss, confidence = reference.evaluate_heads(cls, dist, labels)
    mean = (cls.softmax(-1) + dist.softmax(-1)) / 2
    for head, score in enumerate((cls, dist, mean.log(), (cls + dist) / 2)):
        for k in (1, 5):
            assert torch.equal(rank[:, head] < k, (score.topk(k).indices == labels[:, None]).any(1))
        assert torch.equal(decision[:, head], score.argmax(1))
        torch.testing.assert_close(loss[:, head], F.cross_entropy(score, labels, reduction="none"))
        torch.testing.assert_close(confidence[:, head], score.softmax(-1).amax(1))
    assert torch.equal(reference.evaluate_heads(cls, None, labels)[0], rank[:, :1])


def test_positions_must_fit():
    with pytest.raises(ValueError, match="give it 5"):
        assemble_tokens(torch.randn(2, 4, 5), torch.randn(1, 1, 5), None, torch.randn(1, 6, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_equal_pytorch_in_float64(dtype):
    student, teacher = logits(0).to(dtype).requires_grad_(), logits(1).to(dtype)
    targets, labels = logits(2).softmax(-1), logits(1).argmax(-1)
    exact, told = student.detach().double().requires_grad_(), teacher.double()
    tau = 3.0
    kl = {"input": F.log_softmax(exact / tau, -1), "target": F.log_softmax(told / tau, -1), "log_target": True}
    pairs = [
        (soft_cross_entropy(student, targets), F.cross_entropy(exact, targets)),
        (soft_distillation(student, teacher, tau), F.kl_div(reduction="batchmean", **kl) * tau**2),
        (
            soft_distillation(student, teacher, tau, "elements"),
            F.kl_div(reduction="sum", **kl) * tau**2 / exact.numel(),
        ),
        (hard_distillation(student, labels), F.cross_entropy(exact, labels)),
        (hard_distillation(student, labels.to(torch.int16)), F.cross_entropy(exact, labels)),
    ]
    for ours, judge in pairs:
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), judge, rtol=1e-5, atol=1e-6)
        (mine,) = torch.autograd.grad(ours, student, retain_graph=True)
        (exactly,) = torch.autograd.grad(judge, exact, retain_graph=True)
        # A gradient is stored in the dtype of the logits: half an ulp of it is the best there is.
        torch.testing.assert_close(mine.double(), exactly, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_losses_stay_finite_where_half_precision_overflows():
    student = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16)
    for loss in (
        soft_cross_entropy(student, torch.tensor([[0.0, 1.0, 0.0]])),
        soft_distillation(student, -student, 1.0),
        hard_distillation(student, torch.tensor([1])),
    ):
        assert torch.isfinite(loss)


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    soft_distillation(student, teacher, 2.0).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_another_reduction_is_refused():
    with pytest.raises(ValueError, match="neither 'batchmean' nor 'elements'"):
        soft_distillation(logits(0), logits(1), 1.0, "mean")
