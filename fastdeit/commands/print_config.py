"""`fastdeit-train RECIPE ... --print-config`: the resolved recipe, and what `auto` chooses on this machine."""

import json
from functools import partial

from fastdeit import launch
from fastdeit.config import Recipe
from fastdeit.effects import fields
from fastdeit.inputs import check_inputs
from fastdeit.pipelines.console import answer, say
from fastdeit.recipes import RECIPES


def print_config(recipe: Recipe) -> None:
    """Print a resolved recipe as JSON on stdout, which `--config` reads, and sentences about it on stderr.

    These are its differences from the named recipe, and what stands for each "auto". The loader is timed on
    `data.train`, if that is given. Of several processes, the main one prints. Nothing is written.
    """
    main = launch.rank() == 0
    if main:
        answer(json.dumps(recipe.to_dict(), indent=2))
    for sentence in filter(None, [_differences(recipe), recipe.parts().sentence(), *_choices(recipe)]):
        if main:
            say(sentence, "stderr")


def _differences(recipe: Recipe) -> str:
    if recipe.name not in RECIPES:
        return f"'{recipe.name}' is a stored recipe, with a name of its own"
    named, values = fields(RECIPES[recipe.name]().filled()), fields(recipe)
    changed = [f"{name} {value} (not {named[name]})" for name, value in values.items() if value != named[name]]
    return f"differs from {recipe.name}: {', '.join(changed)}" if changed else f"as {recipe.name} has it"


def _choices(recipe: Recipe) -> list[str]:
    # Imported here: the recipe is printed without waiting for PyTorch.
    from fastdeit.distributed import world
    from fastdeit.model.kernel_choice import choose_kernels
    from fastdeit.precision import compiles
    from fastdeit.setup import data_sentences, open_training_data, set_up, teacher_in_loop
    from fastdeit.training.graphs import choose_graphs

    with world(recipe.run.device) as joined:
        precision = set_up(recipe, joined)
        sets = check_inputs(recipe) if recipe.data.train is not None else None
        classes = sets.num_classes if sets is not None else recipe.model.num_classes or 1000
        kernels = choose_kernels(recipe.model, precision, classes, joined)
        replayed, why = choose_graphs(recipe, joined, precision)
        sentences = [
            f"device {joined.device}, precision {precision.name}{precision.note and f': {precision.note}'}",
            f"torch.compile {'on' if compiles(recipe, joined.device) else 'off'}",
            f"CUDA graphs {'on' if replayed else 'off'}: {why}",
            kernels.sentence(),
        ]
        if sets is None:
            return [*sentences, "loader and augmentation: give --data.train to have them chosen"]
        data = open_training_data(
            recipe,
            sets.train,
            joined,
            precision,
            kernels,
            teacher=teacher_in_loop(recipe),
            say=partial(say, name="stderr"),
        )
        try:
            return [*sentences, *data_sentences(data)]
        finally:
            data.close()
