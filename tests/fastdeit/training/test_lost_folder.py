"""A run whose folder is removed, taken by another run, or cannot be written for a while, during the run."""

import ctypes
import errno
import json
import os
import shutil
from contextlib import suppress

import pytest

from fastdeit import checkpoint
from fastdeit.training import trainer
from fastdeit.training.run_lock import RunLock
from fastdeit.training.step import TrainingStep
from forked import Forked, succeed
from refusals import refused
from runs import assert_same_state, final_state, train, trained
from system import refusing, run, wait_for

STEPS = 10  # of the run


@pytest.fixture
def after_step(monkeypatch):
    """Function: have something happen in the middle of a step."""

    def add(step, happen):
        monkeypatch.setattr(TrainingStep, "__call__", _with(TrainingStep.__call__, {step: happen}))

    return add


def _with(call, happenings):
    def step(self, batch, epoch, step, global_step, check=None):
        happenings.get(global_step + 1, lambda: None)()
        return call(self, batch, epoch, step, global_step, check)

    return step


def steps_of(events, recipe):
    return [event["global_step"] for event in events(recipe.run.output, "train")]


@pytest.fixture
def straight(tiny, tmp_path):
    """The final state of a run that nobody disturbed."""
    return trained(tiny(run={"output": tmp_path / "straight"}))


# TensorBoard's own thread meets the missing folder.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_is_removed_is_made_anew_with_a_checkpoint(tiny, straight, events, after_step, capsys):
    recipe = tiny(run={"tensorboard": True})
    folder = recipe.run.output
    seen = {}

    def remove():
        seen["id"] = json.loads((folder / "run.json").read_text())["id"]
        shutil.rmtree(folder)

    after_step(3, remove)
    after_step(4, lambda: wait_for(lambda: checkpoint.found(folder / "checkpoints")))
    train(recipe)
    assert f"{folder} was removed during the run" in capsys.readouterr().out
    # Step 3 was logged into the new folder.
    assert [event["global_step"] for event in events(folder, "checkpoint")] == [3, 5, 10]
    assert steps_of(events, recipe) == list(range(3, STEPS + 1))
    assert json.loads((folder / "run.json").read_text())["id"] == seen["id"]
    assert (folder / "recipe.json").exists()
    assert list((folder / "tensorboard").iterdir())
    assert_same_state(straight, final_state(recipe))


def test_a_log_and_a_lock_that_are_replaced_during_the_run_end_nothing(tiny, straight, events, after_step):
    recipe = tiny()
    log, lock = recipe.run.output / "log.jsonl", recipe.run.output / "run.lock"

    def rotate():
        lock.unlink()
        log.unlink()
        log.write_text("rotated\n")

    after_step(3, rotate)
    train(recipe)
    assert log.read_text().startswith("rotated\n")
    assert_same_state(straight, final_state(recipe))


def test_a_checkpoint_that_is_removed_is_written_anew(tiny, straight, events, after_step, capsys):
    recipe = tiny()
    folder = recipe.run.output / "checkpoints"
    after_step(7, lambda: shutil.rmtree(folder))
    after_step(8, lambda: wait_for(lambda: checkpoint.found(folder)))
    train(recipe)
    assert [event["global_step"] for event in events(recipe.run.output, "checkpoint")] == [5, 7, 10]
    assert "checkpoint-000000005.pt was removed during the run" in capsys.readouterr().out
    assert_same_state(straight, final_state(recipe))


@pytest.mark.parametrize("lost", [".", "checkpoints"])
def test_what_is_removed_in_the_last_evaluation_is_made_anew(tiny, straight, monkeypatch, capsys, lost):
    recipe, evaluate = tiny(), trainer.evaluate

    def removing(*args, **options):
        shutil.rmtree(recipe.run.output / lost, ignore_errors=True)  # the weights' average is evaluated as well
        return evaluate(*args, **options)

    monkeypatch.setattr(trainer, "evaluate", removing)
    train(recipe)
    assert "was removed during the run" in capsys.readouterr().out
    assert_same_state(straight, final_state(recipe))
    assert json.loads((recipe.run.output / "checkpoints" / "best.json").read_text())["global_step"] == STEPS


def test_a_run_ends_if_another_has_taken_its_folder(tiny, after_step):
    recipe = tiny()
    folder, others = recipe.run.output, []

    def take():
        shutil.rmtree(folder)
        others.append(RunLock(folder))

    after_step(3, take)
    refused(f"{folder} is in use by process {os.getpid()}", train, recipe)
    assert (folder / "run.lock").exists()  # the other's
    others[0].close()


def _mount(*words):
    run("mount", *words, check=True)


def _own_mounts():
    """Give this process mounts of its own, which end with it."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000) != 0:  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("--make-rprivate", "/")


def _train_on_a_file_system_that_fails(recipe, break_it, mend_it):
    _own_mounts()
    if break_it is fill:
        recipe.run.output.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", recipe.run.output)
    folder = recipe.run.output
    TrainingStep.__call__ = _with(TrainingStep.__call__, {4: lambda: break_it(folder), 8: lambda: mend_it(folder)})
    train(recipe)
    shutil.copytree(folder, folder.parent / "saved")


def make_read_only(folder):
    _mount("--bind", folder, folder)
    _mount("-o", "remount,bind,ro", folder)


def make_writable(folder):
    run("umount", folder, check=True)


def fill(folder):
    with suppress(OSError), open(folder / "filler", "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()


def empty(folder):
    (folder / "filler").unlink()


def _may_mount():
    process = Forked(_own_mounts)
    process.wait(60)
    return process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("break_it", "mend_it"), [(make_read_only, make_writable), (fill, empty)])
def test_a_file_system_that_fails_for_a_while_costs_no_step(tiny, straight, events, break_it, mend_it):
    if not _may_mount():
        pytest.skip("this user may not mount file systems")
    recipe = tiny(run={"checkpoint_every": 2})
    out, _ = succeed(_train_on_a_file_system_that_fails, recipe, break_it, mend_it)
    folder = recipe.run.output.parent / "saved"
    (path, *_) = checkpoint.found(folder / "checkpoints")
    assert_same_state(straight, checkpoint.load(path))
    assert out.count("Training goes on without a checkpoint") == 3  # at steps 4, 5 and 6
    assert [event["global_step"] for event in events(folder, "checkpoint")] == [2, 8, 10]
    logged = [event["global_step"] for event in events(folder, "train")]
    missing = set(range(1, STEPS + 1)) - set(logged)
    assert not missing or f"{len(missing)} events are missing here" in (folder / "log.jsonl").read_text()


def test_a_disk_that_is_full_for_the_best_score_does_not_end_the_run(tiny, straight, monkeypatch, capsys):
    monkeypatch.setattr("fastdeit.training.best.atomic_write", refusing(errno.ENOSPC))
    recipe = tiny()
    train(recipe)
    assert "cannot be compared with the best so far: [Errno 28] No space left" in capsys.readouterr().out
    assert_same_state(straight, final_state(recipe))


def test_without_a_validation_set_the_end_of_an_epoch_notices_too(tiny, after_step, capsys):
    recipe = tiny(data={"val": None}, run={"log_every": 1000})
    after_step(10, lambda: shutil.rmtree(recipe.run.output))
    train(recipe)
    assert "was removed during the run" in capsys.readouterr().out
    assert final_state(recipe)["global_step"] == STEPS
    assert (recipe.run.output / "recipe.json").exists()
