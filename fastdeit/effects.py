"""When each field of a recipe has an effect; a given value without effect is an error.

`EFFECTS` has every field, with its condition as code and as words.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from fastdeit.config import Recipe
from fastdeit.pipelines.errors import UserError
from fastdeit.sections import LITE0


class Effect(NamedTuple):
    """When a field has an effect in a resolved recipe; `needs` completes "it needs ..."."""

    holds: Callable[[Recipe], bool]
    needs: str


def _mixes(r: Recipe) -> bool:
    return r.augment.mix_prob > 0 and (r.augment.mixup_alpha > 0 or r.augment.cutmix_alpha > 0)


ALWAYS = Effect(lambda r: True, "")
_DEIT = Effect(lambda r: r.model.arch == "deit", "model.arch 'deit'")
_TRAIN_MODE = Effect(
    lambda r: not frozen_mode(r), "training mode: with model.init set departures.finetune_mode to 'train'"
)
_DROP_PATH = Effect(
    lambda r: r.model.arch == "deit" and r.model.drop_path > 0 and not frozen_mode(r),
    "model.arch 'deit', model.drop_path above 0 and, with model.init, departures.finetune_mode 'train'",
)
_INIT = Effect(lambda r: r.model.init is not None, "model.init")


def evaluates(r: Recipe) -> bool:
    """Whether a run has images to evaluate on."""
    return r.data.val is not None or r.data.hold_out > 0


_VAL = Effect(evaluates, "data.val or data.hold_out")
_DALI = Effect(lambda r: r.data.loader == "dali", "data.loader 'dali'")
_COPIES = Effect(lambda r: r.data.repeats > 1, "data.repeats above 1")
_CELLS = Effect(
    lambda r: r.data.repeats > 1 and r.departures.placement == "local",
    "data.repeats above 1 and departures.placement 'local'",
)
_RANDAUGMENT = Effect(lambda r: r.augment.policy == "randaugment", "augment.policy 'randaugment'")
_RANDOM_RESIZED = Effect(lambda r: r.augment.crop == "random_resized", "augment.crop 'random_resized'")
_THREE_AUGMENT = Effect(lambda r: r.augment.policy == "three_augment", "augment.policy 'three_augment'")
_ERASES = Effect(lambda r: r.augment.erase_prob > 0, "augment.erase_prob above 0")
# An alpha of 0 turns its kind of mixing off, which is never an error.
_MIXUP_ALPHA = Effect(lambda r: r.augment.mix_prob > 0 or not r.augment.mixup_alpha, "augment.mix_prob above 0")
_CUTMIX_ALPHA = Effect(lambda r: r.augment.mix_prob > 0 or not r.augment.cutmix_alpha, "augment.mix_prob above 0")
_BOTH_MIXES = Effect(
    lambda r: _mixes(r) and r.augment.mixup_alpha > 0 and r.augment.cutmix_alpha > 0,
    "augment.mixup_alpha, augment.cutmix_alpha and augment.mix_prob above 0",
)
_CUTMIX = Effect(
    lambda r: _mixes(r) and r.augment.cutmix_alpha > 0, "augment.cutmix_alpha and augment.mix_prob above 0"
)
_DISTILS = Effect(
    lambda r: r.objective.distillation != "none", "distillation: set objective.distillation to 'hard' or 'soft'"
)
_TEACHER = Effect(
    lambda r: (
        r.objective.distillation != "none"
        and (r.teacher.labels is None or r.teacher.checkpoint is not None or r.teacher.name == LITE0)
    ),
    "distillation: set objective.distillation to 'hard' or 'soft'; with teacher.labels give teacher.checkpoint too",
)
_SOFT = Effect(lambda r: r.objective.distillation == "soft", "objective.distillation 'soft'")
_BCE = Effect(lambda r: r.objective.loss == "bce", "objective.loss 'bce'")
_NOT_SGD = Effect(lambda r: r.optim.name != "sgd", "an optim.name other than 'sgd'")
_FUSED = Effect(lambda r: r.optim.name in ("adamw", "lamb"), "optim.name 'adamw' or 'lamb'")
_NOT_ADAMW = Effect(lambda r: r.optim.name != "adamw", "optim.name 'sgd', or another that has a momentum")
_OTHER_SIZES = Effect(  # an empty list removes the recipe's sizes
    lambda r: not r.curriculum.sizes or any(size != r.model.img_size for size in r.curriculum.sizes),
    "a size other than model.img_size",
)
_COSINE = Effect(
    lambda r: r.optim.schedule == "cosine" and r.optim.warmup_epochs > 0,
    "optim.schedule 'cosine' and optim.warmup_epochs above 0",
)
_WSD = Effect(lambda r: r.optim.schedule == "wsd", "optim.schedule 'wsd'")
_WARMUP = Effect(lambda r: r.optim.warmup_epochs > 0, "optim.warmup_epochs above 0")
_EMA = Effect(lambda r: r.ema.enabled, "ema.enabled True")
_EMA_SCORES = Effect(lambda r: r.ema.enabled and evaluates(r), "ema.enabled True, and data.val or data.hold_out")
_TWO_HEADS = Effect(
    lambda r: r.model.arch == "deit" and r.model.distilled and evaluates(r),
    "model.distilled True, and data.val or data.hold_out",
)
_DIST_TOKEN = Effect(lambda r: r.model.arch == "deit" and r.model.distilled, "model.distilled True")
_TUNES_DISTILLED = Effect(
    lambda r: r.model.init is not None and r.objective.distillation != "none", "model.init and distillation"
)
_TENSORBOARD = Effect(lambda r: r.run.tensorboard, "run.tensorboard True")
_AUTO_PRECISION = Effect(lambda r: r.run.precision == "auto", "run.precision 'auto'")

EFFECTS: dict[str, Effect] = {
    "compat": ALWAYS,
    "name": ALWAYS,
    "model.arch": ALWAYS,
    "model.img_size": ALWAYS,
    "model.patch_size": _DEIT,
    "model.embed_dim": _DEIT,
    "model.depth": _DEIT,
    "model.num_heads": _DEIT,
    "model.mlp_ratio": _DEIT,
    "model.distilled": _DEIT,
    "model.layer_scale": _DEIT,
    "model.no_embed_class": _DEIT,
    "model.drop_rate": _TRAIN_MODE,
    "model.drop_path": _TRAIN_MODE,
    "model.drop_path_uniform": _DROP_PATH,
    "model.drop_path_mode": _DROP_PATH,
    "model.residual_dtype": _DEIT,
    "model.grad_checkpointing": _DEIT,
    "model.kernels": ALWAYS,
    "model.num_classes": ALWAYS,
    "model.init": ALWAYS,
    "model.finetune": ALWAYS,
    "data.train": ALWAYS,
    "data.val": ALWAYS,
    "data.hold_out": ALWAYS,
    "data.fraction": ALWAYS,
    "data.cache_dir": ALWAYS,
    "data.loader": ALWAYS,
    "data.stage": ALWAYS,
    "data.hw_decoder_load": _DALI,
    "data.threads": ALWAYS,
    "data.prefetch": ALWAYS,
    "data.repeats": ALWAYS,
    "data.on_error": ALWAYS,
    "data.cell_groups": _CELLS,
    "augment.policy": ALWAYS,
    "augment.randaugment": _RANDAUGMENT,
    "augment.crop": ALWAYS,
    "augment.crop_scale": _RANDOM_RESIZED,
    "augment.crop_ratio": _RANDOM_RESIZED,
    "augment.hflip": ALWAYS,
    "augment.interpolation": _RANDAUGMENT,
    "augment.color_jitter": _THREE_AUGMENT,
    "augment.erase_prob": ALWAYS,
    "augment.erase_area": _ERASES,
    "augment.erase_aspect": _ERASES,
    "augment.mixup_alpha": _MIXUP_ALPHA,
    "augment.cutmix_alpha": _CUTMIX_ALPHA,
    "augment.mix_prob": ALWAYS,
    "augment.cutmix_switch_prob": _BOTH_MIXES,
    "augment.label_smoothing": ALWAYS,
    "augment.mean": ALWAYS,
    "augment.std": ALWAYS,
    "augment.eval_crop": ALWAYS,  # fastdeit-eval takes it from the stored recipe
    "curriculum.sizes": _OTHER_SIZES,
    "curriculum.magnitudes": _RANDAUGMENT,
    "objective.loss": ALWAYS,
    "objective.bce_target_thresh": _BCE,
    "objective.bce_sum": _BCE,
    "objective.distillation": ALWAYS,
    "objective.alpha": _SOFT,
    "objective.tau": _SOFT,
    # With teacher.labels, a given teacher is compared with the one that made them.
    "teacher.name": _TEACHER,
    "teacher.checkpoint": _DISTILS,
    "teacher.labels": _DISTILS,
    "teacher.img_size": _TEACHER,
    "teacher.mean": _TEACHER,
    "teacher.std": _TEACHER,
    "optim.name": ALWAYS,
    "optim.implementation": _FUSED,
    "optim.lr": ALWAYS,
    "optim.lr_batch": ALWAYS,
    "optim.weight_decay": ALWAYS,
    "optim.betas": _NOT_SGD,
    "optim.eps": _NOT_SGD,
    "optim.momentum": _NOT_ADAMW,
    "optim.schedule": ALWAYS,
    "optim.warmup_prefix": _COSINE,
    "optim.decay_epochs": _WSD,
    "optim.layer_decay": ALWAYS,
    "optim.clip_grad": ALWAYS,
    "optim.warmup_epochs": ALWAYS,
    "optim.warmup_lr": _WARMUP,
    "optim.min_lr": ALWAYS,
    "ema.enabled": ALWAYS,
    "ema.decay": _EMA,
    "run.epochs": ALWAYS,
    "run.global_batch": ALWAYS,
    "run.micro_batch": ALWAYS,
    "run.seed": ALWAYS,
    "run.output": ALWAYS,
    "run.resume": ALWAYS,
    "run.resume_changed": ALWAYS,
    "run.precision": ALWAYS,
    "run.device": ALWAYS,
    "run.compile": ALWAYS,
    "run.cuda_graphs": ALWAYS,
    "run.profile": ALWAYS,
    "run.eval_every": _VAL,
    "run.eval_batch": _VAL,
    "run.checkpoint_every": ALWAYS,
    "run.checkpoint_minutes": ALWAYS,
    "run.checkpoint_patience": ALWAYS,
    "run.keep_checkpoints": ALWAYS,
    "run.best_metric": _VAL,
    "run.on_divergence": ALWAYS,
    "run.divergence_band": ALWAYS,
    "run.timeout_minutes": ALWAYS,
    "run.log_every": ALWAYS,
    "run.tensorboard": ALWAYS,
    "run.wandb": _TENSORBOARD,
    "run.progress": ALWAYS,
    "run.eval_sharding": ALWAYS,  # as augment.eval_crop
    "run.loss_sync": ALWAYS,
    "run.amp_dtype": _AUTO_PRECISION,
    "departures.schedule_unit": ALWAYS,
    "departures.schedule_lag": ALWAYS,
    "departures.order_seed": ALWAYS,
    "departures.epoch_multiple": ALWAYS,
    "departures.single_process_repeats": _COPIES,
    "departures.placement": _COPIES,
    "departures.mix_group": ALWAYS,
    "departures.cutmix_box": _CUTMIX,
    "departures.decay_dist_token": _DIST_TOKEN,
    "departures.ema_eval": _EMA_SCORES,
    "departures.soft_reduction": _SOFT,
    "departures.late_fusion": _TWO_HEADS,
    "departures.finetune_distillation": _TUNES_DISTILLED,
    "departures.finetune_mode": _INIT,
}

# Defaults that an older version stored; no user gave them.
_FORMER_DEFAULTS = {"departures.finetune_mode": "eval"}


def draws_dropout(recipe: Recipe) -> bool:
    """Whether a resolved recipe trains a DeiT with dropout, drawn by each sample's position."""
    return recipe.model.arch == "deit" and recipe.model.drop_rate > 0 and not frozen_mode(recipe)


