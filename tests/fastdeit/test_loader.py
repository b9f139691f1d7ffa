"""`create_loader`: the trainer's own batches, for another loop; timm and PIL judge the evaluation transform."""

import json

import pytest
import torch
from PIL import Image
from timm.data import create_transform

import fastdeit
import runs
import steps
from fastdeit.data import TrainingData
from fastdeit.loader import ImageLoader
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import deit_tiny
from refusals import refused
from runs import changed


def recipe(**departures):
    return changed(deit_tiny(), model={"img_size": 32}, data={"loader": "torch"}, departures=departures)


def opened(data, batch_size=32, **options):
    options = {"recipe": recipe(), "device": "cpu", "threads": 2, **options}
    return fastdeit.create_loader(data / "train.beton", batch_size=batch_size, **options)


def test_the_batches_are_the_trainers(data):
    with opened(data, batch_size=64, epoch=3) as loader, runs.opened(TrainingData, loader.recipe) as judge:
        found = list(loader)
        expected = [batch for *_, batch in judge.flow(3)]
    assert len(found) == len(expected) == len(loader) == 2
    for (images, targets), batch in zip(found, expected, strict=True):
        assert torch.equal(images, batch.images)
        assert torch.equal(targets, batch.targets(4, 0.1))
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 64)
    assert (loader.epoch, loader.step) == (4, 0)


def test_any_moment_resumes_after_the_last_batch(data):
    with opened(data) as loader:
        whole = [images.clone() for _ in range(2) for images, _ in loader]
    assert len(whole) == 10
    for stop in (1, 4, 5, 7):
        with opened(data) as loader:
            given = 0
            while given < stop:
                for _ in loader:
                    given += 1
                    if given == stop:
                        state = json.loads(json.dumps(loader.state_dict()))
                        break
        with opened(data, epoch=1) as again:
            again.load_state_dict(state)
            rest = [images.clone() for _ in range(2 - again.epoch) for images, _ in again]
        assert len(rest) == 10 - stop
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[stop:], strict=True))


def test_evaluation_is_timms_transform_of_every_image_once(data, images):
    transform = create_transform(32, is_training=False, interpolation="bicubic", crop_pct=0.875)
    files = sorted((images / "train").rglob("*.jpg"))
    with opened(data, batch_size=48, train=False) as loader:
        assert len(loader) == 4
        batches = list(loader)
        assert loader.class_names == [f"class{i}" for i in range(4)]
    found, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    assert torch.equal(found, torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))
    assert labels.tolist() == [int(file.parent.name[-1]) for file in files]


def test_a_batch_of_any_even_size(data):
    for size in (2, 10, 50):
        with opened(data, batch_size=size) as loader:
            images, targets = next(iter(loader))
            assert images.shape == (size, 3, 32, 32)
            assert targets.shape == (size, 4)


def test_without_mixing_and_smoothing_labels_are_numbers(data):
    plain = changed(recipe(), augment={"mix_prob": 0.0, "label_smoothing": 0.0})
    with opened(data, batch_size=7, recipe=plain) as loader:
        images, targets = next(iter(loader))
    assert (len(images), targets.dtype, targets.shape) == (7, torch.int64, (7,))


@pytest.mark.slow
def test_two_processes_share_the_steps_of_one(data, tmp_path):
    with opened(data, batch_size=64, recipe=recipe(mix_group=16)) as loader:
        whole = [images.clone() for images, _ in loader]
    parts = steps.in_two_processes(steps.load_batches, tmp_path, data / "train.beton", recipe(mix_group=16))
    for step, expected in enumerate(whole):
        both = torch.cat([part[step] for part in parts])
        assert sorted(both.flatten(1).sum(1).tolist()) == sorted(expected.flatten(1).sum(1).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "nonsense"}, "there is no recipe 'nonsense': choose one of deit_tiny"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 7}, "Mixup and CutMix mix pairs"),
        ({"step": 5}, "an epoch has 5 steps, counted from 0"),
        ({"epoch": -1}, "epoch -1"),
        ({"batch_size": 1000}, "fewer than a global batch of 1000"),
    ],
)
def test_mistakes(data, options, message):
    refused(message, opened, data, **options)


def test_a_state_of_another_loader_is_refused(data):
    with opened(data) as loader:
        state = loader.state_dict()
        for name, value in (("seed", 5), ("global_batch", 64), ("data", "x"), ("epoch", "0"), ("step", 99)):
            with pytest.raises(UserError):
                loader.load_state_dict({**state, name: value})
        with pytest.raises(UserError):
            loader.load_state_dict({})
        assert loader.state_dict() == state


def test_the_interface_is_what_the_package_names():
    assert fastdeit.create_loader is ImageLoader
    assert {"create_loader", "fuse", "load"} <= set(dir(fastdeit))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastdeit.nonsense
