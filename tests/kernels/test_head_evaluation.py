"""Hits, decisions and losses against PyTorch's topk and the evaluation's own plain code."""

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import head_evaluation as module
from fastdeit.kernels.head_evaluation import HEADS, evaluate_heads

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(device, rows, classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(classes)
    logits = [(torch.randn(rows, classes, generator=generator) * 3).to(device, dtype) for _ in range(2)]
    return *logits, torch.randint(classes, (rows,), generator=generator).to(device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 10, 300, 2100])
def test_equals_pytorch(device, dtype, classes):
    cls, dist, labels = draw(device, 12 if classes < 2000 else 2, classes, dtype)
    found = evaluate_heads(cls, dist, labels)
    one, other = cls.float(), dist.float()
    scores = [one, other, one.softmax(-1) + other.softmax(-1), (one + other) / 2]
    losses = [F.cross_entropy(s, labels, reduction="none") for s in scores]
    losses[2] = F.nll_loss((scores[2] / 2).log(), labels, reduction="none")
    sure = [score.softmax(-1).amax(1) for score in scores]
    sure[2] = scores[2].amax(1) / 2
    for head, (score, loss) in enumerate(zip(scores, losses, strict=True)):
        torch.testing.assert_close(found.loss[:, head], loss, rtol=1e-5, atol=1e-5, msg=HEADS[head])
        torch.testing.assert_close(found.confidence[:, head], sure[head], rtol=1e-5, atol=1e-6, msg=HEADS[head])
        own = score.gather(1, labels[:, None])
        slack = own.abs() * 1e-6
        # Half precision has equal scores: the label stands between those above it and those not below.
        assert ((score > own + slack).sum(1) <= found.rank[:, head]).all()
        assert (found.rank[:, head] <= (score >= own - slack).sum(1)).all()
        chosen = score.gather(1, found.decision[:, head, None].long())[:, 0]
        torch.testing.assert_close(chosen, score.amax(1), rtol=1e-6, atol=0)
    if dtype is torch.float32:
        for k in (1, min(5, classes)):
            hits = (scores[0].topk(k).indices == labels[:, None]).any(1)
            assert torch.equal(found.rank[:, 0] < k, hits)
    assert torch.equal(evaluate_heads(cls, None, labels).rank, found.rank[:, :1])


def test_of_equal_scores_the_lower_class_is_first(device):
    flat = torch.zeros(3, 200, device=device)
    found = evaluate_heads(flat, flat, torch.tensor([0, 7, 199], device=device))
    for head in range(4):
        assert found.rank[:, head].tolist() == [0, 7, 199]
        assert not found.decision[:, head].any()


def test_a_nan_is_no_hit_and_no_class_is_no_label(device):
    broken = torch.full((2, 9), float("nan"), device=device)
    assert (evaluate_heads(broken, broken, torch.tensor([0, 8], device=device)).rank == 9).all()
    cls, dist, _ = draw(device, 2, 9)
    found = evaluate_heads(cls, dist, torch.tensor([-1, 9], device=device))
    assert (found.rank == 9).all()
    assert found.loss.isnan().all()


def test_strided_and_empty(device):
    cls, dist, labels = draw(device, 3, 20)
    both = torch.cat([cls, dist], 1)
    mine = evaluate_heads(both[:, :20], both.mT.contiguous().mT[:, 20:], labels)
    assert all(map(torch.equal, mine, evaluate_heads(cls, dist, labels)))
    assert evaluate_heads(cls[:0], dist[:0], labels[:0]).rank.shape == (0, 4)


@pytest.mark.slow
def test_opcheck(device):
    torch.library.opcheck(module._op, draw(device, 3, 20))


def test_what_does_not_fit_is_refused(device):
    cls, dist, labels = draw(device, 3, 20)
    for message, arguments in (
        ("dist_logits is", (cls, dist[:2], labels)),
        ("give 3 integers", (cls, dist, labels.float())),
        (r"cls_logits is \(20,\)", (cls[0], None, labels)),
        (r"cls_logits is \(3, 0\)", (cls[:, :0], None, labels)),
        ("labels lie on meta", (cls, dist, labels.to("meta"))),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_heads(*arguments)
