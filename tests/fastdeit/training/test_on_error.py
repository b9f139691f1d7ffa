"""`data.on_error`: a run that goes on with another image in the place of one that does not decode, and says so."""

import shutil

import numpy as np
import pytest

from fastdeit.data import EvaluationData, TrainingData
from fastdeit.inputs import open_dataset
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.loaders.base import DecodeError
from ordered import need_loader
from runs import opened, train
from tiny_datasets import copy_beton, overwrite

BAD = 7


@pytest.fixture
def damaged(data, tmp_path):
    """A copy of the training set with one image overwritten."""
    path = copy_beton(data / "train.beton", tmp_path / "damaged.beton")
    overwrite(path, BetonDataset(path), BAD)
    return path


@pytest.mark.slow
def test_a_run_fails_by_default_and_goes_on_with_replace(tiny, events, damaged):
    data = {"train": damaged, "val": None, "repeats": 1}
    with pytest.raises(DecodeError, match=rf"damaged\.beton: image {BAD}: "):
        train(tiny(data=data))
    recipe = tiny(data={**data, "on_error": "replace"}, run={"resume": "none"})
    train(recipe)
    found = events(recipe.run.output, "replaced")
    assert [(event["epoch"], event["count"], event["images"]) for event in found] == [
        (epoch, 1, [[BAD, BAD + 1]]) for epoch in range(2)
    ]


def test_a_batch_has_the_label_of_the_image_it_shows(tiny, damaged):
    recipe = tiny(data={"train": damaged, "on_error": "replace", "repeats": 2}, run={"epochs": 6})
    dataset = open_dataset(damaged)
    labels = dataset.label.copy()
    labels[BAD] = labels[BAD + 1] = 3  # classes are stored one behind another
    dataset.label = np.where(np.arange(len(labels)) == BAD, 0, labels)
    seen = 0
    with opened(TrainingData, recipe, dataset) as data, data.batches() as batches:
        for batch in batches:
            assert batch.data.label_a.tolist() == labels[batch.data.index.numpy()].tolist()
            assert batch.replaced == ([(BAD, BAD + 1)] if BAD in batch.data.index else [])
            seen += len(batch.replaced)
    assert seen


def test_stored_labels_do_not_go_with_replaced_images(tiny, damaged, tmp_path):
    with pytest.raises(UserError, match=r"set data\.on_error to 'fail'"):
        tiny(data={"train": damaged, "on_error": "replace"}, teacher={"labels": tmp_path})


def test_nothing_is_replaced_in_an_evaluation(tiny, damaged):
    recipe = tiny(data={"val": damaged, "on_error": "replace"})
    bad = pytest.raises(DecodeError, match=f"image {BAD}: ")
    with opened(EvaluationData, recipe) as data, data.batches() as batches, bad:
        list(batches)


@pytest.mark.slow
def test_the_loader_that_crops_trains_the_same_run(tiny, events):
    need_loader("turbo")
    losses = []
    for loader in ("torch", "turbo"):
        recipe = tiny(data={"loader": loader}, run={"resume": "none", "output": tiny().run.output / loader})
        train(recipe)
        losses.append([event["loss"] for event in events(recipe.run.output, "train")])
        losses[-1].append(events(recipe.run.output, "eval")[-1]["class"]["loss"])
    assert losses[0] == losses[1]


def test_data_without_checksums_are_announced_once(tiny, data, tmp_path, capsys):
    """As plain FFCV writes it: a beton file alone."""
    for split in ("train", "val"):
        shutil.copy(data / f"{split}.beton", tmp_path)
    recipe = tiny(run={"epochs": 1}, data={"train": tmp_path / "train.beton", "val": tmp_path / "val.beton"})
    train(recipe)
    printed = capsys.readouterr().out
    for split in ("train", "val"):
        assert printed.count(f"{tmp_path / split}.beton has no checksums, so damage that still decodes goes unn") == 1
