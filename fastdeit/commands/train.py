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
    trainer = Trainer(parse_recipe([word for word in sys.argv[1:] if word != PRINT]))
    if PRINT not in sys.argv:
        keep_streams()  # a run outlives its terminal
        trainer.fit(signals=True)
        return
    launch.prepare()
    print_config(with_converted_data(trainer.recipe))


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
