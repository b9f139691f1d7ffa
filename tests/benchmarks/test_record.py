"""Windows are counted right, and a record says what a figure needs."""

import json
import time

import pytest
import torch

from benchmarks import record
from system import run, run_python


def test_a_window_measures_a_known_rate():
    def step():
        time.sleep(0.01)
        return 5

    assert 100 < record.timed_window(step, 0.1) <= 500  # a sleep is never shorter than asked for


def test_median_is_not_moved_by_one_slow_window():
    assert record.Timing((10.0, 11.0, 12.0, 13.0, 1.0)).median == 11.0
    assert record.Timing((8.0, 10.0, 12.0)).spread == pytest.approx(0.4)


def test_the_device_is_waited_for_before_each_clock_that_counts():
    events = []

    def step():
        events.append("step")
        return 1

    record.timed_window(step, 0.0, lambda: events.append("synchronize"))
    assert events == ["synchronize", "step", "synchronize"]


def test_environment_is_json_and_agrees_with_git():
    found = json.loads(json.dumps(record.environment()))
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    git = run("git", "rev-parse", "HEAD", cwd=record.RESULTS.parent)
    if git.returncode == 0:
        assert found["commit"].startswith(git.stdout.strip())
    else:
        assert found["commit"] is None


@pytest.mark.slow
def test_command_is_the_one_that_was_typed():
    code = "from benchmarks.record import environment; print(environment()['command'])"
    folder = record.RESULTS.parent.parent
    out = run_python("-c", code, "--flag", "two words", cwd=folder, status=0)
    assert out.stdout.strip().endswith("--flag 'two words'")


def test_append_adds_lines(tmp_path):
    path = tmp_path / "new" / "figures.jsonl"
    record.append(path, {"b": 1, "a": [1.5]})
    record.append(path, {"b": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"b": 1, "a": [1.5]}, {"b": 2}]
