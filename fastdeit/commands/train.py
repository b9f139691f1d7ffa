"""`fastdeit-train`: train a recipe."""

import sys

from fastdeit import launch
from fastdeit.cli import parse_recipe, run
from fastdeit.commands.print_config import print_config
from fastdeit.on_demand import with_converted_data
from fastdeit.streams import keep_streams
from fastdeit.whole_run import Trainer

PRINT = "--print-config"


def train() -> None:
    prints = PRINT in sys.argv
    if not prints:  # a run outlives its terminal, but a recipe that cannot be printed is an error
        keep_streams()
    trainer = Trainer(parse_recipe([word for word in sys.argv[1:] if word != PRINT]))
    if not prints:
        trainer.fit(signals=True)
        return
    launch.prepare()
    print_config(with_converted_data(trainer.recipe))


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
