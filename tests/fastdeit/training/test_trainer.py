"""Training: what it logs, accumulation, stopping on NaN, the compat switch, fine-tuning, mistakes."""

import math
from pathlib import Path

import pytest
import timm
import torch
import torch._dynamo

import steps
from fastdeit import checkpoint
from fastdeit.distributed import world
from fastdeit.model.networks import build_network
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.recipes import convnet_teacher, deit_tiny, deit_tiny_384
from fastdeit.sections import Departures
from fastdeit.teacher import teacher
from fastdeit.training import step
from fastdeit.training.best import best_names
from fastdeit.training.divergence import DivergedError
from fastdeit.training.trainer import Trainer
from refusals import refused
from runs import changed, final_state, newest, same_values, train, trained


@pytest.mark.slow
def test_a_run_learns_and_says_what_it_did(tiny, events, taught):
    recipe = tiny(**taught, run={"epochs": 6, "tensorboard": True})
    scores = train(recipe)
    assert scores["model"]["images"] == 44
    assert set(scores["ema"]) == {"images", "class", "distillation", "fused_probabilities", "fused_logits"}
    assert scores["model"]["class"]["top1"] > 60  # four classes
    assert scores["model"]["class"]["top5"] == 100

    folder = recipe.run.output
    start = events(folder, "start")[0]
    assert start["steps_per_epoch"] == 5
    assert start["recipe"] == recipe.to_dict()
    lines = events(folder, "train")
    assert [e["global_step"] for e in lines] == list(range(1, 31))
    for line in lines:
        assert set(line) >= {"epoch", "step", "loss", "loss_base", "loss_distill", "lr", "data_wait", "eta_seconds"}
        assert line["loss"] == pytest.approx(0.5 * line["loss_base"] + 0.5 * line["loss_distill"], rel=1e-5)
        assert 0 <= line["data_wait"] <= 1
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [e["weights"] for e in events(folder, "eval")] == ["model", "ema"] * 6
    assert events(folder, "end")[0]["global_step"] == 30
    assert list((folder / "tensorboard").iterdir())
    found = checkpoint.found(folder / "checkpoints")
    best = [path for path in found if path.name in best_names(folder / "checkpoints")]
    assert set(found) == {*found[: recipe.run.keep_checkpoints], *best}


@pytest.mark.slow
def test_accumulation_keeps_the_global_batch(tiny, events):
    whole, parts = tiny(), tiny(run={"micro_batch": 12, "output": tiny().run.output.with_name("parts")})
    train(whole)
    train(parts)
    a, b = ([e["loss"] for e in events(r.run.output, "train")] for r in (whole, parts))
    assert a == pytest.approx(b, rel=1e-5)
    assert a[0] != a[1]


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_in_one_graph_each(tiny, taught, monkeypatch):
    """aot_eager traces forward and backward as the default backend does, and then runs PyTorch's own ops."""
    for module in (step, teacher):
        monkeypatch.setattr(module, "COMPILER", "aot_eager")
    runs = [
        tiny(
            **taught,
            model={"drop_path": 0.2},
            run={"output": tiny().run.output / compile, "compile": compile, "eval_every": 2},
        )
        for compile in ("off", "on")
    ]
    train(runs[0])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(runs[1])
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # Student and teacher in training, loss, and the student once more where it is evaluated, with batches of two sizes.
    assert counters["stats"]["unique_graphs"] <= 5
    assert same_values(*(final_state(r)["model"] for r in runs))
    refused(r"another run.compile", train, changed(runs[1], run={"compile": "off"}))


@pytest.mark.slow
def test_same_seed_same_weights_other_seed_others(tiny):
    a, b, c = (
        trained(tiny(run={"output": tiny().run.output / str(i), "seed": seed}))["model"]
        for i, seed in enumerate((0, 0, 1))
    )
    assert same_values(a, b)
    assert not same_values(a, c)


def test_loss_that_is_not_finite_stops_with_a_reproduction(tiny, events):
    recipe = tiny(optim={"lr": 1e30, "warmup_epochs": 0})
    message = refused("epoch 1, step", train, recipe, error=DivergedError)
    record = events(recipe.run.output, "nonfinite")[0]
    assert record["reproduction"] in message
    saved = checkpoint.read_checkpoint(recipe.run.output / "nonfinite-rank0.pt")
    assert saved["index"].tolist() == record["indices"]
    assert saved["images"].shape == (32, 3, 32, 32)
    assert not math.isfinite(saved["loss"])
    # The weights are those that gave the loss: the step can be done again.
    network = build_network(recipe.model, 4)
    network.load_state_dict(saved["model"])
    with torch.no_grad():
        assert not network(saved["images"]).cls.isfinite().all()
    assert not checkpoint.found(recipe.run.output / "checkpoints")


