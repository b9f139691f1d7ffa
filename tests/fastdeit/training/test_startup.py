"""What a run says before its first step, and while it trains without a terminal."""

import re
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import timm
import torch

from fastdeit.distributed import World, world
from fastdeit.inputs import DataSets
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.formats.dataset import Dataset, open_dataset
from fastdeit.recipes import RECIPES, convnet_teacher, deit_tiny, deit_tiny_384
from fastdeit.training import progress
from fastdeit.training.reports import report_end
from fastdeit.training.startup import (
    forecast_run,
    forecast_sentence,
    other_processes_sentence,
    processes_sentence,
    recipe_warnings,
)
from fastdeit.training.state import RunState
from fastdeit.training.trainer import Trainer
from run_logs import run_log
from runs import changed, newest, train


def warned(events, recipe):
    return [e["text"] for e in events(recipe.run.output, "warning")]


@pytest.mark.slow
def test_probable_mistakes_are_said_in_the_opening_lines_and_in_the_log(tiny, events, capsys, data):
    recipe = tiny(
        data={"val": data / "train.beton"},
        optim={"warmup_epochs": 5, "lr": 1e-3, "lr_batch": 64},
        ema={"decay": 0.99996},
        run={"epochs": 1},
    )
    train(recipe)
    out = capsys.readouterr().out
    opening = out[: out.index("epoch 1/1")]
    texts = warned(events, recipe)
    assert [f"warning: {text}\n" in opening for text in texts] == [True] * 4
    phrases = ("ema.decay 0.99996", "of the 160 images, 3 times each", "the same images as data.train", "warmup")
    average, few, same, warm_up = (next(text for text in texts if phrase in text) for phrase in phrases)
    assert "100% initial weights" in average
    assert "only 54" in few
    assert str(data / "train.beton") in same
    assert "optim.warmup_epochs 5 is not shorter than the run (1 epochs)" in warm_up
    assert "learning rate 0.0005 (0.001 x global batch 32 / 64) after 5 epochs of warm-up, adamw" in opening
    # The rate that the run ends with is the one that the warning names.
    last = events(recipe.run.output, "train")[-1]["lr"]
    assert f"climbs, to {last:.3g} instead of 0.0005" in warm_up


def test_the_opening_lines_give_the_numbers_of_skipped_samples(tiny, capsys):
    recipe = tiny(model={"drop_path_mode": "skip", "drop_path": 0.3, "depth": 3}, run={"epochs": 1})
    train(recipe)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "stochastic depth" in line]
    assert "of each 8 samples, both branches of the blocks drop exactly 0, 1, 2, 12.50% on average" in line
    assert "and 25.00% in the last block; model.drop_path 0.3 asks for 15.00% and 30.00%" in line


@pytest.mark.slow
def test_the_same_images_in_another_file_are_found(tiny, images, tmp_path, events):
    convert(str(images / "train"), tmp_path / "copy", format="webdataset", progress=False)
    recipe = tiny(data={"val": tmp_path / "copy", "repeats": 1}, run={"epochs": 1})
    train(recipe)
    assert any("holds the same images" in text for text in warned(events, recipe))


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("deit_") and "transfer" not in n])
def test_the_papers_recipes_raise_no_warning(name, data):
    class ImageNet:
        content_hash, path = "x", data / "train.beton"

        def __len__(self):
            return 1_281_167

    recipe = RECIPES[name]()
    val, train_set = open_dataset(data / "val.beton"), cast(Dataset, ImageNet())
    sets = DataSets(train_set, val, 1000, np.arange(len(train_set)), np.arange(len(val)))
    steps = len(train_set) // recipe.run.global_batch
    assert recipe_warnings(recipe.filled(), sets, steps=steps, repeats=recipe.data.repeats) == []
    val.close()


