"""The pixels of what "auto" became stay: over a resume, with stored labels, in evaluation, on every process."""

import json

import pytest
import torch

import fastdeit.data
from fastdeit import checkpoint
from fastdeit.data import EvaluationData, TrainingData
from fastdeit.distributed import World, world
from fastdeit.inputs import open_dataset
from fastdeit.pipelines.loaders.choose import LOADERS
from fastdeit.pipelines.loaders.pillow import TorchLoader
from fastdeit.teacher.labelling import label_run
from fastdeit.training.trainer import Trainer
from ordered import need_loader
from refusals import refused
from runs import changed, newest, train, trained


@pytest.fixture
def fastest(monkeypatch):
    """Function: from now on the fastest loader is the one of that name, a loader through PIL; what was asked."""

    def make(name):
        asked = []

        def choose(dataset, first, regions, *, pixels, **options):
            asked.append((len(dataset), pixels))
            return name, f"measured: {name}"

        monkeypatch.setitem(LOADERS, name, type("Named", (TorchLoader,), {"name": name}))
        monkeypatch.setattr(fastdeit.data, "choose_loader", choose)
        return asked

    return make


@pytest.mark.slow
def test_a_resumed_run_may_choose_again_among_equal_pixels(tiny, fastest, events, capsys):
    asked = fastest("one")
    first = tiny(data={"loader": "auto"}, run={"epochs": 1})
    with world("cpu") as joined:
        Trainer(first, joined).run()
        assert asked == [(160, None)]  # once, and for training alone
        assert "loader one: measured: one" in capsys.readouterr().out
        asked = fastest("another")
        trainer = Trainer(first, joined)
        trainer.run()
    ((images, (pixels, whose)),) = asked
    assert (images, pixels) == (160, "pillow")
    assert whose.startswith("the checkpoint ")
    assert whose.endswith("-000000005.pt")
    assert trainer.val.loader.name == "another"
    assert [e["loader"] for e in events(first.run.output, "start")] == ["one", "another"]


def with_loader(recipe, name, output=None):
    run = {} if output is None else {"output": recipe.run.output.with_name(output)}
    return changed(recipe, data={"loader": name}, run=run)


def rewritten(path, pixels):
    """Make a checkpoint one of a run with other pixels."""
    state = checkpoint.load(path)
    state["effective"]["data.loader (pixels)"] = pixels
    torch.save(state, path)


@pytest.mark.slow
def test_auto_goes_on_with_the_checkpoints_pixels(tiny, launch):
    pytest.importorskip("ffcv")
    first = tiny(data={"loader": "ffcv"}, run={"epochs": 1})
    train(first)
    path = newest(first)
    process = launch(with_loader(first, "auto"))
    assert f"(among loaders with ffcv pixels, as used for the checkpoint {path})" in process.out
    assert "loader ffcv: " in process.out
    refused(r"another data\.loader \(pixels\) \(ffcv, this run has pillow\)", train, with_loader(first, "torch"))


@pytest.mark.slow
def test_a_checkpoint_of_other_pixels_is_refused(tiny, capsys):
    first = tiny(run={"epochs": 1})
    train(first)
    path = newest(first)
    train(with_loader(first, "auto"))
    assert f"loaders with pillow pixels, as used for the checkpoint {path})" in capsys.readouterr().out
    for pixels in ("ffcv", "nvjpeg"):
        rewritten(path, pixels)
        refused(rf"\({pixels}, this run has pillow\)", train, first)
    # No loader on this machine decodes like a GPU, or like a loader that no longer exists.
    for pixels in ("nvjpeg", "gone"):
        rewritten(path, pixels)
        refused(rf"no loader here decodes {pixels} pixels .* the checkpoint {path}:", train, with_loader(first, "auto"))


@pytest.mark.slow
def test_a_loader_of_equal_pixels_goes_on_with_the_same_bits(tiny, events):
    need_loader("turbo")
    straight, switched = (with_loader(tiny(run={"epochs": 2}), "torch", name) for name in ("straight", "switched"))
    expected = trained(straight)
    train(switched)
    newest(switched).unlink()  # the first epoch's is left
    found = trained(with_loader(switched, "turbo"))
    assert [e["loader"] for e in events(switched.run.output, "start")] == ["torch", "turbo"]
    assert found["global_step"] == expected["global_step"] == 10
    assert all(torch.equal(found["model"][name], expected["model"][name]) for name in expected["model"])


@pytest.mark.slow
def test_stored_labels_serve_loaders_of_equal_pixels(tiny, teacher_checkpoint, launch, tmp_path):
    need_loader("turbo")
    labels = tmp_path / "labels"
    teacher = {"name": "resnet10t", "checkpoint": teacher_checkpoint, "labels": labels}
    recipe = tiny(objective={"distillation": "hard"}, teacher=teacher, data={"loader": "turbo"}, run={"epochs": 1})
    with world("cpu") as joined:
        label_run(recipe, joined, first_epoch=0, end_epoch=1, topk=4)
    described = json.loads((labels / "labels.json").read_text())
    assert described["key"]["data.loader (pixels)"] == "pillow"
    process = launch(with_loader(recipe, "auto", "auto"))
    assert f"(among loaders with pillow pixels, as used for the labels in {labels})" in process.out
    train(with_loader(recipe, "torch"))
    described["key"]["data.loader (pixels)"] = "ffcv"
    (labels / "labels.json").write_text(json.dumps(described))
    refused(r"data\.loader \(pixels\) is 'ffcv' there and 'pillow' here", train, with_loader(recipe, "torch", "other"))


class Joined(World):
    """Two processes one after the other: the second hears what the first said."""

    said: list[torch.Tensor] = []  # noqa: RUF012

    def broadcast(self, tensors):
        for tensor in tensors:
            if self.main:
                self.said.append(tensor.clone())
            else:
                tensor.copy_(self.said.pop(0))


def test_all_processes_take_the_choice_of_the_first(tiny, fastest):
    recipe = tiny(data={"loader": "auto"})
    train, val = (open_dataset(path) for path in (recipe.data.train, recipe.data.val))
    for name in ("one", "torch"):
        asked = fastest(name)
        for rank in (0, 1):
            joined = Joined(rank, 2, 2, torch.device("cpu"))
            for data in (TrainingData(recipe, train, joined), EvaluationData(recipe, val, joined)):
                assert data.loader.name == name
                data.close()
        assert asked == [(160, None), (44, None)]  # the first process alone


def test_the_hardware_decoder_takes_a_share(tiny):
    refused(r"data\.hw_decoder_load is 1\.5: it must be from 0 to 1", tiny, data={"hw_decoder_load": 1.5})
