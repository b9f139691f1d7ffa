"""`fastdeit-train`: train a recipe."""

from __future__ import annotations

from fastdeit.cli import parse_recipe, run


def train() -> None:
    recipe = parse_recipe().resolved()
    # PyTorch is imported only once the command line is known to be right.
    from fastdeit.distributed import world
    from fastdeit.trainer import Trainer

    with world(recipe.run.device) as joined:
        Trainer(recipe, joined).run()


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