@pytest.mark.parametrize(
    ("name", "sections", "warns"),
    [
        ("deit_small_short_100", {"run": {"global_batch": 64}}, True),
        ("deit_small_short_100", {"run": {"global_batch": 64}, "optim": {"lr_batch": 4096}}, False),
        ("deit_small_short_100", {"run": {"global_batch": 64}, "optim": {"lr": 1e-4}}, False),
        ("deit_small_short_100", {}, False),
        ("deit_base_cifar10", {"run": {"global_batch": 64}}, True),
        ("deit_small", {"run": {"global_batch": 64}}, False),
        ("deit_small", {"run": {"global_batch": 64}, "optim": {"lr_batch": 0}}, False),
    ],
)
def test_changing_only_the_batch_warns_if_the_learning_rate_does_not_scale(name, sections, warns, data):
    recipe = changed(RECIPES[name](), **sections).filled()
    with open_dataset(data / "train.beton") as train_set:
        sets = DataSets(train_set, None, 4, np.arange(160), None)
        texts = recipe_warnings(recipe, sets, steps=20_000, repeats=1)
    assert any("does not scale with the batch" in text for text in texts) == warns


def test_a_run_without_validation_images_says_how_to_have_some(tiny, capsys, tmp_path):
    train(tiny(data={"val": None}, run={"epochs": 1}))
    assert "give --data.val or --data.hold_out 0.1" in capsys.readouterr().out
    train(tiny(data={"val": None, "hold_out": 0.1}, run={"epochs": 1, "output": tmp_path / "other"}))
    assert "--data.hold_out 0.1" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_teacher_that_knows_nothing_is_found_before_training(tiny, events, tmp_path, teacher_checkpoint):
    torch.manual_seed(0)
    fresh = timm.create_model("resnet10t", num_classes=4)
    torch.save(fresh.state_dict(), tmp_path / "fresh.pt")
    for path, size, found in (
        (tmp_path / "fresh.pt", 32, "no better than chance"),
        (teacher_checkpoint, 64, "64 pixels"),
    ):
        recipe = tiny(
            objective={"distillation": "hard"},
            teacher={"name": "resnet10t", "checkpoint": path, "img_size": size},
            run={"epochs": 1, "output": tmp_path / path.stem},
        )
        train(recipe)
        texts = [text for text in warned(events, recipe) if "teacher" in text]
        assert any(found in text for text in texts)
        assert any("no better than chance" in text for text in texts) == (found == "no better than chance")


@pytest.mark.slow
def test_fine_tuning_says_its_mode_and_keeps_stochastic_depth(tiny, capsys, tmp_path):
    first = tiny(deit_tiny, run={"epochs": 1})
    train(first)
    weights = newest(first)
    capsys.readouterr()
    trains = "in training mode, with stochastic depth 0.5 and dropout 0 (departures.finetune_mode 'train')"
    for base, training, said in (
        (deit_tiny, True, trains),
        (deit_tiny_384, False, "in eval mode: stochastic depth 0.5 and dropout 0 are off"),
    ):
        recipe = tiny(
            base, model={"init": weights, "drop_path": 0.5}, run={"epochs": 1, "output": tmp_path / base.__name__}
        )
        with world("cpu") as joined:
            trainer = Trainer(recipe, joined)
            trainer.run()
            assert trainer.train_step.model.training == training
        assert said in capsys.readouterr().out
    released = changed(deit_tiny(), compat="released").resolved()
    assert released.departures.finetune_mode == "eval"  # the released code's model.train(args.finetune == '')


