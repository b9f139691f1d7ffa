"""The figures of a report: that no peak is lost, that the JSON is safe in a page, and that plotly takes them."""

import json
import math

import numpy as np
import pytest

from fastdeit.report import figures
from fastdeit.report.figures import MOST_POINTS, as_json, thinned
from fastdeit.report.runs import read_run, read_runs
from run_logs import close_to, evaluation, start, train, write_run

HOSTILE = "</script><script>alert(1)//&amp;\u2028<b>x</b>"


def test_thinning_keeps_peaks_and_ends():
    x = np.arange(300_000.0)
    y = np.sin(x / 7000)
    peaks = np.arange(123, 300_000, 977)  # each in a stretch of its own
    y[peaks] = np.where(peaks % 2, 50, -50)
    y[5000:5007] = np.nan
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) <= MOST_POINTS + 2
    assert {0, 299_999, *peaks} <= set(kept_x)
    assert (np.diff(kept_x) > 0).all()
    assert (kept_y == y[kept_x.astype(int)]).all()


def test_a_short_curve_is_drawn_whole():
    x, y = np.arange(3.0), np.array([1.0, np.nan, 2.0])
    assert thinned(x, y)[0].tolist() == [0, 1, 2]


def test_json_is_safe_in_a_script_element():
    text = as_json({"name": HOSTILE, "y": [1.5, math.nan, math.inf, 1 / 3], "z": np.array([[1, 2]])})
    assert "<" not in text
    assert json.loads(text) == {"name": HOSTILE, "y": [1.5, None, None, 0.3333333], "z": [[1, 2]]}


def test_a_label_is_not_markup():
    assert (
        figures.label('<a href="javascript:x">\x1b[1m&</a>') == '&lt;a href="javascript:x"&gt;\\x1b[1m&amp;&lt;/a&gt;'
    )


@pytest.fixture
def made(tmp_path):
    """Two runs with every kind of mark."""
    at = {"epoch": 1, "step": 0, "global_step": 10, "path": "checkpoint-000000010.pt", "time": 1_700_000_011.0}
    marks = [
        {"event": "resume", **at, "changed": [HOSTILE]},
        {"event": "rewind", **at, "diverged": 12, "skipped": [11, 12]},
        {"event": "stopped", **at, "signal": "SIGINT"},
    ]
    best = {"event": "best", "time": 1_700_000_020.0, "checkpoint": "x", "metric": "loss", "weights": "ema"}
    best |= {"head": "class", "score": 0.5, "global_step": 20}
    events = [start(), *map(train, range(1, 21)), *marks, evaluation(0, 40.0), evaluation(1, 60.0), best]
    events += [evaluation(0, 30.0, "model"), evaluation(1, 50.0, "model")]
    return [write_run(tmp_path / name, *events) for name in ("a", HOSTILE.replace("/", "|"))]


def test_marks_and_the_best_score(made):
    (run,) = read_runs(made[:1])
    drawn = figures.curves([run])
    marks = {each["name"]: each for each in drawn["rate"]["data"] if each.get("yaxis") == "y2"}
    assert sorted(marks) == ["resume", "rewind", "stopped"]
    assert all(each["x"] == [10, 10, None] for each in marks.values())
    assert marks["rewind"]["y"] == [0, 1, None]
    traces = {each["name"]: each for each in figures.accuracy([run])["data"]}
    assert (traces["best"]["x"], traces["best"]["y"]) == ([2], [60.0])
    assert traces["class (EMA)"]["y"] == [40.0, 60.0]
    assert traces["class"]["x"] == [1, 2]
    points = list(zip(drawn["loss"]["data"][0]["x"], drawn["loss"]["data"][0]["y"], strict=True))
    assert close_to(points, [(step, 3 / step) for step in range(1, 21)])


def test_several_runs_have_a_colour_each(made):
    runs = read_runs(made)
    traces = [each for each in figures.curves(runs)["loss"]["data"] if "yaxis" not in each]
    assert [each["line"]["color"] for each in traces] == [figures.COLOURS[0]] * 3 + [figures.COLOURS[1]] * 3
    assert [each.get("visible", True) for each in traces] == [True, "legendonly", "legendonly"] * 2


@pytest.mark.slow
def test_plotly_takes_every_figure(made):
    """It refuses properties that it does not know."""
    graphs = pytest.importorskip("plotly.graph_objects")
    drawn = [
        *figures.curves(read_runs(made)).values(),
        figures.accuracy(read_runs(made)),
        figures.accuracy([read_run(made[0])]),
        figures.cosines([0.1, 0.9]),
        figures.confusion(np.eye(3), ["a", HOSTILE, "c" * 99]),
    ]
    for figure in drawn:
        graphs.Figure(json.loads(as_json(figure)))
