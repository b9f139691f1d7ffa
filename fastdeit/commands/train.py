"""`fastdeit-train`: train a recipe."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from fastdeit import launch
from fastdeit.cli import parse_recipe, run
from fastdeit.inputs import check_inputs
from fastdeit.streams import keep_streams
from fastdeit.training.run_lock import RunLock


def train() -> None:
    keep_streams()
    recipe = parse_recipe().resolved()
    warning = launch.check_launch()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    with ExitStack() as stack:
        lock = None
        if launch.rank() == 0:
            check_inputs(recipe, world=launch.size())
            lock = RunLock(Path(recipe.run.output))
            stack.callback(lock.close)
        # Loader threads share the cores with PyTorch's, and a spinning OpenMP thread keeps the one it waits for off its
        # core: measured, a tenth of the speed with one core taken. OpenMP reads this when PyTorch is first imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from fastdeit.distributed import world
        from fastdeit.training.trainer import Trainer

        joined = stack.enter_context(world(recipe.run.device))
        Trainer(recipe, joined, lock).run()


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
