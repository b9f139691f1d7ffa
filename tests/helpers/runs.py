"""Recipes that differ in a few fields, and training runs in this process."""

import json
from dataclasses import replace

import torch

from fastdeit import checkpoint
from fastdeit.cli import parse_recipe
from fastdeit.config import Recipe
from fastdeit.distributed import world
from fastdeit.training.resume import FREE
from fastdeit.training.trainer import Trainer


def changed(recipe, **fields):
    """`recipe` with other fields; a dict holds those of a section that change."""
    sections = {name: replace(getattr(recipe, name), **of) for name, of in fields.items() if isinstance(of, dict)}
    return replace(recipe, **{**fields, **sections})


def parse_file(path, content, *words):
    """The recipe of the command line `words` with `--config path`; the file holds this text, recipe or dict."""
    values = content.to_dict() if isinstance(content, Recipe) else content
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return parse_recipe([*words, "--config", str(path)])


def train(recipe):
    """The scores of a whole run."""
    with world(recipe.run.device) as joined:
        return Trainer(recipe, joined).run()


def newest(recipe):
    """The path of the run's last checkpoint."""
    return checkpoint.found(recipe.run.output / "checkpoints")[0]


def final_state(recipe):
    return checkpoint.load(newest(recipe))


def rewind(recipe, step):
    """Remove the run's checkpoints after `step`."""
    folder = recipe.run.output / "checkpoints"
    for path in checkpoint.found(folder):
        if path > checkpoint.step_path(folder, step):
            path.unlink()


def trained(recipe):
    """The state at the end of a whole run."""
    train(recipe)
    return final_state(recipe)


def _flat(value, prefix=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}/{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}/{i}")
    else:
        yield prefix, value


def assert_same_state(a, b):
    """Assert that two checkpoints are equal, except for fields of `run` that a resume may change, as its folder."""
    first, second = dict(_flat(a)), dict(_flat(b))
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
        elif key.removeprefix("/recipe/run/") not in FREE["run"]:
            assert value == second[key], key
