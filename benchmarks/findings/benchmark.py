"""`python -m benchmarks findings`: which claims of the papers hold in small models, over several seeds.

It trains every cell of `cells.CELLS` with each seed, and appends a line to the results after each run. The same command
goes on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.findings.cells import CELLS, TAUGHT_BY_TRANSFORMER, Study, recipe
from benchmarks.findings.report import write
from benchmarks.record import RESULTS, append, environment
from benchmarks.tables import read
from fastdeit.cli import parse, run
from fastdeit.commands.demo import teacher_recipe, write_digits
from fastdeit.config import Recipe
from fastdeit.data import evaluation_batch
from fastdeit.distributed import world
from fastdeit.model.deit import DeiT, token_cosines
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import RECIPES
from fastdeit.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
# Recipe fields newer than the first results; at their defaults they do not change the hash of the settings.
NEWER = (
    ("augment", "crop"),
    ("curriculum", "sizes"),
    ("curriculum", "magnitudes"),
    ("optim", "warmup_prefix"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train the cells of the study, then write the table and the picture of what they show."""

    data: Literal["digits", "fashion-mnist"] = "digits"
    train: Path | None = None  # Fashion-MNIST's training images, converted
    val: Path | None = None  # its test images, converted
    fraction: float = 0.1  # of Fashion-MNIST's training images, to train on
    cells: tuple[str, ...] = ()  # names of cells; none: all
    seeds: int = 5
    epochs: int = 0  # 0: 40 on digits, 12 on Fashion-MNIST
    folder: Path = Path("runs/findings")  # for data and runs, which are deleted when their line is written
    results: Path = RESULTS / "findings.jsonl"
    report: Path | None = None  # the page to write, such as docs/findings.md; None: none
    only_report: bool = False  # do not train


def _digits(options: Options, cells: Sequence[str]) -> Study:
    folder = options.folder / "digits"
    for split in ("train", "val"):
        if not (folder / f"{split}.beton").exists():
            if not (folder / "images").exists():
                write_digits(folder / "images")
            convert(str(folder / "images" / split), folder / f"{split}.beton", progress=False)
    teacher = replace_run(teacher_recipe(folder), device="cpu", progress=False)
    # A DeiT that is trained without the paper's augmentation until it is about as good as the convnet.
    deit = {"arch": "deit", "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    transformer = replace(
        teacher,
        name="digits_transformer",
        model=replace(teacher.model, **deit),
        optim=replace(teacher.optim, lr=1e-3, warmup_epochs=4),
    )
    transformer = replace_run(transformer, epochs=80, eval_every=80, output=folder / "transformer")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
    # A mirrored digit is another sign; the crops are those of the demo.
    augment = {"hflip": 0.0, "crop_scale": (0.6, 1.0), "crop_ratio": (0.85, 1.18), "eval_crop": 1.0}
    epochs = options.epochs or 40
    return Study(
        train=folder / "train.beton",
        val=folder / "val.beton",
        teacher=_trained(teacher),
        teacher_arch="resnet10t",
        epochs=epochs,
        model=shape,
        augment=augment,
        sizes=(16, 16, 24, 24, 32, 32),
        transformer=_trained(transformer) if TAUGHT_BY_TRANSFORMER in cells else None,
    )


def _trained(made: Recipe) -> Path:
    """The last checkpoint of a teacher, which is trained now if it is not there."""
    checkpoint = Path(made.run.output) / "checkpoints" / "last.pt"
    if not checkpoint.exists():
        _scores(made)
    return checkpoint


