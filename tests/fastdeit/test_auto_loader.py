"""What "auto" became stays: over a resume, with stored labels, in evaluation, on every process."""

import pytest
import torch

import fastdeit.data
from fastdeit.cli import UserError
from fastdeit.data import EvaluationData, TrainingData, open_dataset
from fastdeit.distributed import World, world
from fastdeit.labelling import label_run
from fastdeit.pipelines.loader_torch import TorchLoader
from fastdeit.pipelines.loading import LOADERS
from fastdeit.trainer import Trainer


@pytest.fixture
def fastest(monkeypatch):
    """Function: from now on the fastest loader is the one of that name, a loader through PIL; what was asked."""

    def make(name):
        asked = []

        def choose(dataset, order, **options):
            asked.append(len(dataset))
            return name, f"measured: {name}"

        monkeypatch.setitem(LOADERS, name, type("Named", (TorchLoader,), {"name": name}))
        monkeypatch.setattr(fastdeit.data, "choose_loader", choose)
        return asked

    return make


def test_a_resumed_run_keeps_its_loader(tiny, fastest, events, capsys):
    asked = fastest("one")
    first = tiny(data={"loader": "auto"}, run={"epochs": 1})
    with world("cpu") as joined:
        Trainer(first, joined).run()
        assert asked == [160]  # once, and for training alone
        assert "loader one: measured: one" in capsys.readouterr().out
        asked = fastest("another")
        trainer = Trainer(first, joined)
        trainer.run()
        assert asked == []
        assert "loader one: as before: " in capsys.readouterr().out
        assert trainer.val.loader.name == "one"
        assert [e["loader"] for e in events(first.run.output, "start")] == ["one", "one"]
        # Asked for by name, another is another run.
        with pytest.raises(UserError, match=r"another data\.loader \(one, this run has another\)"):
            Trainer(tiny(data={"loader": "another"}, run={"epochs": 1}), joined).run()


def test_what_the_checkpoint_names_must_be_there(tiny, fastest, monkeypatch):
    fastest("one")
    first = tiny(data={"loader": "auto"}, run={"epochs": 1})
    with world("cpu") as joined:
        Trainer(first, joined).run()
        monkeypatch.delitem(LOADERS, "one")
        with pytest.raises(UserError, match=r"'one', as before: .*-000000005\.pt names it: .* --data\.loader"):
            Trainer(first, joined)


def test_stored_labels_name_the_loader(tiny, teacher_checkpoint, fastest, tmp_path):
    teacher = {"name": "resnet10t", "checkpoint": teacher_checkpoint, "labels": tmp_path / "labels"}
    recipe = tiny(objective={"distillation": "hard"}, teacher=teacher, data={"loader": "auto"}, run={"epochs": 1})
    fastest("one")
    with world("cpu") as joined:
        label_run(recipe, joined, first_epoch=0, end_epoch=1, topk=4)
        asked = fastest("another")
        label_run(recipe, joined, first_epoch=0, end_epoch=1, topk=4)
        trainer = Trainer(recipe, joined)
        trainer.run()
    assert trainer.data.loader.name == "one"
    assert asked == []


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
    train, val = (open_dataset(path, "data") for path in (recipe.data.train, recipe.data.val))
    for name in ("one", "torch"):
        asked = fastest(name)
        for rank in (0, 1):
            joined = Joined(rank, 2, 2, torch.device("cpu"))
            for data in (TrainingData(recipe, train, joined), EvaluationData(recipe, val, joined)):
                assert data.loader.name == name
                data.close()
        assert asked == [160, 44]  # the first process alone


def test_the_hardware_decoder_takes_a_share(tiny):
    with pytest.raises(ValueError, match=r"data\.hw_decoder_load is 1\.5: it must be from 0 to 1"):
        tiny(data={"hw_decoder_load": 1.5})
