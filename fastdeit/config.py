"""A recipe: everything that determines a training run.

Its fields are in `sections.py`, named recipes in `recipes/`. A run stores its resolved recipe. This file imports no
PyTorch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.plan.curriculum import Curriculum
from fastdeit.sections import (
    COMPAT,
    COMPAT_RUN,
    AugmentConfig,
    CurriculumConfig,
    DataConfig,
    Departures,
    EmaConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
)

_YEAR = 366 * 24 * 60  # minutes

# Fields that recipes of older versions lack; with the defaults, the steps are the same as in those versions.
LATER = {
    "augment.crop",
    "curriculum.magnitudes",
    "curriculum.sizes",
    "data.cache_dir",
    "data.fraction",
    "data.hold_out",
    "model.drop_path_uniform",
    "model.grad_checkpointing",
    "model.layer_scale",
    "model.no_embed_class",
    "model.residual_dtype",
    "objective.bce_sum",
    "objective.bce_target_thresh",
    "objective.loss",
    "optim.decay_epochs",
    "optim.layer_decay",
    "optim.schedule",
    "optim.warmup_prefix",
    "run.checkpoint_minutes",
    "run.checkpoint_patience",
    "run.best_metric",
    "run.on_divergence",
    "run.divergence_band",
    "run.timeout_minutes",
    "run.wandb",
}

_curriculum = lru_cache(maxsize=8)(Curriculum)  # each step asks for it
SOFT_DEFAULTS = {"paper": (0.1, 3.0), "released": (0.5, 1.0)}  # alpha, tau


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    name: str
    compat: Literal["paper", "released"] = "paper"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)
    departures: Departures = field(default_factory=Departures)

    def resolved(self) -> Recipe:
        """This recipe with each None that `compat` decides filled in, after all checks that need no data.

        Raises UserError naming the field and the remedy.
        """
        out = self.filled()
        out._check()
        return out

    def filled(self) -> Recipe:
        """Like `resolved`, without the checks."""
        base = COMPAT[self.compat]
        filled = {
            f.name: getattr(base, f.name)
            for f in dataclasses.fields(Departures)
            if getattr(self.departures, f.name) is None
        }
        alpha, tau = SOFT_DEFAULTS[self.compat]
        objective = dataclasses.replace(
            self.objective,
            alpha=alpha if self.objective.alpha is None else self.objective.alpha,
            tau=tau if self.objective.tau is None else self.objective.tau,
        )
        optim = self.optim
        if optim.name == "adamw":
            optim = dataclasses.replace(
                optim, betas=optim.betas or (0.9, 0.999), eps=1e-8 if optim.eps is None else optim.eps
            )
        run: dict[str, Any] = {k: v for k, v in COMPAT_RUN[self.compat].items() if getattr(self.run, k) is None}
        return dataclasses.replace(
            self,
            departures=dataclasses.replace(self.departures, **filled),
            objective=objective,
            optim=optim,
            run=dataclasses.replace(self.run, **run),
        )

    def mixing_group(self, processes: int) -> int:
        """The number of samples in a mixing group; for a resolved recipe."""
        return min(self.departures.mix_group or self.run.global_batch // processes, self.run.global_batch)

    def parts(self) -> Curriculum:
        """The parts of the run. Raises UserError if they do not fit each other or the run."""
        cfg = self.curriculum
        magnitudes = cfg.magnitudes if self.augment.policy == "randaugment" else ()
        return _curriculum(self.run.epochs, self.model.img_size, tuple(cfg.sizes), tuple(magnitudes))

    def _check(self) -> None:
        run, model, optim = self.run, self.model, self.optim
        for section, values in dataclasses.asdict(self).items():
            for name, value in values.items() if isinstance(values, dict) else ():
                each = value if isinstance(value, tuple) else (value,)
                if not all(math.isfinite(number) for number in each if isinstance(number, float)):
                    raise UserError(f"{section}.{name} is {value}: it must be a finite number")
        self._check_least(1, "model", "img_size", "patch_size", "embed_dim", "depth", "num_heads")
        self._check_least(0, "optim", "lr", "eps", "weight_decay", "momentum")
        self._check_least(0, "model", "layer_scale")
        if not 0 < optim.layer_decay <= 1:
            raise UserError(f"optim.layer_decay is {optim.layer_decay}: it must be more than 0 and at most 1")
        if optim.layer_decay != 1 and (model.arch != "deit" or optim.implementation != "torch"):
            raise UserError(
                f"optim.layer_decay {optim.layer_decay:g} needs model.arch 'deit' and optim.implementation 'torch': "
                f"set --optim.layer_decay 1"
            )
        if not all(0 <= beta < 1 for beta in optim.betas or ()):
            raise UserError(f"optim.betas are {optim.betas}: each must be at least 0 and less than 1")
        for name, value in (("model.drop_rate", model.drop_rate), ("model.drop_path", model.drop_path)):
            if not 0 <= value < 1:
                raise UserError(f"{name} is {value}: it must be at least 0 and less than 1")
        if model.arch != "deit":
            if model.distilled:
                raise UserError(f"model.distilled needs model.arch 'deit', not '{model.arch}'")
            if model.drop_path_mode != "mask":
                raise UserError(f"model.drop_path_mode 'skip' needs model.arch 'deit', not '{model.arch}'")
        elif model.img_size % model.patch_size:
            raise UserError(f"model.img_size {model.img_size} is not a multiple of model.patch_size {model.patch_size}")
        elif model.embed_dim % model.num_heads:
            raise UserError(f"model.embed_dim {model.embed_dim} is not a multiple of model.num_heads {model.num_heads}")
        self._check_least(1, "run", "epochs", "global_batch")
        self._check_least(1, "data", "repeats", "cell_groups", "prefetch")
        self._check_least(1, "run", "eval_batch", "eval_every", "log_every", "keep_checkpoints")
        self._check_least(0, "run", "micro_batch", "checkpoint_every", "checkpoint_minutes", "checkpoint_patience")
        self._check_least(0, "run", "divergence_band", "profile")
        if not 0 < run.timeout_minutes <= _YEAR:
            raise UserError(
                f"run.timeout_minutes is {run.timeout_minutes:g}: it must be more than 0 and at most {_YEAR}, a year"
            )
        self._check_batch()
        if optim.name not in ("adamw", "lamb") and optim.implementation != "torch":
            raise UserError(
                f"optim.implementation applies to adamw and lamb: leave it at 'torch' with optim.name '{optim.name}'"
            )
        after = max(0.0, run.epochs - optim.warmup_epochs)
        if optim.schedule == "wsd" and not 0 <= optim.decay_epochs <= after:
            raise UserError(
                f"optim.decay_epochs is {optim.decay_epochs:g}: with optim.schedule 'wsd' it must be from 0 to "
                f"{after:g}, the epochs after warm-up"
            )
        self._check_curriculum()
        self._check_objective()
        if not 0 <= self.data.hold_out < 1:
            raise UserError(f"data.hold_out is {self.data.hold_out}: it must be at least 0 and less than 1")
        if self.data.hold_out and self.data.val is not None:
            raise UserError(
                f"data.hold_out {self.data.hold_out:g} and data.val {self.data.val} exclude each other: "
                f"leave one of them out"
            )
        if not 0 < self.data.fraction <= 1:
            raise UserError(f"data.fraction is {self.data.fraction}: it must be more than 0 and at most 1")
        if not 0 <= self.data.hw_decoder_load <= 1:
            raise UserError(f"data.hw_decoder_load is {self.data.hw_decoder_load}: it must be from 0 to 1")
        if model.finetune and model.init is None:
            raise UserError(f"recipe {self.name} starts from trained weights: give --model.init CHECKPOINT")
        if self.teacher.labels is not None and self.data.on_error == "replace":
            raise UserError(
                "teacher.labels belong to the images of the data set, and would be wrong for one that is replaced: "
                "set data.on_error to 'fail', or train with the teacher itself"
            )
        if (
            self.departures.finetune_distillation == "refused"
            and model.init is not None
            and self.objective.distillation != "none"
        ):
            raise UserError(
                "compat 'released' refuses distillation while fine-tuning: "
                "set departures.finetune_distillation to 'allowed', or objective.distillation to 'none'"
            )

    def _check_least(self, least: int, section: str, *names: str) -> None:
        """Each of the fields must be `least` or more, or None."""
        for name in names:
            value = getattr(getattr(self, section), name)
            if value is not None and value < least:
                wanted = f"at least {least}" if least else "0 or more"
                raise UserError(f"{section}.{name} is {value}: it must be {wanted}")

    def _check_curriculum(self) -> None:
        model, sizes = self.model, self.curriculum.sizes
        self.parts()
        if sizes and model.arch != "deit":
            raise UserError(f"curriculum.sizes need model.arch 'deit', not '{model.arch}'")
        for size in sizes:
            if size % model.patch_size:
                raise UserError(f"curriculum.sizes has {size}, not a multiple of model.patch_size {model.patch_size}")

    def _check_objective(self) -> None:
        objective, smoothing = self.objective, self.augment.label_smoothing
        threshold = objective.bce_target_thresh
        if threshold is not None and not 0 <= threshold < 1:
            raise UserError(f"objective.bce_target_thresh is {threshold}: it must be at least 0 and less than 1")
        if objective.loss == "bce" and threshold == 0 and smoothing > 0:
            raise UserError(
                f"objective.bce_target_thresh 0 with augment.label_smoothing {smoothing:g} makes every class a target: "
                f"set --augment.label_smoothing 0, or another --objective.bce_target_thresh"
            )

    def _check_batch(self) -> None:
        """Mixing groups must divide the global batch, and be even if Mixup or CutMix is on."""
        batch, group, augment = self.run.global_batch, self.departures.mix_group or 0, self.augment
        if group < 0:
            raise UserError(f"departures.mix_group is {group}: it must be 0 or more")
        if 0 < group < batch and batch % group:
            low = batch - batch % group
            raise UserError(
                f"run.global_batch is {batch}, not a multiple of departures.mix_group, {group}: "
                f"set --run.global_batch {low} or {low + group}, or another --departures.mix_group"
            )
        shared = self.mixing_group(1)
        micro, skips = self.run.micro_batch, self.model.drop_path_mode == "skip" and self.model.drop_path > 0
        if skips and micro % shared:
            raise UserError(
                f"run.micro_batch is {micro}, not a multiple of a mixing group's {shared} samples, of which "
                f"model.drop_path_mode 'skip' drops a fixed number: set a multiple of {shared}, another "
                f"departures.mix_group, or model.drop_path_mode 'mask'"
            )
        if shared % 2 and augment.mix_prob > 0 and (augment.mixup_alpha > 0 or augment.cutmix_alpha > 0):
            name = "run.global_batch" if shared == batch else "departures.mix_group"
            raise UserError(
                f"{name} is {shared}, but Mixup and CutMix mix pairs of samples: set an even --{name}, "
                f"or --augment.mix_prob 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types (paths as strings, tuples as lists)."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v) for v in value]
            return str(value) if isinstance(value, Path) else value

        return plain(dataclasses.asdict(self))


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A file's or a checkpoint's `values` with the fields of `COMPAT_RUN` under `run`; they once were departures.

    A value under `run` wins.
    """
    departures, run = values.get("departures"), values.get("run", {})
    if not isinstance(departures, dict) or not isinstance(run, dict):
        return values
    moved = {name: value for name, value in departures.items() if name in COMPAT_RUN["paper"]}
    if not moved:
        return values
    kept = {name: value for name, value in departures.items() if name not in moved}
    return {**values, "departures": kept, "run": {**moved, **run}}