@pytest.mark.slow
def test_released_compat(tiny, events, capsys):
    recipe = changed(tiny(deit_tiny, run={"epochs": 3}), compat="released", departures=Departures()).resolved()
    recipe = changed(recipe, departures={"epoch_multiple": 32})
    scores = train(recipe)
    assert set(scores) == {"model"}  # its average is kept, never evaluated
    assert final_state(recipe)["ema"] is not None
    rates = [e["lr"] for e in events(recipe.run.output, "train")]
    assert len(set(rates[:10])) == 1  # epochs 0 and 1
    assert rates[10] != rates[9]
    assert "repeated augmentation is dropped" in capsys.readouterr().out


@pytest.mark.slow
def test_fine_tuning_at_another_resolution(tiny):
    first = tiny(deit_tiny)
    train(first)
    weights = newest(first)
    second = tiny(
        deit_tiny_384,
        model={"img_size": 48, "init": weights, "drop_path": 0.5},
        run={"output": first.run.output.with_name("fine")},
    )
    with world("cpu") as joined:
        trainer = Trainer(second, joined)
        assert any("pos_embed" in m or "position embedding" in m for m in trainer.messages)
        trainer.run()
        assert not trainer.train_step.model.training  # deit issue 177: fine-tune in eval mode
    assert final_state(second)["model"]["pos_embed"].shape[1] == 36 + 1


@pytest.mark.slow
def test_the_convnet_recipe_makes_a_teacher(teacher_checkpoint):
    state = checkpoint.load(teacher_checkpoint)
    assert state["arch"] == "resnet10t"
    assert state["num_classes"] == 4
    timm.create_model("resnet10t", num_classes=4).load_state_dict(state["model"], strict=True)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"train": None}, "give --data.train"),
        ("data", {"train": Path("nowhere.beton")}, "no such file"),
        ("model", {"num_classes": 2}, "classes, but .* has 4"),
        ("run", {"global_batch": 512}, "fewer than a global batch"),
        ("run", {"global_batch": 36}, r"^run\.global_batch is 36.* 32 or 40"),
        ("model", {"arch": "resnet1O", "distilled": False}, "neither 'deit' nor"),
    ],
)
def test_mistakes_end_in_a_sentence(tiny, section, values, message):
    refused(message, lambda: train(tiny(**{section: values})))


def test_classes_must_agree(tiny, images, tmp_path):
    names = ["class0", "class1", "class3", "class2"]
    convert(str(images / "val"), tmp_path / "other.beton", class_names=names, progress=False)
    refused("class 2 is 'class2' in one and 'class3' in the other", train, tiny(data={"val": tmp_path / "other.beton"}))


@pytest.mark.slow
def test_a_run_trains_from_its_machines_copy_and_resumes_without_it(tiny, tmp_path, capsys):
    cache = tmp_path / "cache"
    whole = tiny(run={"output": tmp_path / "whole"})
    train(whole)
    capsys.readouterr()
    half = {"run": {"output": tmp_path / "half", "epochs": 1, "resume_changed": True}}
    train(tiny(**half, data={"cache_dir": cache}))
    assert capsys.readouterr().out.count("copying ") == 2
    assert {path.name.rpartition("-")[0] for path in cache.iterdir() if path.is_dir()} == {"train.beton", "val.beton"}
    half["run"]["epochs"] = 2
    train(tiny(**half))
    assert "copying" not in capsys.readouterr().out
    copied = trained(tiny(run={"output": tmp_path / "copied"}, data={"cache_dir": cache}))
    assert same_values(final_state(whole)["model"], copied["model"])


def test_one_of_two_processes_copies(tiny, tmp_path):
    recipe = tiny(data={"cache_dir": tmp_path / "cache"})
    found = steps.in_two_processes(steps.copy_here, tmp_path, recipe)
    assert [len(each["said"]) for each in found] == [2, 0]
    assert found[0]["paths"] == found[1]["paths"]
    assert all(path.startswith(str(tmp_path / "cache")) for path in found[0]["paths"])


@pytest.mark.slow
def test_a_seed_of_64_bits(tiny):
    train(tiny(run={"seed": 2**64 - 1, "epochs": 1}))


def test_weights_that_are_not_finite_are_never_saved(tiny):
    recipe = tiny(run={"epochs": 1})
    with world("cpu") as joined:
        trainer = Trainer(recipe, joined)
        with torch.no_grad():
            trainer.model.head.bias[0] = float("nan")
        refused("no checkpoint was written", trainer._save, error=DivergedError)
        trainer.close()
    assert not checkpoint.found(recipe.run.output / "checkpoints")


def test_convnet_teacher_recipe_has_no_mixing(tiny):
    recipe = tiny(convnet_teacher)
    assert recipe.augment.mixup_alpha == 0
    assert recipe.data.repeats == 1