@pytest.mark.slow
def test_a_run_off_a_terminal_shows_loss_rate_and_time_left(tiny, events, capsys, monkeypatch):
    """With fewer steps an epoch than `log_every`, and a plain line after every step."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    recipe = tiny(run={"epochs": 2, "log_every": 100, "progress": True})
    train(recipe)
    out = capsys.readouterr().out
    lines = re.findall(r"epoch (\d)/2, step (\d)/5: loss ([\d.]+), ([\d,]+) im/s, (\d+m \d\ds) left", out)
    assert [line[:2] for line in lines] == [(str(e), str(s)) for e in (1, 2) for s in range(1, 6)]
    logged = events(recipe.run.output, "train")
    assert [e["global_step"] for e in logged] == [5, 10]
    for epoch, event in enumerate(logged):
        mean = sum(float(line[2]) for line in lines[5 * epoch : 5 * epoch + 5]) / 5
        assert event["loss"] == pytest.approx(mean, abs=1e-3)
    assert lines[-1][4] == "0m 00s"


@pytest.mark.slow
def test_an_epoch_ends_with_a_line_even_when_it_is_short(tiny, capsys):
    train(tiny(run={"epochs": 2}))
    out = capsys.readouterr().out
    assert re.findall(r"epoch (\d)/2, step 5/5: loss", out) == ["1", "2"]


def test_compiling_is_announced_where_nothing_is_cached(monkeypatch):
    from fastdeit.pipelines.host import stage

    kept = SimpleNamespace(_cache=SimpleNamespace(_cache_file=SimpleNamespace(_load_index=lambda: {"key": 1})))
    empty = SimpleNamespace(_cache=SimpleNamespace(_cache_file=SimpleNamespace(_load_index=dict)))
    for dispatcher, wanted in ((kept, None), (empty, "compiling the aug"), (object(), "compiling or loading")):
        monkeypatch.setattr(stage, "_run_units", dispatcher)
        sentence = stage.compile_sentence()
        assert sentence is wanted if wanted is None else sentence.startswith(wanted)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (deit_tiny(), None),
        (changed(deit_tiny(), model={"drop_rate": 0.1}), None),
        (changed(convnet_teacher(), model={"drop_rate": 0.1}), "(model.drop_rate)"),
        (convnet_teacher(), "batch normalisation"),
        (changed(deit_tiny(), compat="released"), "departures.mix_group 0"),
    ],
)
def test_what_depends_on_the_number_of_processes_is_said(recipe, said):
    recipe = recipe.filled()
    assert processes_sentence(recipe, 1) is None
    sentence = processes_sentence(recipe, 8)
    assert (sentence is None) if said is None else (said in sentence and "processes (8): " in sentence)


def test_a_resume_on_another_number_of_processes_says_what_differs(tiny):
    assert other_processes_sentence(tiny(), 2, 2) is None
    assert other_processes_sentence(tiny(), None, 2) is None
    changed = "the number of processes has changed from 2 to 1: "
    for recipe in (tiny(), tiny(model={"drop_rate": 0.1})):
        assert other_processes_sentence(recipe, 2, 1) == changed + "the losses differ by rounding only"
    convnet = other_processes_sentence(tiny(convnet_teacher, model={"drop_rate": 0.1}), 2, 1)
    assert convnet is not None
    assert convnet.startswith(changed + "each process draws dropout for its own share of the batch (model.drop_rate); ")


def training_on(recipe, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    memory = 10e9 if "MIG" in name else 141e9
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    world = World(0, 1, 1, torch.device("cuda", 0))
    return SimpleNamespace(recipe=recipe.resolved(), world=world, precision=SimpleNamespace(name="bf16"))


def test_a_run_on_a_known_card_has_a_forecast(monkeypatch):
    sets = cast(DataSets, SimpleNamespace(train_images=range(1_281_167), val_images=range(50_000), num_classes=1000))
    known = training_on(deit_tiny(), "NVIDIA H200", monkeypatch)
    found = forecast_run(known, sets)
    assert found is not None
    sentence = forecast_sentence(found)
    wanted = r"forecast: .* for the whole run, at [\d,]+ images/s; what limits it is .* \(fastdeit budget\)"
    assert re.fullmatch(wanted, sentence)
    assert forecast_run(training_on(deit_tiny(), "NVIDIA T4", monkeypatch), sets) is None
    assert forecast_run(training_on(deit_tiny(), "NVIDIA H200 MIG 1g.18gb", monkeypatch), sets) is None
    assert forecast_run(training_on(convnet_teacher(), "NVIDIA H200", monkeypatch), sets) is None


def test_the_end_of_a_run_is_compared_with_its_forecast(tmp_path, capsys):
    with run_log(tmp_path, global_batch=8) as log:
        report_end(log, RunState(tmp_path, epoch=2), 120.0, 100.0)
        report_end(log, RunState(tmp_path, epoch=2), 120.0, None)
    out = capsys.readouterr().out
    assert f"done: 2 epochs in 2m 00s, 1.20 times the forecast; {tmp_path}\n" in out
    assert f"done: 2 epochs in 2m 00s; {tmp_path}\n" in out
