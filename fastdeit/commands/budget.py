"""`fastdeit budget`: what a run will take on some GPUs, before it starts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from fastdeit.cli import check_least, parse_recipe, program, run
from fastdeit.config import Recipe
from fastdeit.pipelines.console import answer
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import RECIPES

if TYPE_CHECKING:
    from fastdeit.budget.plan import Images, Plan


def arguments() -> argparse.ArgumentParser:
    """The command's own options."""
    parser = argparse.ArgumentParser(
        prog=program("budget"),
        description="Forecast a run's time, memory, data rate, energy and cost on some GPUs; needs none of them.",
        epilog="RECIPE and its options are those of fastdeit train. With --data.train, which fastdeit convert wrote, "
        "the images are those of that data set, otherwise ImageNet's. docs/roof.md says how good the forecast is.",
        usage="%(prog)s [--gpus N] [--gpu CARD] [--price P] [--deadline H] [--cores N] RECIPE [...]",
    )
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs, up to 8 a machine (8)")
    parser.add_argument("--gpu", default="H100", help="H200, H100, A100, B200, L40S or RTX 4090 (H100)")
    parser.add_argument("--price", type=float, help="of a GPU for an hour")
    parser.add_argument("--deadline", type=float, help="hours; says how many GPUs would meet it")
    parser.add_argument("--cores", type=int, help="of each machine, for decoding; otherwise enough")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s between machines, each way (50)")
    parser.add_argument("--images", type=int, help="training images (ImageNet's)")
    parser.add_argument("--val-images", type=int, help="validation images (ImageNet's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def parse(args: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """The hardware, and the resolved recipe. Raises UserError for a number that makes no sense."""
    own, rest = arguments().parse_known_args(args)
    check_least(own, gpus=1, cores=1, images=1)
    for name in ("price", "deadline", "network"):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g}: give a number above 0")
    if own.val_images is not None and own.val_images < 0:
        raise UserError(f"--val-images {own.val_images}: give 0 or more")
    if not rest:
        raise UserError(f"name a recipe: {', '.join(RECIPES)}")
    # A forecast needs no weights to start from.
    return own, parse_recipe([*rest, "--model.finetune", "False"]).resolved()


def images_of(own: argparse.Namespace, recipe: Recipe) -> Images:
    """The data sets of the recipe if it names them, otherwise ImageNet's. Raises UserError for one that is missing."""
    from fastdeit.budget.plan import Images
    from fastdeit.inputs import open_data_sets

    found = Images()
    if recipe.data.train is not None:
        sets = open_data_sets(recipe)
        size = sum(file.stat().st_size for file in _files(sets.train.path))
        found = Images(
            train=len(sets.train_images),
            val=len(sets.val_images),
            classes=sets.num_classes,
            bytes=size / len(sets.train),
        )
    given = {"train": own.images, "val": own.val_images, "classes": recipe.model.num_classes}
    found = dataclasses.replace(found, **{name: value for name, value in given.items() if value is not None})
    if recipe.data.train is not None and own.images is None:
        return found
    held, fraction = recipe.data.hold_out, recipe.data.fraction
    val = round(held * found.train) if held and own.val_images is None else found.val
    return dataclasses.replace(found, train=round((1 - held) * fraction * found.train), val=val)


def _files(path: Any) -> list[Any]:
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]


def budget() -> None:
    own, recipe = parse(sys.argv[1:])
    from fastdeit.budget.cards import find_card
    from fastdeit.budget.plan import Machine, fewest_gpus, plan

    machine = Machine(
        card=find_card(own.gpu), gpus=own.gpus, cores=own.cores, network=1e9 * own.network, price=own.price
    )
    images = images_of(own, recipe)
    found = plan(recipe, machine, images)
    enough = None if own.deadline is None else fewest_gpus(recipe, machine, images, own.deadline)
    if own.json:
        answer(json.dumps(as_json(found) | ({} if own.deadline is None else {"gpus_for_deadline": enough})))
        return
    answer("\n".join(lines(recipe.name, found)))
    if own.deadline is not None:
        meets = found.fits and found.total <= 3600 * own.deadline
        verdict = f"{own.deadline:g} hours: {'met' if meets else 'missed'}"
        answer(f"{verdict}; {_enough(enough, machine.card.name)}")


def _enough(gpus: int | None, card: str) -> str:
    if gpus is None:
        return f"no number of {card}s up to 256 meets it: store the teacher's labels, or take fewer epochs"
    return f"{gpus} {card}{'s' if gpus > 1 else ''} would do"


def as_json(found: Plan) -> dict[str, Any]:
    """The forecast in SI units."""
    return {
        "card": found.machine.card.name,
        "gpus": found.machine.gpus,
        "seconds": found.total,
        "images_per_second": found.speed,
        "images_per_second_of_gpus": found.rate,
        "steps_per_epoch": found.steps,
        "micro_batch": found.micro_batch,
        "step_seconds": found.seconds,
        "evaluation_seconds": found.evaluation,
        "bottleneck": found.bottleneck,
        "memory_bytes": found.memory,
        "fits": found.fits,
        "cores_per_machine": found.cores,
        "disk_bytes_per_second": found.disk,
        "kilowatt_hours": found.kilowatt_hours,
        "cost": found.cost,
        "notes": found.notes,
    }


def lines(name: str, found: Plan) -> list[str]:
    """The forecast for a terminal."""
    from fastdeit.training.progress import duration

    machine, images = found.machine, found.images
    each = found.speed / machine.gpus
    took = ", ".join(f"{what} {1e3 * seconds:.1f} ms" for what, seconds in found.seconds.items() if seconds > 5e-5)
    whole = found.epochs - sum(part.epochs for part in found.earlier)
    last = f", in the {whole} epochs at full size" if found.earlier else ""
    memory = f"{found.memory / 1e9:.1f} of {machine.card.memory / 1e9:.0f} GB"
    rows = [
        ("time", f"{duration(found.total)}, of which {duration(found.evaluation)} of evaluation"),
        (
            "images",
            f"{images.train:,} x {found.epochs} epochs, {found.steps:,} steps of {found.global_batch:,} an epoch",
        ),
        ("rate", f"{found.speed:,.0f} images/s, {each:,.0f} a GPU{last}; a step, without the loader, takes: {took}"),
        *(
            ("", f"{each.plan.speed:,.0f} images/s in the {each.epochs} epochs at {each.size} pixels")
            for each in found.earlier
        ),
        ("bottleneck", found.bottleneck),
        ("memory", f"{memory} a GPU at {found.micro_batch} images at once{'' if found.fits else ': TOO MUCH'}"),
        ("cores", f"{found.cores:.0f} a machine for decoding photographs of 500 x 375"),
        ("disk", f"{found.disk / 1e6:,.0f} MB/s in all, unless the files are cached ({_size(images)})"),
        ("energy", f"at most {found.kilowatt_hours:,.0f} kWh of the GPUs, at {machine.card.watts:.0f} W"),
    ]
    if found.cost is not None:
        rows.append(("cost", f"{found.cost:,.2f} at {machine.price:g} a GPU and hour"))
    head = f"{name} on {machine.gpus} x {machine.card.name}, a forecast"
    return [head, *(f"  {what:10}  {text}" for what, text in rows), *(f"  note: {note}" for note in found.notes)]


def _size(images: Images) -> str:
    return f"{images.train * images.bytes / 1e9:,.1f} GB"


def main() -> None:
    run(budget)


if __name__ == "__main__":
    main()
