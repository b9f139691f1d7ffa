"""`fastdeit-label`: have the teacher label every sample of a run beforehand."""

from __future__ import annotations

import argparse
import os
import sys

from fastdeit import launch
from fastdeit.cli import parse_recipe, run
from fastdeit.config import Recipe
from fastdeit.inputs import check_inputs
from fastdeit.pipelines.errors import UserError
from fastdeit.streams import keep_streams


def parse(args: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """Which epochs to label, and the resolved recipe. Raises UserError for epochs that it does not have."""
    parser = argparse.ArgumentParser(
        prog="fastdeit-label",
        description="Store what the teacher says of the very samples of a run, for fastdeit-train --teacher.labels.",
        epilog="RECIPE and its options are those of fastdeit-train; --teacher.labels names the folder to write.",
        usage="%(prog)s [--first-epoch N] [--end-epoch N] [--topk K] RECIPE --teacher.labels FOLDER [...]",
    )
    parser.add_argument("--first-epoch", type=int, default=0, help="first epoch to label, counted from 0")
    parser.add_argument("--end-epoch", type=int, help="epoch to stop before; default: all of the recipe's")
    parser.add_argument("--topk", type=int, default=10, help="soft distillation: logits to keep of a sample")
    own, rest = parser.parse_known_args(args)
    recipe = parse_recipe(rest).resolved()
    if own.end_epoch is None:
        own.end_epoch = recipe.run.epochs
    if not 0 <= own.first_epoch < own.end_epoch <= recipe.run.epochs:
        raise UserError(
            f"epochs {own.first_epoch} to {own.end_epoch}: the recipe has {recipe.run.epochs}, counted from 0"
        )
    return own, recipe


def label() -> None:
    keep_streams()
    own, recipe = parse(sys.argv[1:])
    warning = launch.check_launch()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    if launch.rank() == 0:
        check_inputs(recipe, world=launch.size(), labels=False)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in fastdeit-train
    from fastdeit.distributed import world
    from fastdeit.teacher.labelling import label_run

    with world(recipe.run.device) as joined:
        label_run(recipe, joined, first_epoch=own.first_epoch, end_epoch=own.end_epoch, topk=own.topk)


def main() -> None:
    run(label)


if __name__ == "__main__":
    main()
