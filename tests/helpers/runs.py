"""Recipes that differ in a few fields, and training runs in this process."""

import json
from contextlib import closing, contextmanager
from dataclasses import replace

import torch

from fastdeit import checkpoint
from fastdeit.cli import parse_recipe
from fastdeit.commands.eval import Options, evaluate_checkpoint
from fastdeit.config import Recipe
from fastdeit.data import TrainingData
from fastdeit.distributed import world
from fastdeit.inputs import open_dataset
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


def evaluated(checkpoint, val=None, **options):
    """The scores by kind of weights that `fastdeit eval` finds on one data set; None: the run's own."""
    sets = () if val is None else (val,)
    [scores] = evaluate_checkpoint(Options(checkpoint=checkpoint, val=sets, **options)).values()
    return scores


@contextmanager
def opened(kind, recipe, dataset=None):
    """`TrainingData` or `EvaluationData` of a recipe in this process alone; of its own data set, or of `dataset`."""
    with world(recipe.run.device) as joined:
        dataset = dataset or open_dataset(recipe.data.train if kind is TrainingData else recipe.data.val)
        with closing(kind(recipe, dataset, joined)) as data:
            yield data


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


def differing(one, other, path=""):
    """Where two nested states differ in keys, types or bits: the paths."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        inner = [differing(one[key], other[key], f"{path}/{key}") for key in one.keys() & other.keys()]
        return sum(inner, [f"{path}/{key}" for key in one.keys() ^ other.keys()])
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [path]


def same_values(one, other):
    return not differing(one, other)


def assert_same_state(a, b):
    """Assert that two checkpoints are equal, except for fields of `run` that a resume may change, as its folder."""
    assert [path for path in differing(a, b) if path.removeprefix("/recipe/run/") not in FREE["run"]] == []
