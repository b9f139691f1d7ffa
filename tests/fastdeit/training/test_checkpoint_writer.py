"""Checkpoints are written while training goes on, and hold the run's state at the time of the call."""

import json
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from fastdeit import checkpoint
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.machine import MachineError
from fastdeit.sections import RunConfig
from fastdeit.training import trainer
from fastdeit.training.best import best_names, note_best
from fastdeit.training.checkpoint_writer import CheckpointWriter, copied
from fastdeit.training.stop import Stop
from refusals import refused
from run_logs import open_log
from runs import assert_same_state, evaluated, newest, train, trained


@pytest.fixture
def writer(tmp_path):
    """Function: a writer into `tmp_path` with these fields of `run`."""

    def make(**run):
        return CheckpointWriter(tmp_path / "checkpoints", RunConfig(**run), open_log(tmp_path))

    return make


def at(step):
    return {"epoch": 0, "step": step, "global_step": step}


@pytest.fixture
def slow_disk(monkeypatch):
    """An event: no checkpoint is written before it is set."""
    save, go = checkpoint.save, threading.Event()

    def wait_and_save(path, state):
        assert go.wait(60)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", wait_and_save)
    return go


def test_the_loop_goes_on_and_the_file_holds_the_state_of_its_step(writer, tmp_path, slow_disk, events):
    weights, moments = torch.zeros(3), [{"exp_avg": torch.ones(2)}]
    writing = writer()
    writing.save(at(1), lambda: {"model": {"weight": weights}, "optimizer": moments, "count": 1})
    weights += 7  # the next step
    moments[0]["exp_avg"] += 7
    writing.poll()
    assert not checkpoint.found(tmp_path / "checkpoints")
    time.sleep(0.5)
    slow_disk.set()
    writing.wait()
    stored = torch.load(checkpoint.found(tmp_path / "checkpoints")[0], weights_only=True)
    assert stored["model"]["weight"].tolist() == [0, 0, 0]
    assert stored["optimizer"][0]["exp_avg"].tolist() == [1, 1]
    (event,) = events(tmp_path, "checkpoint")
    assert event["global_step"] == 1
    assert event["stall_seconds"] < 0.5 <= event["seconds"]


def test_a_checkpoint_waits_for_the_one_before(writer, tmp_path, slow_disk, events):
    writing = writer(keep_checkpoints=5)
    writing.save(at(1), dict)
    threading.Timer(0.2, slow_disk.set).start()
    writing.save(at(2), dict)
    writing.save(at(2), lambda: pytest.fail("this position is written already"))
    writing.close()
    assert [event["global_step"] for event in events(tmp_path, "checkpoint")] == [1, 2]
    assert events(tmp_path, "checkpoint")[1]["stall_seconds"] > 0.1


def test_a_run_that_ends_for_another_reason_finishes_its_checkpoint(tiny, slow_disk, monkeypatch):
    def fail(self, *args, **options):
        threading.Timer(0.2, slow_disk.set).start()
        raise UserError("another reason")

    recipe = tiny(run={"checkpoint_every": 1, "epochs": 1})
    monkeypatch.setattr(Stop, "due", fail)
    refused("another reason", train, recipe)
    assert checkpoint.load(newest(recipe))["global_step"] == 1


