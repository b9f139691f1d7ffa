"""`fastdeit-train`: train a recipe."""

import sys
from contextlib import ExitStack
from pathlib import Path

from fastdeit import launch
from fastdeit.cli import parse_recipe, run
from fastdeit.commands.print_config import print_config
from fastdeit.inputs import check_inputs, facts, open_data_sets, with_checkpoint_files
from fastdeit.on_demand import with_converted_data
from fastdeit.signals import StopSignals
from fastdeit.streams import keep_streams
from fastdeit.training.run_lock import RunLock

PRINT = "--print-config"


def train() -> None:
    keep_streams()
    words = [word for word in sys.argv[1:] if word != PRINT]
    recipe = with_checkpoint_files(parse_recipe(words).resolved())
    launch.prepare()
    recipe = with_converted_data(recipe)
    if PRINT in sys.argv:
        print_config(recipe)
        return
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        lock = None
        if launch.rank() == 0:
            sets = check_inputs(recipe, world=launch.size())
            lock = RunLock(Path(recipe.run.output))
            stack.callback(lock.close)
        else:
            sets = open_data_sets(recipe)
        # Imported here: mistakes in the command are found without waiting for PyTorch.
        from fastdeit.distributed import world
        from fastdeit.training.trainer import Trainer

        joined = stack.enter_context(world(recipe.run.device, recipe.run.timeout_minutes, facts(recipe, sets)))
        Trainer(recipe, joined, lock, sets, signals).run()


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
