"""What is raced at the start changes no bit: each outcome is forced, and the runs are compared."""

import time
from unittest.mock import Mock

import numpy as np
import pytest

from fastdeit import checkpoint, stage_choice
from fastdeit.data import EvaluationData, TrainingData
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.loaders import choose as loading
from fastdeit.pipelines.loaders.choose import FAST, LOADERS, pixels_of
from fastdeit.pipelines.loaders.pillow import TorchLoader
from runs import changed, evaluated, newest, opened, same_values, train


def installed():
    """The loaders that "auto" may become on this machine."""
    out = ["torch"]
    for name, find in FAST.items():
        try:
            find()
        except ValueError:
            continue
        if pixels_of(name) == "pillow":
            out.append(name)
    return out


@pytest.fixture
def outcome(monkeypatch):
    """Function: from now on the loader of that name is the fastest, however slow it is."""
    fast = dict(FAST)

    def force(name):
        monkeypatch.setattr(loading, "FAST", {} if name == "torch" else fast)
        monkeypatch.setattr(loading, "_rates", lambda loaders, *_: {n: 1e9 if n == name else 1.0 for n in loaders})

    return force


@pytest.mark.slow
def test_every_outcome_of_the_loaders_race_gives_the_same_bits(tiny, outcome, events, tmp_path):
    losses, scores, weights = {}, {}, {}
    names = installed()
    assert len(names) > 1
    for name in names:
        outcome(name)
        recipe = tiny(data={"loader": "auto"}, run={"epochs": 1, "output": tmp_path / name})
        scores[name] = [train(recipe)]
        assert events(recipe.run.output, "start")[0]["loader"] == name
        losses[name] = [e["loss"] for e in events(recipe.run.output, "train")]
        path = newest(recipe)
        weights[name] = checkpoint.load(path)["model"]
        first = checkpoint.found(tmp_path / "torch" / "checkpoints")[0]
        scores[name].append(evaluated(checkpoint=first, val=recipe.data.val, device="cpu"))
    for name in names[1:]:
        assert losses[name] == losses["torch"]
        assert scores[name] == scores["torch"]
        assert same_values(weights[name], weights["torch"])


missing = Mock(side_effect=UserError("not installed: install it"))


def test_a_machine_with_ffcv_alone_trains_with_pillow(tiny, monkeypatch):
    monkeypatch.setattr(loading, "FAST", {"turbo": missing, "ffcv": lambda: None, "dali": missing})
    with opened(EvaluationData, tiny(data={"loader": "auto"})) as data:
        assert data.loader.name == "torch"


def test_however_fast_another_decoder_is_it_does_not_take_part(tiny, monkeypatch):
    """ffcv here is a loader that takes no time at all, turbo one that sleeps."""

    class Slow(TorchLoader):
        name = "turbo"

        def decode_image(self, index, out, region=None):
            time.sleep(0.01)
            return super().decode_image(index, out)

    class Instant(TorchLoader):
        name, pixels = "ffcv", "ffcv"

        def decode_image(self, index, out, region=None):
            raise AssertionError("asked to decode")

    for name, loader in (("turbo", Slow), ("ffcv", Instant)):
        monkeypatch.setitem(LOADERS, name, loader)
    monkeypatch.setattr(loading, "FAST", {"turbo": lambda: None, "ffcv": lambda: None, "dali": missing})
    with opened(EvaluationData, tiny(data={"loader": "auto"})) as data:
        assert data.loader.name == "turbo"


def test_on_a_gpu_dalis_own_pixels_take_no_part():
    assert pixels_of("dali", device_id=0) == "nvjpeg"
    assert pixels_of("dali") == "pillow"


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["device", "host"])
def test_every_outcome_of_the_stages_race_gives_the_same_batches(tiny, monkeypatch, stage):
    def choose(openers, first, device):
        return stage, "forced", openers[stage]()

    monkeypatch.setattr(stage_choice, "choose_stage", choose)
    recipe = tiny(data={"stage": "auto"}, run={"device": "cuda"})
    host = changed(recipe, data={"stage": "host"}, run={"device": "cpu"})
    found = []
    for one in (recipe, host):
        with opened(TrainingData, one) as data, data.batches() as batches:
            found.append([t.cpu().numpy() for _ in range(3) for t in next(batches).data.tensors()])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
