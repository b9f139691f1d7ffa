"""A whole run from Python: what `fastdeit train` does."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastdeit import launch
from fastdeit.config import Recipe
from fastdeit.inputs import check_inputs, facts, open_data_sets, with_checkpoint_files
from fastdeit.on_demand import with_converted_data
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import recipe_of
from fastdeit.signals import StopSignals
from fastdeit.training.run_lock import take_folder

Scores = dict[str, Any]


class Trainer:
    """Trains a recipe in this process, or under torchrun in each of its processes.

    recipe  resolved
    """

    def __init__(self, recipe: str | Recipe, **sections: dict[str, Any]) -> None:
        """`recipe` is a name or a recipe; `sections` override its fields: run={"epochs": 10}, data={"train": FILE}.

        Raises UserError for an unknown recipe, section or field, and for values that do not go together.
        """
        made = recipe_of(recipe)
        for section, values in sections.items():
            held = getattr(made, section, None)
            if not dataclasses.is_dataclass(held) or isinstance(held, type):
                raise UserError(f"a recipe has no section '{section}': {', '.join(_sections(made))}")
            if not isinstance(values, dict):
                raise UserError(f"the section '{section}' of a recipe is {values!r:.40}: give a dict of its fields")
            unknown = values.keys() - {field.name for field in dataclasses.fields(held)}
            if unknown:
                raise UserError(f"the section '{section}' of a recipe has no field '{min(unknown)}'")
            paths = {name: Path(value) for name, value in values.items() if _is_path(held, name, value)}
            made = dataclasses.replace(made, **{section: dataclasses.replace(held, **{**values, **paths})})
        try:
            self.recipe = with_checkpoint_files(made.resolved())
        except TypeError as error:  # text where a number belongs
            raise UserError(f"a field of the recipe has a value of the wrong type: {error}") from error

    def fit(self, *, signals: bool = False) -> dict[str, Scores]:
        """Train to the last epoch, from the newest checkpoint if there is one; returns the last scores.

        The scores are by kind of weights ("model", "ema") and head ("class", "distillation", ...): top1, top5, loss and
        ece.

        signals  Ctrl-C, SIGTERM and others end the program with a checkpoint, as in `fastdeit train`; otherwise they do
                 what they do in your program
        """
        launch.prepare()
        recipe = with_converted_data(self.recipe)
        with ExitStack() as stack:
            stop = stack.enter_context(StopSignals()) if signals else None
            lock = None
            if launch.rank() == 0:
                sets = check_inputs(recipe, world=launch.size())
                lock = take_folder(Path(recipe.run.output))
                stack.callback(lock.close)
            else:
                sets = open_data_sets(recipe)
            # Imported here: mistakes are found without waiting for PyTorch.
            from fastdeit.distributed import world
            from fastdeit.training import trainer

            joined = stack.enter_context(world(recipe.run.device, recipe.run.timeout_minutes, facts(recipe, sets)))
            return trainer.Trainer(recipe, joined, lock, sets, stop).run()


def _sections(recipe: Recipe) -> list[str]:
    return [f.name for f in dataclasses.fields(recipe) if dataclasses.is_dataclass(getattr(recipe, f.name))]


def _is_path(section: Any, name: str, value: Any) -> bool:
    """Whether a field that holds a path got text."""
    (field,) = (field for field in dataclasses.fields(section) if field.name == name)
    return isinstance(value, str) and "Path" in str(field.type)
