"""Checks the options that people type: booleans without a value, and options that do not exist."""

import difflib
from collections.abc import Sequence
from itertools import pairwise

from fastdeit.config import Recipe
from fastdeit.effects import fields
from fastdeit.help import FIRST
from fastdeit.pipelines.errors import UserError

# Options of timm's train.py and of the released DeiT code, besides those in `FIRST`, and their names here.
TIMM = {
    "--aa": "augment.randaugment",
    "--amp": "run.precision",
    "--bce-loss": "objective.loss",
    "--bce-sum": "objective.bce_sum",
    "--bce-target-thresh": "objective.bce_target_thresh",
    "--checkpoint-hist": "run.keep_checkpoints",
    "--crop-pct": "augment.eval_crop",
    "--cutmix": "augment.cutmix_alpha",
    "--data-path": "data.train",
    "--distillation-alpha": "objective.alpha",
    "--distillation-tau": "objective.tau",
    "--distillation-type": "objective.distillation",
    "--finetune": "model.init",
    "--grad-checkpointing": "model.grad_checkpointing",
    "--img-size": "model.img_size",
    "--initial-checkpoint": "model.init",
    "--input-size": "model.img_size",
    "--log-interval": "run.log_every",
    "--mixup": "augment.mixup_alpha",
    "--mixup-prob": "augment.mix_prob",
    "--model-ema": "ema.enabled",
    "--model-ema-decay": "ema.decay",
    "--num-workers": "data.threads",
    "--opt": "optim.name",
    "--opt-betas": "optim.betas",
    "--opt-eps": "optim.eps",
    "--output-dir": "run.output",
    "--repeated-aug": "data.repeats",
    "--reprob": "augment.erase_prob",
    "--sched": "optim.schedule",
    "--src": "augment.crop",
    "--smoothing": "augment.label_smoothing",
    "--train-crop-mode": "augment.crop",
    "--teacher-model": "teacher.name",
    "--teacher-path": "teacher.checkpoint",
    "--validation-batch-size": "run.eval_batch",
    "--warmup-lr": "optim.warmup_lr",
    "--workers": "data.threads",
} | {field.timm: field.name for field in FIRST if field.timm}
_OTHERS = ("config", "help", "help-all")
_ELSEWHERE = ("print-config",)  # `fastdeit train` takes it out of the words before it parses them


def with_values(args: Sequence[str]) -> list[str]:
    """`args` with "True" after each boolean option that has no value."""
    switches = {name for name, value in fields(Recipe(name="").filled()).items() if type(value) is bool}
    out: list[str] = []
    for word, following in pairwise([*args, "--"]):
        out.append(word)
        if word.startswith("--") and _name(word) in switches and following.startswith("-"):
            out.append("True")
    return out


def check_options(args: Sequence[str]) -> None:
    """Raise UserError for an unknown option, suggesting the nearest ones, and for a word before the first option.

    args  the words after the recipe's name
    """
    if args and not args[0].startswith("-"):
        raise UserError(f"'{args[0]}' belongs to no option: to name a data set, write --data.train {args[0]}")
    names = [*fields(Recipe(name=""))]
    for word in args:
        typed = word.partition("=")[0]
        known = _name(typed) in names or typed[2:] in ("", *_OTHERS)
        if typed.startswith("--") and not known:
            raise UserError(f"there is no option {typed}: {_meant(typed, names)}")


def _name(option: str) -> str:
    """The field's name in an option as it was typed."""
    return option.removeprefix("--").replace("-", "_")


def _meant(typed: str, names: list[str]) -> str:
    name = _name(typed)
    last = name.rpartition(".")[2]
    near = [each for each in names if each.rpartition(".")[2] == last]
    # timm's name, alone or after the name of a section: --data.batch_size
    here = TIMM.get(typed.replace("_", "-")) or (TIMM.get("--" + last.replace("_", "-")) if not near else None)
    if here is not None:
        meaning = next((field.meaning for field in FIRST if field.name == here), "")
        return f"did you mean --{here}?" + (f" ({meaning})" if meaning else "")
    near = near or difflib.get_close_matches(name, [*names, *_OTHERS, *_ELSEWHERE], n=3, cutoff=0.8)
    if len(last) > 4:  # too many short words are alike
        alike = difflib.get_close_matches(last, {each.rpartition(".")[2] for each in names}, n=3, cutoff=0.8)
        near = near or [each for each in names if each.rpartition(".")[2] in alike]
        near = near or [each for each in names if last in each]
    if not near or len(near) > 5:
        return "--help-all lists them all"
    *before, final = [f"--{each}" for each in near]
    return f"did you mean {', '.join(before)}{' or ' if before else ''}{final}?"