def test_an_error_that_is_not_the_disks_ends_the_run(writer, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", Mock(side_effect=ValueError("a bug")))
    writing = writer()
    writing.save(at(1), dict)
    refused("a bug", writing.wait, error=ValueError)


def test_a_failure_at_the_end_is_reported(writer, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "save", Mock(side_effect=MachineError("the disk is full")))
    writing = writer()
    writing.save(at(1), dict)
    writing.close()
    assert "the disk is full" in capsys.readouterr().out


def test_a_copy_keeps_types_versions_and_values(tmp_path):
    norm = torch.nn.BatchNorm2d(4)
    state = {"model": norm.state_dict(), "betas": (0.9, 0.99), "list": [1, None, torch.tensor(2)], "none": None}
    held = copied(state)()
    assert held["model"]._metadata == state["model"]._metadata
    assert held["betas"] == (0.9, 0.99)
    assert held["list"][:2] == [1, None]
    before = [value.data_ptr() for value in state["model"].values()]
    assert not set(before) & {value.data_ptr() for value in held["model"].values()}
    torch.nn.BatchNorm2d(4).load_state_dict(held["model"])


@pytest.mark.gpu
def test_a_copy_of_a_gpus_state_is_of_the_moment_it_was_asked_for():
    weights = torch.ones(1 << 24, device="cuda")
    weights.mul_(3)
    to_host = copied({"weight": weights, "step": torch.tensor(5)})
    weights.zero_()
    held = to_host()
    assert held["weight"].device.type == "cpu"
    assert bool((held["weight"] == 3).all())
    assert held["step"] == 5


def scores(top1, loss=1.0):
    return {"model": {"class": {"top1": top1, "top5": 100.0, "loss": loss}}}


def test_the_best_stays_however_many_come_after_it(writer, tmp_path, events):
    writing, folder = writer(keep_checkpoints=1), tmp_path / "checkpoints"
    for step, top1 in enumerate((50.0, 80.0, 70.0, 80.0, float("nan")), 1):
        writing.save(at(step), dict)
        note_best(writing.latest(at(step)), scores(top1), "top1", None)
    assert [checkpoint.steps_of(path) for path in checkpoint.found(folder)] == [5, 2]
    assert (folder / "best.pt").resolve() == checkpoint.step_path(folder, 2).resolve()
    assert (folder / "last.pt").resolve() == checkpoint.step_path(folder, 5).resolve()
    stored = json.loads((folder / "best.json").read_text())
    assert (stored["score"], stored["metric"], stored["weights"]) == (80.0, "top1", "model")


def test_a_file_that_somebody_named_like_a_link_stays(writer, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.pt", "best.pt"):
        (folder / name).write_text("somebody's")
    writing = writer()
    writing.save(at(1), dict)
    note_best(writing.latest(at(1)), scores(50.0), "top1", None)
    checkpoint.point(folder, "last.pt", None)
    for name in ("last.pt", "best.pt"):
        assert (folder / name).read_text() == "somebody's"
    (folder / "last.pt").unlink()
    (folder / "last.pt").symlink_to("/archive/good.pt")
    checkpoint.point_to_newest(folder)
    assert (folder / "last.pt").readlink() == Path("/archive/good.pt")


def test_the_best_in_another_metric_starts_anew(writer, tmp_path):
    writing = writer(keep_checkpoints=9)
    for step, (metric, loss) in enumerate((("top1", 3.0), ("loss", 2.0), ("loss", 2.5), ("loss", 1.0)), 1):
        writing.save(at(step), dict)
        note_best(writing.latest(at(step)), scores(10.0, loss), metric, None)
    assert best_names(tmp_path / "checkpoints") == {"checkpoint-000000004.pt"}


@pytest.mark.parametrize(
    "text",
    ["", "[" * 40000, '{"checkpoint": "../x.pt", "score": 1.0}', '{"checkpoint": 3, "score": "1"}', "[1]", "\udcff"],
)
def test_a_best_file_that_is_not_ours_names_nothing(writer, tmp_path, text):
    writing, folder = writer(keep_checkpoints=1), tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "best.json").write_bytes(text.encode(errors="surrogateescape"))
    assert best_names(folder) == set()
    writing.save(at(1), dict)
    assert note_best(writing.latest(at(1)), scores(1.0), "top1", None)["score"] == 1.0


@pytest.mark.slow
def test_a_run_keeps_its_best_checkpoint_and_the_commands_take_it(tiny, events, data, tmp_path, monkeypatch):
    given = iter((30.0, 90.0, 40.0, 50.0, 60.0))
    evaluate = trainer.evaluate

    def judged(model, *args, **options):
        return {**evaluate(model, *args, **options), "class": {"top1": next(given), "top5": 100.0, "loss": 1.0}}

    monkeypatch.setattr(trainer, "evaluate", judged)
    recipe = tiny(run={"epochs": 5, "keep_checkpoints": 1}, ema={"enabled": False}, model={"distilled": False})
    train(recipe)
    assert [event["score"] for event in events(recipe.run.output, "best")] == [30.0, 90.0]
    folder = recipe.run.output / "checkpoints"
    steps = checkpoint.load(folder / "best.pt")["global_step"]
    assert best_names(folder) == {checkpoint.step_path(folder, steps).name}
    assert len(checkpoint.found(folder)) == 2
    assert evaluated(folder / "best.pt", data / "val.beton", loader="torch", device="cpu", threads=1)


@pytest.mark.slow
def test_a_resumed_run_logs_the_windows_of_an_undisturbed_one(tiny, tmp_path, events, monkeypatch):
    run = {"epochs": 2, "log_every": 4}
    straight = tiny(run={**run, "output": tmp_path / "straight"})
    expected = trained(straight)
    lines = events(straight.run.output, "train")
    stopped = tiny(run={**run, "output": tmp_path / "stopped"})
    for last in (1, 3, 6):

        def due(self, global_step, diverged, last=last):
            return "stop" if global_step == last else None

        monkeypatch.setattr(Stop, "due", due)
        with pytest.raises(SystemExit):
            train(stopped)
    monkeypatch.undo()
    assert_same_state(expected, trained(stopped))
    figures = ("epoch", "step", "global_step", "loss", "loss_base", "loss_distill", "lr")
    again = events(stopped.run.output, "train")
    assert [[line[f] for f in figures] for line in again] == [[line[f] for f in figures] for line in lines]
    assert all(line["images_per_second"] > 0 for line in again)


@pytest.mark.parametrize(
    "log",
    [None, {}, {"steps": -1}, {"sums": [[1.0, 2.0]]}, {"sums": []}, {"fallbacks": ["x"]}, {"replaced": [[1]]}],
)
def test_an_edited_log_field_is_refused(tiny, log):
    recipe = tiny(run={"epochs": 1})
    state = trained(recipe)
    state["log"] = log if not log else {**state["log"], **log}
    torch.save(state, newest(recipe))
    refused("its field 'log'", train, tiny(run={"epochs": 2, "resume_changed": True}))
