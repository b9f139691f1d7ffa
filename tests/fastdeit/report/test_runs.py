"""What a report reads from a run's folder, judged by the events that were written there."""

import json
import os

import pytest

from fastdeit.recipes import deit_small, deit_tiny
from fastdeit.report import incidents
from fastdeit.report.runs import published, read_run, read_runs
from fastdeit.training import data_wait
from refusals import refused
from run_logs import BEGAN, evaluation, start, train, write_run
from runs import changed

STOPPED = {"event": "stopped", "time": BEGAN + 9, "signal": "SIGTERM", "epoch": 0, "step": 6, "global_step": 6}
END = {"event": "end", "time": BEGAN + 30, "epoch": 3, "global_step": 30, "seconds": 29.5}


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([start(), train(1), END], "finished"),
        ([start(), train(1), STOPPED], "stopped by SIGTERM"),
        ([start(), train(1)], "incomplete"),
        ([start(), STOPPED, start(BEGAN + 20), train(7)], "incomplete"),
        ([start(), END, start(BEGAN + 40), train(31), STOPPED], "stopped by SIGTERM"),
    ],
)
def test_status(tmp_path, events, status):
    assert read_run(write_run(tmp_path, *events)).status == status


def test_time_of_each_start_and_gpu_hours(tmp_path):
    """The second start is killed: what it did after its checkpoint is in the other log, but took time."""
    again = [start(BEGAN + 100, world=2), train(7, BEGAN + 101), start(BEGAN + 300, world=4), train(8, BEGAN + 307)]
    write_run(tmp_path, start(), train(5), *again)
    (tmp_path / "log-redone.jsonl").write_text(json.dumps(train(8, BEGAN + 130)) + "\n")
    run = read_run(tmp_path)
    assert run.seconds == [5, 30, 7]
    assert run.process_seconds == 5 + 2 * 30 + 4 * 7


def test_energy_is_that_of_all_gpus(tmp_path):
    def gpus(*joules):
        return {"event": "gpus", "time": BEGAN, "epoch": 0, "processes": [{"joules": each} for each in joules]}

    assert read_run(write_run(tmp_path / "a", start(), gpus(10, 20), gpus(5, None))).joules == 35
    assert read_run(write_run(tmp_path / "b", start(), gpus(None))).joules is None


def test_curves_have_each_step_once_and_in_order(tmp_path):
    run = read_run(write_run(tmp_path, start(), train(2), train(3, loss=9.0), train(1), train(3, loss=float("nan"))))
    assert run.columns["global_step"].tolist() == [1, 2, 3]
    assert str(run.columns["loss"].tolist()) == "[3.0, 1.5, nan]"
    assert (run.steps, run.all_steps) == (3, 3000)


def test_every_kind_of_incident(tmp_path):
    at = {"time": BEGAN, "epoch": 1, "step": 2, "global_step": 12}
    wait = {"share": 0.5, "seconds": 60.0, "host": "node7"}
    path = "/runs/x/checkpoints/checkpoint-000000010.pt"
    events = [
        {"event": "warning", "time": BEGAN, "text": "the clocks are low"},
        {"event": "replaced", "time": BEGAN, "epoch": 0, "count": 9, "images": [[i, i + 1] for i in range(9)]},
        {"event": "fallbacks", "time": BEGAN, "epoch": 2, "count": 1, "images": [77]},
        {"event": "nonfinite", **at, "loss": "nan", "reproduction": "nonfinite-rank0.pt", "indices": [1]},
        {"event": "rewind", **at, "path": path, "diverged": 15, "skipped": [14, 15]},
        {"event": "resume", **at, "path": path, "changed": ["optim.lr is 1, was 2"]},
        {"event": "checkpoint", **at, "path": path, "seconds": 3.0, "stall_seconds": 2.5},
        {"event": "checkpoint", **at, "path": path, "seconds": 3.0, "stall_seconds": 0.1},
        {"event": "waits", "time": BEGAN, "epoch": 0, "processes": [{**wait, "share": 0.01}, wait]},
        {"event": "waits", "time": BEGAN, "epoch": 0, "processes": [{**wait, "seconds": 1.0}]},
        {"event": "unheard of", "time": BEGAN},
        {**STOPPED, "time": BEGAN},
    ]
    run = read_run(write_run(tmp_path, start(), train(11), *events))
    assert [(each.place, each.kind, each.text) for each in run.incidents] == [
        ("after step 11", "warning", "the clocks are low"),
        ("epoch 1", "replaced", "replaced 9 images that could not be decoded: 0 by 1, 1 by 2, 2 by 3, 3 by 4, 4 by 5, "
         "5 by 6, 6 by 7, 7 by 8, ..."),
        ("epoch 3", "fallbacks", "PIL read 1 image that the loader's decoder refused: 77"),
        ("step 12", "nonfinite", "loss nan; the batch is stored in nonfinite-rank0.pt"),
        ("step 12", "rewind", "diverged at step 15; went back to checkpoint-000000010.pt; skipped steps 14 to 15"),
        ("step 12", "resume", "continued from checkpoint-000000010.pt; changed: optim.lr is 1, was 2"),
        ("step 12", "checkpoint", "training waited 2.5 s for checkpoint-000000010.pt, which took 3.0 s to write"),
        ("epoch 1", "waits", "process 1 (node7) waited 60 s for data, 50% of the epoch"),
        ("step 6", "stopped", "by SIGTERM"),
    ]  # fmt: skip
    assert [(mark.step, mark.kind) for mark in run.marks] == [(12, "rewind"), (12, "resume"), (6, "stopped")]


