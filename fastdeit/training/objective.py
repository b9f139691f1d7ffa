"""The student's loss: against the true label and against the teacher (paper, section 4 and Table 3)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastdeit.kernels import reference
from fastdeit.kernels.reference import BinaryTargets, LossParts, MixedLabels
from fastdeit.model.deit import StudentOutput
from fastdeit.pipelines.errors import UserError
from fastdeit.sections import Departures, ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a row of the paper's Table 3, chosen by `distillation` and `distilled`.

    none  L_CE(class head, y). With a distillation token, both tokens are class tokens (the paper's control for
          the token, section 4): the mean of both heads' L_CE(., y)
    soft  (1 - alpha) L_CE(class head, y) + alpha tau^2 KL(teacher / tau || student / tau)
    hard  1/2 L_CE(class head, y) + 1/2 L_CE(student, argmax teacher)

    With `binary`, binary cross-entropy takes the place of L_CE(., y), as in DeiT III (arXiv 2204.07118); the teacher's
    term stays as it is.

    "student" is the distillation head if there is one, else the class head. With `kernels`, the loss and its gradients
    come from `fastdeit.kernels.distillation_loss`.
    """

    distillation: Literal["none", "soft", "hard"]
    distilled: bool
    alpha: float
    tau: float
    reduction: Literal["batchmean", "elements"]
    binary: BinaryTargets | None = None
    kernels: bool = False

    def __call__(self, student: StudentOutput, targets: Tensor | MixedLabels, teacher: Tensor | None) -> LossParts:
        """The loss of a batch.

        student  logits (B, K)
        targets  mixed and smoothed true labels: `MixedLabels`, or the distributions (B, K)
        teacher  logits (B, K) for "soft", integer labels (B,) for "hard", None for "none"

        Raises ValueError if an input is missing, not wanted, or of another shape.
        """
        self._check(student, teacher)
        loss = reference.distillation_loss
        if self.kernels:
            from fastdeit.kernels.distillation_loss import distillation_loss as loss  # here, since it needs Triton

        options = {"alpha": self.alpha, "tau": self.tau, "reduction": self.reduction, "binary": self.binary}
        return loss(*student, targets, teacher, **options)

    def _check(self, student: StudentOutput, teacher: Tensor | None) -> None:
        if self.distilled != (student.dist is not None):
            raise ValueError(
                f"the objective is for a student {'with' if self.distilled else 'without'} distillation token, "
                f"but its output has {'none' if self.distilled else 'one'}: build both with the same model.distilled"
            )
        if (self.distillation == "none") != (teacher is None):
            raise ValueError(
                f"objective.distillation is '{self.distillation}', but "
                f"{'no teacher output was given' if teacher is None else 'a teacher output was given'}"
            )
        if teacher is not None:
            wanted = student.cls.shape if self.distillation == "soft" else student.cls.shape[:1]
            if teacher.shape != wanted:
                raise ValueError(
                    f"objective.distillation '{self.distillation}' needs the teacher's "
                    f"{'logits' if self.distillation == 'soft' else 'labels'} {tuple(wanted)}, "
                    f"not {tuple(teacher.shape)}"
                )


def build_objective(
    cfg: ObjectiveConfig, distilled: bool, departures: Departures, *, kernels: bool = False
) -> Objective:
    """The objective of a resolved recipe, computed by Triton's kernels or by PyTorch.

    Raises UserError for an alpha outside [0, 1] or a tau that is not positive, and ValueError for a recipe that is not
    resolved.
    """
    if cfg.alpha is None or cfg.tau is None or departures.soft_reduction is None:
        raise ValueError("objective.alpha, objective.tau or departures.soft_reduction is None: call Recipe.resolved()")
    if not 0 <= cfg.alpha <= 1:
        raise UserError(f"objective.alpha {cfg.alpha} is a weight: choose it from 0 to 1")
    if not cfg.tau > 0:
        raise UserError(f"objective.tau {cfg.tau} is a temperature: choose it above 0")
    return Objective(
        distillation=cfg.distillation,
        distilled=distilled,
        alpha=cfg.alpha,
        tau=cfg.tau,
        reduction=departures.soft_reduction,
        binary=BinaryTargets(cfg.bce_target_thresh, cfg.bce_sum) if cfg.loss == "bce" else None,
        kernels=kernels,
    )
