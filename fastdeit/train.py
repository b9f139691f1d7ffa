"""`fastdeit-train`: train a recipe."""

from __future__ import annotations

import os

from fastdeit.cli import parse_recipe, run


def train() -> None:
    recipe = parse_recipe().resolved()
    # Loader threads share the cores with PyTorch's, and a spinning OpenMP thread keeps the one it waits for off its
    # core: measured, a tenth of the speed with one core taken. OpenMP reads this when PyTorch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from fastdeit.distributed import world
    from fastdeit.trainer import Trainer

    with world(recipe.run.device) as joined:
        Trainer(recipe, joined).run()


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