def test_a_wait_is_listed_from_where_the_run_warns():
    assert (incidents.WAIT_SHARE, incidents.WAIT_SECONDS) == (data_wait._SHARE, data_wait._SECONDS)


def test_a_line_cut_short_is_left_out(tmp_path):
    assert read_run(write_run(tmp_path, start(), train(1), train(2), tail='{"event": "tra')).steps == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"event": "tra\n', r"log\.jsonl, line 2: not JSON"),
        ("[1]\n", r"line 2: not an event of a run"),
        ('{"event": 3}\n', r"line 2: not an event of a run"),
        ('{"event": "train"}\n', r"line 2: not a line that a run writes \(train: no 'time'\): restore or delete it"),
        ('{"event": "train", "time": 1}\n', r"line 2: .*train: no 'global_step'"),
        (json.dumps(train(1, loss="low")) + "\n", r"line 2: .*loss is not a number"),
        (json.dumps(train(1, time=1e300)) + "\n", r"line 2: .*time is out of range"),
        (json.dumps({**evaluation(0, 50.0), "class": [1]}) + "\n", r"line 2: .*\(eval: "),
        (json.dumps(start(world="two")) + "\n", r"line 2: .*world is not a number"),
        (json.dumps({"event": "waits", "time": 1, "epoch": 0, "processes": [3]}) + "\n", r"line 2: .*\(waits: "),
        ('{"event": "x", "time": 1' + "0" * 200 + "}\n", r"line 2: not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, said):
    folder = write_run(tmp_path, start(), tail=line + json.dumps(train(2)) + "\n")
    refused(said, read_run, folder)


def test_a_damaged_line_of_the_other_log_is_named(tmp_path):
    write_run(tmp_path, start())
    (tmp_path / "log-redone.jsonl").write_text('{"event": "train", "time": "late"}\n')
    refused(r"log-redone\.jsonl, line 1: .*time is not a number", read_run, tmp_path)


def test_a_clock_that_goes_back_costs_nothing(tmp_path):
    assert read_run(write_run(tmp_path, start(BEGAN + 50), start(BEGAN), train(1, BEGAN + 9))).seconds == [0, 9]


def test_what_is_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path / "none", "there is no such folder: name the folder of a run"),
        (tmp_path / "file", "is a file: name"),
        (tmp_path, r"has no log\.jsonl: name"),
        (write_run(tmp_path / "empty"), "has no event 'start'"),
    ):
        refused(said, read_run, path)
    os.mkfifo(tmp_path / "log.jsonl")
    refused(r"log\.jsonl: Is a fifo", read_run, tmp_path)


def test_labels_are_short_and_different(tmp_path):
    folders = [write_run(tmp_path / name, start()) for name in ("a/x", "b/x", "c/y")]
    assert [run.label for run in read_runs(folders)] == [str(folders[0]), str(folders[1]), "y"]
    refused("is named twice: give each run once", read_runs, [folders[0], folders[0] / ".." / "x"])


@pytest.mark.parametrize("record", ["{", "[]", '{"starts": 3}', '{"starts": [[]], "id": 7}'])
def test_a_record_that_is_not_one_is_no_error(tmp_path, record):
    write_run(tmp_path, start())
    (tmp_path / "run.json").write_text(record)
    assert read_run(tmp_path).last_start == {}


@pytest.mark.parametrize(
    ("recipe", "steps", "images", "top1"),
    [
        (deit_small(), 1251, 50_000, 79.8),
        (deit_tiny(), 1251, 50_000, 72.2),
        (changed(deit_tiny(), model={"num_classes": 1000}), 1251, 50_000, 72.2),
        (changed(deit_tiny(), model={"num_classes": 100}), 1251, 50_000, None),
        (deit_tiny(), 1250, 50_000, None),
        (deit_tiny(), 1251, 10_000, None),
        (deit_tiny(), 10, 44, None),
    ],
)
def test_the_papers_figure_is_for_imagenet_alone(tmp_path, recipe, steps, images, top1):
    run = read_run(write_run(tmp_path, start(recipe=recipe, steps_per_epoch=steps), evaluation(0, 50.0, images=images)))
    assert (published(run) or (None, ""))[0] == top1
