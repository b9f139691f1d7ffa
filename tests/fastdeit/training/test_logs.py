"""The run's log: whole lines, whatever was killed before."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdeit.training.progress import duration
from run_logs import run_log


def test_a_torn_last_line_is_taken_off(tmp_path, events):
    (tmp_path / "log.jsonl").write_text('{"event": "start"}\n{"event": "tra')
    with run_log(tmp_path) as log:
        log.event("end", epoch=1)
    assert [e["event"] for e in events(tmp_path)] == ["start", "end"]


def test_numbers_reach_tensorboard(tmp_path):
    with run_log(tmp_path, tensorboard=True) as log:
        log.event("train", epoch=0, step=1, global_step=7, loss=2.5)
        log.event("eval", epoch=0, global_step=7, weights="ema", images=3, **{"class": {"top1": 40.0}})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(7, 2.5)]
    assert board.Scalars("eval_ema/class/top1")[0].value == 40.0


EVENTS = [
    {"event": "start"},
    {"event": "train", "epoch": 0, "step": 3, "global_step": 4, "loss": 2.0},
    {"event": "fallbacks", "epoch": 0, "count": 1},
    {"event": "checkpoint", "global_step": 4},
    {"event": "eval", "epoch": 0, "global_step": 4, "weights": "model"},
    {"event": "train", "epoch": 1, "step": 1, "global_step": 6, "loss": 1.0},
    {"event": "fallbacks", "epoch": 1, "count": 2},
    {"event": "warning", "text": "a full disk"},
]


@pytest.mark.parametrize(
    ("epoch", "step", "evaluates", "left"), [(1, 4, True, [0, 1, 2, 3, 7]), (0, 0, True, [0, 3, 7])]
)
def test_figures_of_steps_that_are_done_again_are_moved(tmp_path, epoch, step, evaluates, left):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(event) for event in EVENTS] + ["no JSON", "[1]"]
    path.write_text("\n".join(lines) + "\n")
    with run_log(tmp_path) as log:
        for _ in range(2):
            log.go_back(epoch, step, evaluates=evaluates)
    kept = [lines[number] for number in [*left, 8, 9]]
    assert path.read_text().splitlines() == kept
    assert (tmp_path / "log-redone.jsonl").read_text().splitlines() == [line for line in lines if line not in kept]


def test_an_evaluation_that_is_not_done_again_stays(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in EVENTS[:5]))
    with run_log(tmp_path) as log:
        log.go_back(1, 4, evaluates=False)
    assert len(path.read_text().splitlines()) == 5
    assert not (tmp_path / "log-redone.jsonl").exists()


def test_tensorboard_shows_each_step_once(tmp_path):
    for start, losses in ((None, [1.0, 2.0, 3.0]), (1, [2.5, 3.5])):
        with run_log(tmp_path, tensorboard=True) as log:
            if start is not None:
                log.go_back(0, start, evaluates=False)
            for number, loss in enumerate(losses, 1 + (start or 0)):
                log.event("train", epoch=0, step=number - 1, global_step=number, loss=loss)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.5), (3, 3.5)]


def test_other_processes_write_nothing(tmp_path):
    with run_log(tmp_path / "run", active=False, tensorboard=True, progress=True) as log:
        log.event("end")
        log.say("nothing")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("seconds", "text"), [(5, "0m 05s"), (3700, "1h 01m"), (90000, "1d 01h")])
def test_duration(seconds, text):
    assert duration(seconds) == text