def frozen_mode(recipe: Recipe) -> bool:
    """Whether a resolved recipe fine-tunes in eval mode, without dropout and stochastic depth."""
    return recipe.model.init is not None and recipe.departures.finetune_mode == "eval"


def skips_samples(recipe: Recipe) -> bool:
    """Whether the branches of a resolved recipe leave out the samples that stochastic depth drops."""
    return recipe.model.drop_path_mode == "skip" and has_effect(recipe, "model.drop_path_mode")


def fields(recipe: Recipe) -> dict[str, Any]:
    """Every field of a recipe, by its command-line name."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            out |= {f"{field.name}.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
        else:
            out[field.name] = value
    return out


def has_effect(recipe: Recipe, name: str) -> bool:
    """Whether the field `name` changes anything in a resolved recipe."""
    return EFFECTS[name].holds(recipe)


def check_given(recipe: Recipe, base: Recipe, where: str = "") -> None:
    """Raise UserError if fields of `recipe` differ from `base` and have no effect; the error names each.

    Both are resolved; `base` is the unchanged recipe.
    """
    before = fields(base)
    idle = [
        f"{name} {value} has no effect in this run: it needs {EFFECTS[name].needs}"
        for name, value in fields(recipe).items()
        if value != before[name] and value != _FORMER_DEFAULTS.get(name) and not has_effect(recipe, name)
    ]
    if idle:
        raise UserError(f"{where}{'; '.join(idle)}. Leave {'it' if len(idle) == 1 else 'them'} out")
