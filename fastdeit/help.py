"""The short page of `fastdeit-train RECIPE --help`: the fields that people change first."""

from typing import Any, NamedTuple

from fastdeit.config import Recipe
from fastdeit.effects import fields


class Field(NamedTuple):
    """A field of a recipe: its option in timm's train.py (empty: none), and what it means in few words."""

    name: str
    timm: str
    meaning: str


FIRST = (
    Field("data.train", "--data-dir", "a folder of images, or what fastdeit-convert wrote"),
    Field("data.val", "", "the same, to evaluate on"),
    Field("data.hold_out", "", "or the share of each class to hold out of training for it"),
    Field("run.output", "--output", "folder of the run; the same command resumes it"),
    Field("run.epochs", "--epochs", ""),
    Field("run.global_batch", "--batch-size", "images a step on all GPUs together; timm counts one GPU's"),
    Field("run.micro_batch", "--grad-accum-steps", "images at once on a GPU; 0: its whole share of a step"),
    Field("optim.lr", "--lr", "for a batch of optim.lr_batch; scales with run.global_batch"),
    Field("optim.weight_decay", "--weight-decay", ""),
    Field("model.drop_path", "--drop-path", "stochastic depth of the last block"),
    Field("model.init", "--pretrained-path", "checkpoint to fine-tune"),
)

_CURRICULUM = Field("curriculum.sizes", "", "image size in each part; see also curriculum.magnitudes")


def page(recipe: Recipe, purpose: str, program: str) -> str:
    """The help of a recipe, 30 lines at most; `purpose` is its first sentence, `program` what the user typed."""
    values = fields(recipe)
    first = (*FIRST, _CURRICULUM) if recipe.curriculum.sizes else FIRST
    rows = [(f"--{field.name}", _shown(values[field.name]), field.timm, _meaning(field, values)) for field in first]
    heads = ("option", "default", "timm", "")
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(3)]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, (*widths, 0), strict=True)).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join([
        f"usage: {program} {recipe.name} --data.train FILE [--section.field value ...]",
        "",
        purpose,
        "",
        *(f"  {line}" for line in lines),
        "",
        f"  --help-all        all {len(values)} fields, with what they mean",
        "  --config FILE     read fields from TOML or JSON, such as a run's recipe.json",
        "  --print-config    print the resolved recipe and what `auto` chooses here, and train nothing",
    ])  # fmt: skip


def _meaning(field: Field, values: dict[str, Any]) -> str:
    if field.name == "optim.lr" and not values["optim.lr_batch"]:
        return f"for a batch of {values['run.global_batch']}; does not scale with it (optim.lr_batch 0)"
    return field.meaning


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}, ..., {value[-1]}"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
