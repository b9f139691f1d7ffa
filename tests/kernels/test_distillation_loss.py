"""The fused loss against PyTorch's cross_entropy and kl_div, and its targets against timm's."""

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy

from fastdeit.kernels import distillation_loss as module
from fastdeit.kernels.distillation_loss import distillation_loss
from fastdeit.kernels.reference import BinaryTargets, MixedLabels
from operators import assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(device, rows, classes, dtype, seed, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, classes, generator=generator) * scale).to(device, dtype)


def mixed(device, rows, classes, smoothing=0.1):
    """Labels as a mixing group has them, partner and sample in reverse order, and timm's dense target of them."""
    labels = torch.arange(rows, device=device) * 7 % classes
    # timm's lambda is a Python number; a power of two is the same number in every dtype.
    dense = mixup_target(labels, classes, 0.375, smoothing) if rows else torch.zeros(0, classes, device=device)
    return MixedLabels(labels, labels.flip(0), torch.full((rows,), 0.375, device=device), smoothing), dense


def exactly(labels, classes):
    """The dense target of mixed labels in float64."""
    sides = [F.one_hot(label, classes) * (1 - labels.smoothing) for label in labels[:2]]
    return labels.lam[:, None].double() * sides[0] + (1 - labels.lam[:, None]) * sides[1] + labels.smoothing / classes


def by_pytorch(cls, dist, dense, teacher, alpha, tau, reduction, binary=None):
    dense = dense.to(cls.dtype)
    of_labels = F.cross_entropy
    if binary is not None:
        of_labels = BinaryCrossEntropy(target_threshold=binary.threshold, sum_classes=binary.sum_classes)
    base = of_labels(cls, dense)
    if teacher is None:
        base = base if dist is None else (base + of_labels(dist, dense)) / 2
        return base, base, torch.zeros_like(base)
    learner = cls if dist is None else dist
    if not teacher.is_floating_point():
        distill = F.cross_entropy(learner, teacher)
        return (base + distill) / 2, base, distill
    parts = F.log_softmax(learner / tau, 1), F.log_softmax(teacher.to(cls.dtype) / tau, 1)
    reduced = F.kl_div(*parts, reduction="sum", log_target=True) / (
        len(cls) if reduction == "batchmean" else cls.numel()
    )
    return (1 - alpha) * base + alpha * tau**2 * reduced, base, tau**2 * reduced