def _fashion_mnist(options: Options) -> Study:
    if options.train is None or options.val is None:
        raise UserError("--data fashion-mnist needs --train and --val: see docs/benchmarks.md")
    base, teacher = RECIPES["fashion_mnist_distilled"]().augment, RECIPES["fashion_mnist_teacher"]()
    data = {"train": options.train, "val": options.val, "fraction": options.fraction}
    teacher = replace(teacher, data=replace(teacher.data, **data))
    run = {"epochs": 30, "eval_every": 30, "tensorboard": False, "progress": False, "device": "cpu"}
    teacher = replace_run(teacher, output=options.folder / "fashion-mnist" / f"teacher-{options.fraction:g}", **run)
    names = ("crop_scale", "crop_ratio", "eval_crop", "mean", "std")
    return Study(
        train=options.train,
        val=options.val,
        teacher=_trained(teacher),
        teacher_arch="resnet10t",
        epochs=options.epochs or 12,
        model={"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 2},
        augment={name: getattr(base, name) for name in names},
        sizes=(14, 14, 21, 21, 28, 28),
        transformer=None,
        fraction=options.fraction,
    )


def replace_run(made: Recipe, **fields: Any) -> Recipe:
    """The recipe with these fields of `run`."""
    return replace(made, run=replace(made.run, **fields))


def _scores(made: Recipe) -> dict[str, Any]:
    """Train; the scores by weights and head, and the cosine of both tokens by layer."""
    with world("cpu") as joined, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(made.resolved(), joined)
        scores = trainer.run()
        found: dict[str, Any] = {
            weights: {
                head: {name: score[name] for name in ("top1", "loss")}
                for head, score in heads.items()
                if isinstance(score, dict)
            }
            for weights, heads in scores.items()
        }
        model, val = trainer.model, trainer.sets.val
        if isinstance(model, DeiT) and model.distilled and val is not None:
            with evaluation_batch(trainer.recipe, val, joined, np.arange(64)) as batch:
                tokens = model.eval().tokens_by_layer(batch.images)
            found["cosines"] = [round(value, 4) for value in token_cosines(tokens)]
    return found


def settings(made: Recipe) -> str:
    """A hash of everything in a recipe but its paths and its seed, so that a changed study starts afresh."""
    plain = made.filled().to_dict()
    paths = ("data", "train"), ("data", "val"), ("data", "threads"), ("teacher", "checkpoint")
    for section, name in (*paths, ("run", "output"), ("run", "seed")):
        plain[section].pop(name)
    default = Recipe(name="").to_dict()
    for section, name in NEWER:
        if plain[section][name] == default[section][name]:
            plain[section].pop(name)
    plain = {section: fields for section, fields in plain.items() if fields != {}}
    return f"{zlib.crc32(repr(sorted(plain.items())).encode()):08x}"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, prog="python -m benchmarks findings", args=argv)
    unknown = set(options.cells) - set(CELLS)
    if unknown:
        raise UserError(f"there is no cell '{min(unknown)}': choose from {', '.join(map(repr, CELLS))}")
    if not options.only_report:
        _train_all(options)
    if options.report is not None:
        write(read(options.results), options.report)


def _train_all(options: Options) -> None:
    cells = list(options.cells or CELLS)
    study = _digits(options, cells) if options.data == "digits" else _fashion_mnist(options)
    if study.transformer is None and TAUGHT_BY_TRANSFORMER in cells:
        cells.remove(TAUGHT_BY_TRANSFORMER)
        print(f"{options.data}: skipping '{TAUGHT_BY_TRANSFORMER}': no such teacher", file=sys.stderr, flush=True)
    done = {
        (record["data"], record["cell"], record["seed"], record["settings"])
        for record in (read(options.results) if options.results.exists() else [])
    }
    for seed in range(options.seeds):
        for cell in cells:
            output = options.folder / options.data / f"run-{zlib.crc32(cell.encode()):08x}-{seed}"
            made = recipe(study, cell, seed, output)
            key = (options.data, cell, seed, settings(made))
            if key in done:
                continue
            began = time.monotonic()
            shutil.rmtree(output, ignore_errors=True)
            scores = _scores(made)
            record = dict(zip(("data", "cell", "seed", "settings"), key, strict=True))
            record |= {"epochs": made.run.epochs, "seconds": round(time.monotonic() - began, 1), "scores": scores}
            append(options.results, {**record, "environment": environment()})
            shutil.rmtree(output)
            top1 = scores["model"]["class"]["top1"]
            print(f"seed {seed}, {cell}: top-1 {top1:.2f} in {record['seconds']:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
