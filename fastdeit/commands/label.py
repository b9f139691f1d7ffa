"""`fastdeit-label`: store the teacher's labels for every sample of a run."""

import argparse
import sys

from fastdeit import launch
from fastdeit.cli import parse_recipe, program, run
from fastdeit.config import Recipe
from fastdeit.inputs import check_inputs, with_checkpoint_files
from fastdeit.on_demand import with_converted_data
from fastdeit.pipelines.errors import UserError
from fastdeit.streams import keep_streams


def parse(args: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """Which epochs to label, and the resolved recipe. Raises UserError for epochs that it does not have."""
    parser = argparse.ArgumentParser(
        prog=program("label"),
        description="Store the teacher's labels for every sample of a run, for fastdeit-train --teacher.labels.",
        epilog="RECIPE and its options are those of fastdeit-train; --teacher.labels names the folder to write.",
        usage="%(prog)s [--first-epoch N] [--end-epoch N] [--topk K] RECIPE --teacher.labels FOLDER [...]",
    )
    parser.add_argument("--first-epoch", type=int, default=0, help="first epoch to label, counted from 0")
    parser.add_argument("--end-epoch", type=int, help="epoch to stop before; default: all of the recipe's")
    parser.add_argument("--topk", type=int, default=10, help="soft distillation: logits to keep of a sample")
    own, rest = parser.parse_known_args(args)
    recipe = with_checkpoint_files(parse_recipe(rest).resolved())
    if own.end_epoch is None:
        own.end_epoch = recipe.run.epochs
    if not 0 <= own.first_epoch < own.end_epoch <= recipe.run.epochs:
        raise UserError(
            f"epochs {own.first_epoch} to {own.end_epoch}: the recipe has {recipe.run.epochs}, counted from 0"
        )
    return own, recipe


def label() -> None:
    own, recipe = parse(sys.argv[1:])
    keep_streams()
    launch.prepare()
    recipe = with_converted_data(recipe)
    sets = check_inputs(recipe, world=launch.size(), labels=False) if launch.rank() == 0 else None
    # Imported here: mistakes in the command are found without waiting for PyTorch.
    from fastdeit.distributed import world
    from fastdeit.teacher.labelling import label_run

    with world(recipe.run.device) as joined:
        label_run(recipe, joined, first_epoch=own.first_epoch, end_epoch=own.end_epoch, topk=own.topk, sets=sets)


def main() -> None:
    run(label)


if __name__ == "__main__":
    main()