def compare(at_most_twice, device, cls, dist, targets, dense, teacher, **options):
    heads = [head.requires_grad_() for head in (cls, dist) if head is not None]
    ours = distillation_loss(cls, dist, targets, teacher, **options)
    options = {"alpha": 0.1, "tau": 3.0, "reduction": "batchmean"} | options

    def judged(dtype):
        target = dense
        if dtype is torch.float64 and isinstance(targets, MixedLabels):
            target = exactly(targets, cls.shape[1])
            torch.testing.assert_close(dense.double(), target, rtol=1e-6, atol=1e-7)
        copies = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (cls, dist)]
        parts = by_pytorch(*copies, target, teacher, **options)
        return parts, [t for t in copies if t is not None]

    (same, same_heads), (exact, exact_heads) = judged(torch.float32), judged(torch.float64)
    for name, mine, judge, truth in zip(("loss", "base", "distill"), ours, same, exact, strict=True):
        at_most_twice(mine, judge, truth, name)
    grads = torch.autograd.grad(ours.loss, heads)
    truths = torch.autograd.grad(exact[0], exact_heads)
    for mine, judge, truth in zip(grads, torch.autograd.grad(same[0], same_heads), truths, strict=True):
        # Under autocast PyTorch computes the loss in float32 and rounds the gradient to the logits' dtype at the end.
        at_most_twice(mine, judge.to(mine.dtype), truth, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("teacher", ["none", "hard", "soft"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dense", [False, True])
def test_equals_pytorch(device, at_most_twice, dtype, teacher, heads, dense):
    rows, classes = 5, 300
    cls = draw(device, rows, classes, dtype, 0)
    dist = draw(device, rows, classes, dtype, 1) if heads == 2 else None
    logits = draw(device, rows, classes, dtype, 2)
    told = {"none": None, "hard": logits.argmax(1), "soft": logits}[teacher]
    labels, target = mixed(device, rows, classes)
    compare(at_most_twice, device, cls, dist, target if dense else labels, target, told)


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (3, 2), (2, 128), (2, 129), (1, 2049)])
@pytest.mark.parametrize("reduction", ["batchmean", "elements"])
def test_equals_pytorch_at_sizes(device, at_most_twice, rows, classes, reduction):
    cls, dist, teacher = (draw(device, rows, classes, torch.float32, seed) for seed in range(3))
    labels, target = mixed(device, rows, classes)
    compare(at_most_twice, device, cls, dist, labels, target, teacher, alpha=0.3, tau=1.7, reduction=reduction)


BINARY = {"soft targets": BinaryTargets(), "sum": BinaryTargets(sum_classes=True), "threshold": BinaryTargets(0.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("teacher", ["none", "hard", "soft"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("binary", BINARY)
def test_binary_cross_entropy_is_timms(device, at_most_twice, dtype, teacher, heads, binary):
    rows, classes = 5, 300
    cls = draw(device, rows, classes, dtype, 0)
    dist = draw(device, rows, classes, dtype, 1) if heads == 2 else None
    logits = draw(device, rows, classes, dtype, 2)
    told = {"none": None, "hard": logits.argmax(1), "soft": logits}[teacher]
    labels, target = mixed(device, rows, classes, smoothing=0.0)
    for targets in (labels, target):
        compare(at_most_twice, device, cls, dist, targets, target, told, binary=BINARY[binary])


def test_binary_cross_entropy_of_a_threshold_between_the_two_labels(device):
    """Lambda is 0.375: only the second label counts. By the numbers that timm's class gives for an integer target."""
    cls = draw(device, 4, 9, torch.float32, 0)
    labels, _ = mixed(device, 4, 9)
    loss = distillation_loss(cls, None, labels, None, binary=BinaryTargets(0.5)).loss
    torch.testing.assert_close(loss, BinaryCrossEntropy(smoothing=0.0)(cls, labels.label_b))


def test_binary_cross_entropy_of_extreme_logits_is_exact(device):
    """log(1 + exp(z)) of logits far below 0 is as small as in float64, not 0."""
    logits = torch.tensor([[-15.0, -17.5, -30.0, 30.0, -100.0, 100.0]], device=device).requires_grad_()
    target = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 1.0]], device=device)
    loss = distillation_loss(logits, None, target, None, binary=BinaryTargets()).loss
    wide = logits.detach().double().requires_grad_()
    exact = F.binary_cross_entropy_with_logits(wide, target.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    gradient, judge = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(exact, wide)[0]
    torch.testing.assert_close(gradient[:, :3].double(), judge[:, :3], rtol=1e-6, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("binary", [None, *BINARY])
@pytest.mark.parametrize("teacher", ["none", "hard"])
def test_binary_cross_entropy_at_full_size(device, at_most_twice, binary, teacher):
    cls, logits = (draw(device, 1024, 1000, torch.bfloat16, seed) for seed in range(2))
    labels, target = mixed(device, 1024, 1000, smoothing=0.0)
    told = None if teacher == "none" else logits.argmax(1)
    compare(at_most_twice, device, cls, None, labels, target, told, binary=BINARY.get(binary))


@pytest.mark.gpu
@pytest.mark.parametrize("teacher", ["hard", "soft"])
@pytest.mark.parametrize("classes", [1000, 21841])
def test_equals_pytorch_at_full_size(device, at_most_twice, classes, teacher):
    cls, dist, logits = (draw(device, 1024, classes, torch.bfloat16, seed) for seed in range(3))
    labels, target = mixed(device, 1024, classes)
    compare(at_most_twice, device, cls, dist, labels, target, logits if teacher == "soft" else logits.argmax(1))


def test_every_part_has_its_gradient(device):
    """Of a weighted sum of the three parts, as gradcheck has no float64 here: against PyTorch's own."""
    cls, dist, teacher = (draw(device, 4, 9, torch.float32, seed) for seed in range(3))
    labels, target = mixed(device, 4, 9)
    weights = torch.tensor([0.5, -2.0, 3.0], device=device)
    heads = cls.requires_grad_(), dist.requires_grad_()
    ours = distillation_loss(cls, dist, labels, teacher, alpha=0.4)
    judge = by_pytorch(cls, dist, target, teacher, 0.4, 3.0, "batchmean")
    grads = (torch.autograd.grad(torch.stack([*parts]) @ weights, heads) for parts in (ours, judge))
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_agrees_costs_nothing(device):
    logits = draw(device, 4, 50, torch.float32, 0, scale=20)
    labels, _ = mixed(device, 4, 50)
    assert distillation_loss(logits, logits.clone(), labels, logits.clone()).distill.abs() < 1e-6


def test_rows_apart_and_columns_apart(device, at_most_twice):
    """Rows of a wider matrix, as both heads in one GEMM give them; and columns that must be copied."""
    both = torch.full((3, 3 * 20 + 5), float("nan"), device=device)
    both[:, :60] = draw(device, 3, 60, torch.float32, 0)
    labels, target = mixed(device, 3, 20)
    compare(at_most_twice, device, both[:, :20].detach(), both[:, 20:40].detach(), labels, target, both[:, 40:60])
    apart = both[:, :60].reshape(3, 20, 3)
    parts = (apart[..., n].detach() for n in range(3))
    compare(at_most_twice, device, next(parts), next(parts), labels, target, next(parts))


def test_extremes_stay_finite(device):
    logits = torch.tensor([[6e4, -6e4, 0.0], [-6e4, 6e4, 6e4]], device=device, dtype=torch.float16)
    labels, _ = mixed(device, 2, 3)
    for teacher in (None, logits.argmax(1), -logits):
        heads = [logits.clone().requires_grad_(), (-logits).requires_grad_()]
        loss = distillation_loss(*heads, labels, teacher).loss
        assert torch.isfinite(loss)
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(loss, heads))


def test_minus_infinity_is_a_class_that_cannot_be(device):
    cls = torch.full((1, 300), -float("inf"), device=device)
    cls[:, 260:] = 1.0
    target = torch.zeros(1, 300, device=device)
    teacher = torch.tensor([270], device=device)
    ours = distillation_loss(cls, None, target, teacher).distill
    torch.testing.assert_close(ours, F.cross_entropy(cls, teacher))


@pytest.mark.parametrize("wrong", [-1, 9, 2**33])
def test_a_label_that_is_no_class_poisons_the_loss(device, wrong):
    cls = draw(device, 2, 9, torch.float32, 0).requires_grad_()
    good, bad = torch.tensor([1, 2], device=device), torch.tensor([1, wrong], device=device)
    share = torch.ones(2, device=device)
    for targets, teacher in ((MixedLabels(good, bad, share, 0.1), None), (MixedLabels(good, good, share, 0.1), bad)):
        loss = distillation_loss(cls, None, targets, teacher).loss
        assert loss.isnan()
        (grad,) = torch.autograd.grad(loss, cls)
        assert grad[1].isnan().all()
        assert not grad[0].isnan().any()


def test_an_empty_batch_is_pytorchs_nan(device):
    labels, _ = mixed(device, 0, 9)
    cls = torch.zeros(0, 9, device=device, requires_grad=True)
    loss = distillation_loss(cls, None, labels, None).loss
    assert loss.isnan()
    loss.backward()
    assert cls.grad.shape == (0, 9)


def test_no_gradient_reaches_targets_or_teacher(device):
    cls, target, teacher = (draw(device, 3, 8, torch.float32, seed).requires_grad_() for seed in range(3))
    distillation_loss(cls, None, target, teacher).loss.backward()
    assert cls.grad is not None
    assert target.grad is None
    assert teacher.grad is None


@pytest.mark.slow
def test_is_repeatable_to_the_bit(device):
    cls, dist, teacher = (draw(device, 40, 70, torch.float32, seed).requires_grad_() for seed in range(3))
    labels, _ = mixed(device, 40, 70)

    def once():
        parts = distillation_loss(cls, dist, labels, teacher)
        return [*parts, *torch.autograd.grad(parts.loss, (cls, dist))]

    assert_same_bits(once(), once())


@pytest.mark.slow
def test_opcheck_and_compile_without_a_graph_break(device):
    cls, dist, teacher = (draw(device, 3, 8, torch.float32, seed) for seed in range(3))
    heads = cls.requires_grad_(), dist.requires_grad_()
    labels, target = mixed(device, 3, 8)
    scalars = 0.1, 3.0, 0.9, 0.1, 1.0, 1.0
    plain, binary = ("cross_entropy", 0.0), ("binary_threshold", 0.2)
    torch.library.opcheck(module._op, (cls, dist, None, *labels[:3], teacher, *scalars, *plain))
    torch.library.opcheck(module._op, (cls, None, target, None, None, None, None, *scalars, *binary))
    found = []
    for function in (distillation_loss, torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")):
        parts = function(cls, dist, labels, teacher)
        found.append([*parts, *torch.autograd.grad(parts.loss, heads)])
    assert_same_bits(*found)


def test_what_does_not_fit_is_refused(device):
    cls = draw(device, 3, 8, torch.float32, 0)
    labels, target = mixed(device, 3, 8)
    for message, call in (
        ("neither 'batchmean' nor 'elements'", lambda: distillation_loss(cls, None, labels, cls, reduction="mean")),
        ("temperature", lambda: distillation_loss(cls, None, labels, cls, tau=0.0)),
        (r"dist_logits is \(3, 7\)", lambda: distillation_loss(cls, cls[:, :7], labels, None)),
        (r"teacher is \(2,\)", lambda: distillation_loss(cls, None, labels, labels.label_a[:2])),
        (r"targets is \(2, 8\)", lambda: distillation_loss(cls, None, target[:2], None)),
        ("give integers", lambda: distillation_loss(cls, None, labels._replace(label_a=labels.lam), None)),
        ("labels as MixedLabels", lambda: distillation_loss(cls, None, labels.label_a, None)),
        (r"teacher is of torch\.bool", lambda: distillation_loss(cls, None, labels, labels.label_a > 0)),
        ("share of the loss", lambda: distillation_loss(cls, None, labels, cls, alpha=2.0)),
        (r"cls_logits is \(1, 3, 8\)", lambda: distillation_loss(cls[None], None, labels, None)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
