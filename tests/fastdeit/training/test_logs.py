"""The run's log: whole lines, whatever was killed before."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdeit.training.logs import RunLog
from fastdeit.training.progress import duration


def test_a_torn_last_line_is_taken_off(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "start"}\n{"event": "tra')
    log = RunLog(tmp_path, active=True, tensorboard=False, progress=False)
    log.event("end", epoch=1)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in lines] == ["start", "end"]


def test_numbers_reach_tensorboard(tmp_path):
    log = RunLog(tmp_path, active=True, tensorboard=True, progress=False)
    log.event("train", epoch=0, step=1, global_step=7, loss=2.5)
    log.event("eval", epoch=0, global_step=7, weights="ema", images=3, **{"class": {"top1": 40.0}})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(7, 2.5)]
    assert board.Scalars("eval_ema/class/top1")[0].value == 40.0


def test_other_processes_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", active=False, tensorboard=True, progress=True)
    log.event("end")
    log.say("nothing")
    log.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("seconds", "text"), [(5, "0m 05s"), (3700, "1h 01m"), (90000, "1d 01h")])
def test_duration(seconds, text):
    assert duration(seconds) == text
