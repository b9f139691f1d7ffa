"""The objective against the released code's formula, PyTorch's and timm's losses and timm's own distillation."""

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.task.distillation import LogitDistillationTask
from timm.task.token_distillation import TokenDistillationTask

from fastdeit.config import Recipe
from fastdeit.kernels.reference import head_log_probabilities
from fastdeit.model.deit import StudentOutput
from fastdeit.pipelines.errors import UserError
from fastdeit.sections import AugmentConfig, Departures, ObjectiveConfig
from fastdeit.training.objective import build_objective
from refusals import refused

ROWS, CLASSES = 6, 9


def batch(distilled, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(ROWS, CLASSES, generator=generator) * 3

    student = StudentOutput(draw().requires_grad_(), draw().requires_grad_() if distilled else None)
    return student, draw().softmax(-1), draw()


def objective(distillation, distilled, compat="paper", smoothing=0.1, **fields):
    cfg, augment = ObjectiveConfig(distillation=distillation, **fields), AugmentConfig(label_smoothing=smoothing)
    recipe = Recipe(name="test", compat=compat, objective=cfg, augment=augment).resolved()
    return build_objective(recipe.objective, distilled, recipe.departures)


def released_loss(student, targets, teacher, kind, alpha, tau):
    """The formula of the released losses.py; it has the distillation head only, here also the class head alone."""
    learner = student.cls if student.dist is None else student.dist
    base = SoftTargetCrossEntropy()(student.cls, targets)
    if kind == "soft":
        s, t = F.log_softmax(learner / tau, 1), F.log_softmax(teacher / tau, 1)
        distill = F.kl_div(s, t, reduction="sum", log_target=True) * tau * tau / learner.numel()
    else:
        distill = F.cross_entropy(learner, teacher.argmax(1))
    return base * (1 - alpha) + distill * alpha


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_released_compat_is_the_released_loss(kind, distilled):
    student, targets, teacher = batch(distilled)
    told = teacher if kind == "soft" else teacher.argmax(-1)
    parts = objective(kind, distilled, "released")(student, targets, told)
    torch.testing.assert_close(parts.loss, released_loss(student, targets, teacher, kind, 0.5, 1.0))


@pytest.mark.parametrize(
    ("fields", "judge"),
    [
        ({}, BinaryCrossEntropy()),
        ({"bce_target_thresh": 0.0}, BinaryCrossEntropy(target_threshold=0.0)),
        ({"bce_target_thresh": 0.1, "bce_sum": True}, BinaryCrossEntropy(target_threshold=0.1, sum_classes=True)),
    ],
)
def test_binary_cross_entropy_is_timms(fields, judge):
    student, targets, _ = batch(False)
    parts = objective("none", False, smoothing=0.0, loss="bce", **fields)(student, targets, None)
    torch.testing.assert_close(parts.loss, judge(student.cls, targets))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_binary_cross_entropy_with_a_teacher_is_the_released_loss(kind):
    """Its main.py gives `DistillationLoss` a BCEWithLogitsLoss, its engine.py the targets above 0."""
    student, targets, teacher = batch(True)
    told = teacher if kind == "soft" else teacher.argmax(-1)
    fields = {"loss": "bce", "bce_target_thresh": 0.0}
    parts = objective(kind, True, "released", smoothing=0.0, **fields)(student, targets, told)
    base = torch.nn.BCEWithLogitsLoss()(student.cls, targets.gt(0.0).float())
    with_ce = released_loss(student, targets, teacher, kind, 0.5, 1.0)
    expected = with_ce + 0.5 * (base - SoftTargetCrossEntropy()(student.cls, targets))
    torch.testing.assert_close(parts.loss, expected)


@pytest.mark.parametrize(
    ("threshold", "reason"),
    [
        (-0.1, r"bce_target_thresh is -0\.1: it must be at least 0 and less than 1"),
        (1.0, r"bce_target_thresh is 1\.0: it must be at least 0 and less than 1"),
        (float("nan"), "bce_target_thresh is nan: it must be a finite number"),
        (0.0, r"label_smoothing 0\.1 makes every class a target"),
    ],
)
def test_a_threshold_that_no_target_can_be_above_or_below_is_refused(threshold, reason):
    refused(reason, objective, "none", False, loss="bce", bce_target_thresh=threshold)


@pytest.mark.parametrize("distilled", [False, True])
def test_soft_with_other_weights_is_the_released_loss(distilled):
    student, targets, teacher = batch(distilled)
    parts = objective("soft", distilled, "released", alpha=0.2, tau=4.0)(student, targets, teacher)
    torch.testing.assert_close(parts.loss, released_loss(student, targets, teacher, "soft", 0.2, 4.0))


@pytest.mark.parametrize("distilled", [False, True])
def test_paper_soft_is_cross_entropy_and_mean_divergence(distilled):
    student, targets, teacher = batch(distilled)
    parts = objective("soft", distilled)(student, targets, teacher)
    learner = student.dist if distilled else student.cls
    s, t = F.log_softmax(learner / 3, 1), F.softmax(teacher / 3, 1)
    base, distill = F.cross_entropy(student.cls, targets), 9 * F.kl_div(s, t, reduction="batchmean")
    torch.testing.assert_close(parts.base, base)
    torch.testing.assert_close(parts.distill, distill)
    torch.testing.assert_close(parts.loss, 0.9 * base + 0.1 * distill)


def test_no_teacher_is_timms_soft_target_cross_entropy():
    student, targets, _ = batch(False)
    parts = objective("none", False)(student, targets, None)
    torch.testing.assert_close(parts.loss, SoftTargetCrossEntropy()(student.cls, targets))
    assert parts.distill == 0


def test_two_class_tokens_share_the_true_label():
    student, targets, _ = batch(True)
    parts = objective("none", True)(student, targets, None)
    heads = [SoftTargetCrossEntropy()(head, targets) for head in student]
    torch.testing.assert_close(parts.loss, sum(heads) / 2)
    parts.loss.backward()
    assert student.cls.grad is not None
    assert student.dist.grad is not None


def test_each_head_learns_from_its_own_teacher():
    """With the token, the class head's gradient is that of half the true label's loss alone."""
    student, targets, teacher = batch(True)
    objective("hard", True)(student, targets, teacher.argmax(-1)).loss.backward()
    cls, dist = student.cls.detach().requires_grad_(), student.dist.detach().requires_grad_()
    (F.cross_entropy(cls, targets) / 2 + F.cross_entropy(dist, teacher.argmax(-1)) / 2).backward()
    torch.testing.assert_close(student.cls.grad, cls.grad)
    torch.testing.assert_close(student.dist.grad, dist.grad)


@pytest.mark.parametrize(("kind", "distilled"), [("soft", True), ("hard", True), ("soft", False)])
def test_timms_distillation_agrees(kind, distilled):
    """timm's task runs both networks; its student's heads and its teacher's logits go through ours."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": CLASSES}
    network = timm.create_model(f"deit_tiny_{'distilled_' * distilled}patch16_224", **shape)
    mentor = timm.create_model("deit_tiny_patch16_224", **shape)
    torch.nn.init.normal_(mentor.head.weight)
    task = functools.partial(TokenDistillationTask, distill_type=kind) if distilled else LogitDistillationTask
    weight = 0.5 if kind == "hard" else 0.9
    options = {"criterion": SoftTargetCrossEntropy(), "temperature": 3.0, "task_loss_weight": weight, "verbose": False}
    images, targets = torch.randn(ROWS, 3, 16, 16), torch.randn(ROWS, CLASSES).softmax(-1)
    judge = task(network, mentor, **options).train()(images, targets)["loss"]
    with torch.no_grad():
        logits = mentor.eval()(images)
    student = StudentOutput(*network(images)) if distilled else StudentOutput(network(images), None)
    parts = objective(kind, distilled)(student, targets, logits if kind == "soft" else logits.argmax(-1))
    torch.testing.assert_close(parts.loss, judge)


def test_mistakes_are_named():
    student, targets, teacher = batch(True)
    plain = StudentOutput(student.cls, None)
    for call, message in (
        (lambda: objective("hard", True)(student, targets, None), "no teacher output was given"),
        (lambda: objective("none", True)(student, targets, teacher), "a teacher output was given"),
        (lambda: objective("none", False)(student, targets, None), "without distillation token"),
        (lambda: objective("soft", True)(plain, targets, teacher), "with distillation token"),
        (lambda: objective("hard", True)(student, targets, teacher), r"labels \(6,\)"),
        (lambda: objective("soft", True)(student, targets, teacher[:, :4]), r"logits \(6, 9\)"),
        (lambda: objective("soft", True, alpha=1.5), "objective.alpha 1.5"),
        (lambda: objective("soft", True, tau=0.0), "objective.tau 0.0"),
        (lambda: build_objective(ObjectiveConfig(), True, Departures()), "resolved"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            call()


def test_fused_logits_are_timms_evaluation():
    torch.manual_seed(0)
    judge = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2
    )
    images = torch.randn(ROWS, 3, 16, 16)
    with torch.no_grad():
        averaged = judge.eval()(images)
        judge.train().set_distilled_training(True)
        heads = StudentOutput(*judge(images))
    *_, fused = head_log_probabilities(*heads)
    torch.testing.assert_close(fused, averaged.log_softmax(-1))


def test_fused_probabilities_are_the_sum_of_softmaxes():
    student, _, _ = batch(True)
    judge = torch.nn.Softmax(dim=1)
    _, _, fused, _ = head_log_probabilities(*student)
    torch.testing.assert_close(2 * fused.exp(), judge(student.cls) + judge(student.dist))
    (alone,) = head_log_probabilities(student.cls, None)
    torch.testing.assert_close(alone, judge(student.cls).log())
