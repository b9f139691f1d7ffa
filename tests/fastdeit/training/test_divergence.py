"""A run whose loss diverges stops, or goes back and leaves out the steps that led there, the same each time."""

import math

import numpy as np
import pytest
import torch

import steps
from fastdeit import checkpoint
from fastdeit.distributed import World
from fastdeit.sections import RunConfig
from fastdeit.training.best import best_names, forget_best, note_best
from fastdeit.training.divergence import DivergedError, DivergenceGuard, LossBand
from fastdeit.training.objective import LossParts
from fastdeit.training.state import RunState
from fastdeit.training.step import TrainingStep
from fastdeit.training.stop import Stop
from refusals import refused
from runs import assert_same_state, train, trained

ALONE = World(0, 1, 1, torch.device("cpu"))


def poison(monkeypatch, *bad):
    """Make the losses of the steps `bad` (from 1) infinite, each time they run."""
    step = TrainingStep.__call__

    def poisoned(self, batch, epoch, in_epoch, global_step, check=None):
        parts = step(self, batch, epoch, in_epoch, global_step, None)
        if global_step + 1 in bad:
            parts = LossParts(*(part * math.inf for part in parts))
            with torch.no_grad():
                next(iter(self.model.parameters())).mul_(math.nan)
        if check is not None:
            check(parts)
        return parts

    monkeypatch.setattr(TrainingStep, "__call__", poisoned)


def without(monkeypatch, *left_out):
    """Make the steps `left_out` do nothing, as a reference for a run that goes back."""
    step = TrainingStep.__call__

    def reduced(self, batch, epoch, in_epoch, global_step, check=None):
        if global_step + 1 in left_out:
            return LossParts(*torch.zeros(3))
        return step(self, batch, epoch, in_epoch, global_step, check)

    monkeypatch.setattr(TrainingStep, "__call__", reduced)


def weights(state):
    return {name: state[name] for name in ("model", "ema", "optimizer", "epoch", "step", "global_step")}


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 3])
def test_the_run_ends_as_one_that_never_had_the_steps_left_out(tiny, tmp_path, events, monkeypatch, every):
    run = {"epochs": 3, "log_every": 2, "checkpoint_every": every}
    with monkeypatch.context() as patch:
        without(patch, 7, 8)
        expected = trained(tiny(run={**run, "output": tmp_path / "without"}))
    recipe = tiny(run={**run, "on_divergence": "rewind", "output": tmp_path / "rewinds"})
    with monkeypatch.context() as patch:
        poison(patch, 8)
        state = trained(recipe)
    assert_same_state(weights(expected), weights(state))
    assert state["skipped"] == [7, 8]
    (event,) = events(recipe.run.output, "rewind")
    assert (event["diverged"], event["skipped"]) == (8, [7, 8])
    lines = [line["global_step"] for line in events(recipe.run.output, "train")]
    assert lines == sorted(set(lines))
    assert all(math.isfinite(line["loss"]) for line in events(recipe.run.output, "train"))


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "left_out"), [([5], [4, 5]), ([5, 8], [4, 5, 6, 7, 8])])
def test_a_resumed_run_leaves_the_same_steps_out(tiny, tmp_path, monkeypatch, bad, left_out):
    """Stopped at step 7. For step 8, the run goes back for the second time, and leaves out four steps."""
    run = {"epochs": 3, "checkpoint_every": 2, "keep_checkpoints": 9, "on_divergence": "rewind"}
    poison(monkeypatch, *bad)
    expected = trained(tiny(run={**run, "output": tmp_path / "straight"}))
    assert expected["skipped"] == left_out
    stopped = tiny(run={**run, "output": tmp_path / "stopped"})
    with monkeypatch.context() as patch:
        patch.setattr(
            Stop, "due", lambda self, step, diverged=False: "rewind" if diverged else "stop" if step > 6 else None
        )
        with pytest.raises(SystemExit):
            train(stopped)
    assert_same_state(expected, trained(stopped))


@pytest.mark.slow
def test_no_checkpoint_keeps_the_steps_left_out(tiny, tmp_path, monkeypatch):
    """Checkpoint 4 is written, step 5 diverges, and the run is stopped before it writes a later one."""
    run = {"epochs": 3, "checkpoint_every": 2, "keep_checkpoints": 9, "on_divergence": "rewind"}
    poison(monkeypatch, 5)
    expected = trained(tiny(run={**run, "output": tmp_path / "straight"}))
    stopped, gone_back = tiny(run={**run, "output": tmp_path / "stopped"}), []

    def due(self, step, diverged=False):
        if diverged:
            gone_back.append(step)
            return "rewind"
        return "stop" if gone_back and step == 4 else None

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "due", due)
        with pytest.raises(SystemExit):
            train(stopped)
    newest = checkpoint.load(checkpoint.found(stopped.run.output / "checkpoints")[0])
    assert (newest["global_step"], newest["skipped"]) == (4, [4, 5])
    assert_same_state(expected, trained(stopped))


