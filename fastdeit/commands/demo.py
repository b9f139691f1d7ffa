"""`make demo`: the whole system on scikit-learn's digits, in a few minutes on two cores.

Digits written as JPEGs, converted, a small convnet trained as the teacher, a small DeiT distilled from it with
the distillation token; then a table of scores by head, three pictures and a report on both runs. Run as
`fastdeit demo [FOLDER]`.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdeit import checkpoint, launch
from fastdeit.cli import run, words
from fastdeit.commands.report import NAME, Options, is_report, report
from fastdeit.config import Recipe
from fastdeit.data import TrainingData
from fastdeit.distributed import world
from fastdeit.inputs import open_dataset
from fastdeit.model.deit import build_model
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError, naming
from fastdeit.pipelines.plan.plan import CUTMIX, OPS
from fastdeit.recipes import convnet_teacher, deit_tiny_distilled
from fastdeit.report.figures import plotly_script
from fastdeit.training.evaluation import Scores
from fastdeit.training.trainer import Trainer


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 digits as 32-pixel JPEGs in an ImageFolder tree, every fifth for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the demo needs scikit-learn and matplotlib: pip install 'fastdeit[demo]'") from error
    values, labels = load_digits(return_X_y=True)
    pixels = (np.asarray(values).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = folder / ("val" if i % 5 == 0 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
        path = place / f"{i:04d}.jpg"
        with naming(path):
            large.convert("RGB").save(path, quality=95)


def _common(recipe: Recipe, folder: Path, epochs: int) -> Recipe:
    replace = dataclasses.replace
    return replace(
        recipe,
        data=replace(recipe.data, train=folder / "train.beton", val=folder / "val.beton"),
        augment=replace(recipe.augment, hflip=0.0, crop_scale=(0.6, 1.0), crop_ratio=(0.85, 1.18), eval_crop=1.0),
        ema=replace(recipe.ema, decay=0.98),
        run=replace(recipe.run, epochs=epochs, global_batch=128, eval_every=2, log_every=5, tensorboard=False),
    )


def teacher_recipe(folder: Path) -> Recipe:
    """A ResNet-10 that learns the digits in seconds."""
    replace = dataclasses.replace
    recipe = _common(convnet_teacher(), folder, epochs=8)
    return replace(
        recipe,
        name="digits_teacher",
        model=replace(recipe.model, arch="resnet10t", img_size=32),
        optim=replace(recipe.optim, lr=2e-3, lr_batch=0, warmup_epochs=1),
        run=replace(recipe.run, output=folder / "teacher", eval_every=4),
    )


def student_recipe(folder: Path, teacher: Path) -> Recipe:
    """A DeiT of six blocks and 4 x 4 patches of 8 pixels, with the whole augmentation of the paper."""
    replace = dataclasses.replace
    recipe = _common(deit_tiny_distilled(), folder, epochs=60)
    return replace(
        recipe,
        name="digits_distilled",
        model=replace(recipe.model, img_size=32, patch_size=8, embed_dim=96, depth=6, num_heads=3, drop_path=0.0),
        augment=replace(recipe.augment, cutmix_alpha=0.0, mixup_alpha=0.2, erase_prob=0.0),
        teacher=replace(recipe.teacher, name="resnet10t", checkpoint=teacher),
        optim=replace(recipe.optim, lr=1e-3, lr_batch=0, warmup_epochs=4),
        run=replace(recipe.run, output=folder / "student", eval_every=5),
    )


def _train(recipe: Recipe) -> tuple[dict[str, Scores], Path]:
    with world("auto") as joined:
        scores = Trainer(recipe.resolved(), joined).run()
    newest = checkpoint.found(Path(recipe.run.output) / "checkpoints")[0]
    return scores, newest


def _pictures(folder: Path, recipe: Recipe, weights: Path, teacher_top1: float) -> list[Path]:
    from fastdeit.training import plots

    pictures = [folder / name for name in ("curves.png", "augmented.png", "tokens.png")]
    plots.curves(folder / "student" / "log.jsonl", pictures[0], teacher_top1=teacher_top1)

    recipe = recipe.resolved()
    data_set = open_dataset(recipe.data.train, "--data.train")
    with world("cpu") as joined:
        data = TrainingData(recipe, data_set, joined)
        samples = data.order.step(0, 0)
        plan = data.draw(samples)
        with data.batches(0) as batches:
            images = next(iter(batches)).data.images
        data.close()
    titles = []
    for s in range(32):
        names = [OPS[code] for code in plan.op[s] if code]
        g = int(plan.group[s])
        mixed = f"{'CutMix' if plan.mix[g] == CUTMIX else 'Mixup'} {plan.lam[g]:.2f}" if plan.mix[g] else ""
        titles.append("\n".join((" + ".join(names) or "-", mixed)))
    plots.contact_sheet(images[:32], recipe.augment.mean, recipe.augment.std, pictures[1], titles)

    model = build_model(recipe.model, data_set.num_classes)
    model.load_state_dict(checkpoint.load(weights)["model"])
    model.eval()
    with torch.no_grad():
        plots.token_cosine(model.tokens_by_layer(images[:128].float()), pictures[2])
    data_set.close()
    return pictures


def demo(folder: Path) -> None:
    """Run the demonstration in `folder`; a second run resumes the first."""
    began = time.monotonic()
    page = folder / NAME
    plotly_script()  # if the report cannot be written, fail before training, not after it
    if page.exists() and not is_report(page):
        raise UserError(f"{page}: exists, and fastdeit report did not write it: move it, or name another folder")
    if not (folder / "val.beton").exists():
        write_digits(folder / "images")
        for split in ("train", "val"):
            convert(str(folder / "images" / split), folder / f"{split}.beton", mode="auto")
    for split in ("train", "val"):
        open_dataset(folder / f"{split}.beton", f"--data.{split}").close()

    print("\n== teacher: a small convnet ==")
    teacher_scores, teacher = _train(teacher_recipe(folder))
    print("\n== student: a small DeiT, hard-distilled ==")
    recipe = student_recipe(folder, teacher)
    student_scores, student = _train(recipe)
    teacher_top1 = teacher_scores["model"]["class"]["top1"]
    pictures = _pictures(folder, recipe, student, teacher_top1)

    print(f"\n{'validation top-1, %':28} {'weights':>8} {'EMA':>8}")
    print(f"{'teacher':28} {teacher_top1:8.2f}")
    for head in ("class", "distillation", "fused_probabilities", "fused_logits"):
        row = [student_scores[kind][head]["top1"] for kind in ("model", "ema")]
        print(f"{head.replace('_', ', '):28} {row[0]:8.2f} {row[1]:8.2f}")
    print(f"\npictures: {', '.join(str(p) for p in pictures)}")
    report(Options(runs=(folder / "student", folder / "teacher"), output=page))
    print(f"total {time.monotonic() - began:.0f} s")
    runs, new = (shlex.quote(str(each)) for each in (folder / "student", folder / "images/val/7"))
    print(
        "\nnext:",
        f"fastdeit predict {runs} {new}",
        f"fastdeit export {runs} {shlex.quote(str(folder / 'exported'))}",
        "fastdeit train deit_tiny --data.train YOUR_IMAGES --data.hold_out 0.1",
        sep="\n  ",
    )


def main() -> None:
    def go() -> None:
        parser = argparse.ArgumentParser(prog="fastdeit demo", description="Train and distil a small DeiT on digits.")
        parser.add_argument("folder", nargs="?", default="runs/demo", help="for data, runs and pictures")
        options = parser.parse_args(words(sys.argv[1:]))
        launch.check_launch()
        demo(Path(options.folder))

    run(go)


if __name__ == "__main__":
    main()
