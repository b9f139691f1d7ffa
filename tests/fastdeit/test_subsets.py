"""`data.hold_out` and `data.fraction`: no image is both trained and evaluated on; shares are those of scikit-learn."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from fastdeit import create_loader, load
from fastdeit.commands.eval import table
from fastdeit.data import TrainingData
from fastdeit.distributed import world
from fastdeit.inputs import open_dataset
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.report.network import look
from fastdeit.report.pictures import Missing
from fastdeit.report.runs import read_run
from fastdeit.sections import DataConfig
from fastdeit.subsets import divide
from refusals import refused
from runs import evaluated, newest, opened, train
from tiny_datasets import copy_beton, overwrite


@pytest.fixture
def copied(data, tmp_path):
    """A copy of the training set."""
    return copy_beton(data / "train.beton", tmp_path / "copy.beton")


def shares(labels, **fields):
    found = divide(DataConfig(**fields), labels)
    return found.train, found.held_out


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=200).filter(lambda x: np.bincount(x).max() > 1),
    st.floats(0, 0.99),
    st.floats(0.01, 1),
)
def test_the_two_parts_are_disjoint_and_hold_every_class(labels, hold_out, fraction):
    labels = np.array(labels)
    train_images, held = shares(labels, hold_out=hold_out, fraction=fraction)
    assert not set(train_images) & set(held)
    assert set(labels[train_images]) == set(labels)
    if hold_out:
        several = {label for label in set(labels.tolist()) if (labels == label).sum() > 1}
        assert set(labels[held].tolist()) == several
    for part in (train_images, held):
        assert (np.diff(part) > 0).all()
        assert part.dtype == np.int64


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_shares_of_the_classes_are_those_of_scikit_learn(share):
    labels = np.repeat(np.arange(5), [40, 80, 400, 1000, 200])
    train_images, held = shares(labels, hold_out=share)
    theirs, their_held = train_test_split(labels, test_size=share, stratify=labels, random_state=0)
    assert np.bincount(labels[train_images]).tolist() == np.bincount(theirs).tolist()
    assert np.bincount(labels[held]).tolist() == np.bincount(their_held).tolist()


def test_a_smaller_share_is_part_of_a_larger_one():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    small, held = shares(labels, hold_out=0.1, fraction=0.2)
    large, held_too = shares(labels, hold_out=0.1, fraction=0.6)
    assert set(small) < set(large)
    assert held.tolist() == held_too.tolist()  # a trial is judged by the images of the whole run
    assert set(held) < set(shares(labels, hold_out=0.3)[1])


def test_the_choice_is_the_same_everywhere():
    """A run that is resumed on another machine, or by another version of NumPy, must find the same images."""
    assert shares(np.arange(20) % 2, hold_out=0.3)[1].tolist() == [4, 5, 11, 12, 14, 19]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hold_out": 0.1}, "leave one of them out"),
        ({"hold_out": 1.0, "val": None}, r"data\.hold_out is 1\.0"),
        ({"fraction": 0.0}, r"data\.fraction is 0\.0"),
        ({"fraction": 0.01}, "there are 4 images to train on, fewer than a global batch of 32"),
    ],
)
def test_bad_shares_are_refused(tiny, fields, reason):
    refused(reason, lambda: train(tiny(data=fields)))


def test_no_class_with_two_images():
    refused("keeps no image for validation", shares, np.arange(5), hold_out=0.2)


def test_a_run_is_judged_by_images_that_it_never_saw(tiny, data, capsys):
    recipe = tiny(data={"val": None, "hold_out": 0.25, "fraction": 0.8, "repeats": 1})
    held = divide(recipe.data, open_dataset(recipe.data.train).label).held_out
    assert len(held) == 40
    with create_loader(recipe.data.train, recipe, batch_size=32, device="cpu") as loader:
        assert loader._data.order.length == 96
        drawn = {int(i) for epoch in range(4) for step in range(3) for i in loader._data.order.step(epoch, step).index}
    assert len(drawn) == 96
    assert not drawn & set(held.tolist())
    with create_loader(recipe.data.train, recipe, batch_size=32, train=False, device="cpu") as loader:
        labels = [label for _, targets in loader for label in targets.tolist()]
    assert labels == BetonDataset(recipe.data.train).label[held].tolist()

    scores = train(recipe)
    assert scores["model"]["images"] == 40
    assert "96 of 160 images (40 are held out for validation)" in capsys.readouterr().out
    again = evaluated(checkpoint=recipe.run.output, loader="torch", device="cpu", threads=1)
    assert again["model"]["class"] == pytest.approx(scores["model"]["class"])
    assert f"{recipe.data.train}, the 40 images that the run held out" in capsys.readouterr().out


def test_a_run_evaluates_on_its_own_validation_set_by_default(tiny, capsys):
    recipe = tiny(run={"epochs": 1})
    scores = train(recipe)
    again = evaluated(checkpoint=newest(recipe), loader="torch", device="cpu", threads=1)
    assert again["ema"]["class"] == pytest.approx(scores["ema"]["class"])
    alone = tiny(data={"val": None}, run={"epochs": 1, "output": recipe.run.output / "other"})
    train(alone)
    refused("name a data set after it", evaluated, checkpoint=alone.run.output, device="cpu")


def test_a_held_out_image_replaces_none(tiny, copied):
    recipe = tiny(data={"train": copied, "val": None, "hold_out": 0.5, "on_error": "replace", "repeats": 1})
    dataset = BetonDataset(copied)
    images = divide(recipe.data, dataset.label)
    bad = next(int(i) for i in images.train if i + 1 in images.held_out)
    overwrite(copied, dataset, bad)
    with opened(TrainingData, recipe, dataset) as batches:
        replaced = {pair for epoch in range(2) for _, decoded, _ in batches.flow(epoch) for pair in decoded.replaced}
    following = int(images.train[images.train > bad][0])
    assert replaced == {(bad, following)}


@pytest.mark.slow
def test_a_held_out_image_that_does_not_decode(tiny, copied, events):
    """With `data.on_error` "replace", another held-out image takes its place in the evaluation, which says so."""
    recipe = tiny(data={"train": copied, "val": None, "hold_out": 0.25, "on_error": "replace"}, run={"epochs": 1})
    dataset = BetonDataset(copied)
    overwrite(copied, dataset, int(divide(recipe.data, dataset.label).held_out[3]))
    train(recipe)
    assert [event["replaced"] for event in events(recipe.run.output, "eval")] == [1, 1]
    scores = evaluated(checkpoint=recipe.run.output, loader="torch", device="cpu", threads=1)
    assert "ema: held-out images replaced because they do not decode: 1" in table(scores)


@pytest.mark.slow
def test_a_data_set_that_was_converted_again_deals_other_images(tiny, copied, images, tmp_path, monkeypatch):
    """Images that the run trained on must not pass for held-out ones."""
    recipe = tiny(data={"train": Path(copied.name), "val": None, "hold_out": 0.25}, run={"epochs": 1})
    monkeypatch.chdir(tmp_path)
    train(recipe)
    options = {"checkpoint": recipe.run.output, "loader": "torch", "device": "cpu", "threads": 1}
    monkeypatch.chdir("/")
    assert evaluated(**options)["model"]["images"] == 40  # the path is relative to where the run was started
    assert load(recipe.run.output).recipe.data.hold_out == 0  # every image of another data set
    shutil.copytree(images / "train", tmp_path / "more")
    shutil.copy(next((tmp_path / "more/class0").iterdir()), tmp_path / "more/class0/again.jpg")
    convert(str(tmp_path / "more"), copied, progress=False)
    refused("no longer holds the images that the run trained on", evaluated, **options)
    with world("cpu") as joined:
        found = look(read_run(recipe.run.output), joined, images=8, batch=8)
    for part in (found.samples, found.judged):
        assert isinstance(part, Missing)
        assert "no longer holds the images" in part.why
    copied.unlink()
    refused(r"the run's data\.train, .*copy\.beton, does not exist", evaluated, **options)