@pytest.mark.slow
def test_more_steps_are_left_out_until_it_helps_and_not_for_ever(tiny, tmp_path, monkeypatch, events):
    run = {"epochs": 4, "keep_checkpoints": 99, "on_divergence": "rewind"}
    poison(monkeypatch, *range(9, 12))
    recipe = tiny(run={**run, "output": tmp_path / "helps"})
    state = trained(recipe)
    assert [event["diverged"] for event in events(recipe.run.output, "rewind")] == [9, 10, 11]
    assert state["skipped"] == list(range(4, 12))
    poison(monkeypatch, *range(6, 99))
    refused("gone back 5 times, in vain", train, tiny(run={**run, "output": tmp_path / "in vain"}), error=DivergedError)


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
    first, second = steps.in_two_processes(steps.rewind_when_one_diverges, tmp_path)
    assert first == second == (9, "step 6 of process 1", 6)  # the vote after step 8 is read after the next step


def test_a_loss_far_above_the_last_ones_is_an_outlier():
    rng = np.random.default_rng(0)
    losses = 3 + 0.1 * rng.standard_normal(5000)
    band = LossBand(8.0)
    assert [band.outlier(loss) for loss in losses] == [None] * len(losses)
    assert band.outlier(5.0) == pytest.approx(20, rel=0.4)
    mean, variance, count = band.state()
    assert mean == pytest.approx(3, abs=0.2)
    assert math.sqrt(variance) == pytest.approx(0.1, rel=0.5)
    assert count == 5000
    again = LossBand(8.0)
    again.load(band.state())
    assert again.outlier(5.0) == band.outlier(5.0)
    assert band.outlier(1.0) is None  # below is not divergence


def test_a_band_does_not_judge_before_it_has_seen_enough_nor_when_it_is_off():
    band = LossBand(4.0)
    assert [band.outlier(loss) for loss in (1.0, 1.0, 50.0)] == [None] * 3
    off = LossBand(0.0)
    assert [off.outlier(loss) for loss in [1.0] * 500 + [1e9]] == [None] * 501


def test_a_falling_loss_stays_within_its_band():
    band = LossBand(8.0)
    rng = np.random.default_rng(1)
    falling = 7 * np.exp(-np.arange(3000) / 800) + 2 + 0.05 * rng.standard_normal(3000)
    assert [band.outlier(loss) for loss in falling] == [None] * 3000


@pytest.mark.slow
def test_a_loss_beyond_the_band_stops_a_run(tiny, monkeypatch, tmp_path):
    from fastdeit.training import divergence

    monkeypatch.setattr(divergence, "_SETTLED", 4)
    step = TrainingStep.__call__

    def jumps(self, batch, epoch, in_epoch, global_step, check=None):
        parts = step(self, batch, epoch, in_epoch, global_step)
        factor = 9 if global_step == 7 else 1
        check(LossParts(*(part * factor for part in parts)))
        return parts

    monkeypatch.setattr(TrainingStep, "__call__", jumps)
    recipe = tiny(run={"epochs": 2, "divergence_band": 10.0})
    refused(r"standard deviations above .* at epoch \d, step \d, samples", train, recipe, error=DivergedError)
    assert (recipe.run.output / "nonfinite-rank0.pt").exists()
    train(tiny(run={"epochs": 2, "divergence_band": 0.0, "resume": "auto", "output": tmp_path / "off"}))


def test_the_limit_of_going_back_is_for_one_divergence(tmp_path):
    guard, state = DivergenceGuard(RunConfig(on_divergence="rewind"), ALONE), RunState(tmp_path)
    windows = [guard.steps_to_skip(DivergedError("", step), state) for step in (50, 51, 400, 1)]
    assert windows == [range(49, 51), range(48, 52), range(399, 401), range(1, 2)]


def test_no_checkpoint_is_older_than_the_first_step_left_out(tiny, monkeypatch):
    run = {"epochs": 9, "keep_checkpoints": 1, "checkpoint_every": 1, "on_divergence": "rewind"}
    poison(monkeypatch, 4)
    recipe = tiny(run=run)
    refused(r"no checkpoint in .* is older than step 3", train, recipe)
    assert checkpoint.found(recipe.run.output / "checkpoints")


@pytest.mark.slow
def test_a_run_that_continues_from_another_folder_can_go_back(tiny, tmp_path, monkeypatch, events):
    first = tiny(run={"epochs": 3, "checkpoint_every": 2, "keep_checkpoints": 9, "output": tmp_path / "first"})
    train(first)
    start = checkpoint.step_path(first.run.output / "checkpoints", 2)
    poison(monkeypatch, 5)
    run = {"epochs": 3, "on_divergence": "rewind", "resume": str(start), "output": tmp_path / "second"}
    second = tiny(run=run)
    train(second)
    assert [event["skipped"] for event in events(second.run.output, "rewind")] == [[4, 5]]


def test_the_best_score_goes_with_its_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    paths = [checkpoint.step_path(folder, step) for step in (5, 10)]
    for path in paths:
        path.touch()
    scores = {"model": {"class": {"top1": 50.0, "top5": 60.0, "loss": 1.0}}}
    note_best(paths[1], scores, "top1", None)
    forget_best(folder, paths[:1])
    assert best_names(folder) == {paths[1].name}
    forget_best(folder, paths[1:])
    paths[1].touch()  # the run comes here again, with other weights
    assert best_names(folder) == set()
    assert not (folder / "best.pt").is_symlink()
