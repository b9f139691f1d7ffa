"""`fastdeit report`: the page as an HTML parser reads it, against the run's log; and which files it leaves alone."""

import base64
import hashlib
import json
import os
import re
import shutil
import sys

import pytest

from fastdeit.commands.report import Options, report
from fastdeit.pipelines.errors import UserError
from refusals import refused
from run_logs import BEGAN, Page, close_to, evaluation, start, train, write_run

HOSTILE = "</script><script>alert(3)</script><img src=x>\x1b[2J\u202e"


def files(folder):
    """Every file below a folder with its bytes and its time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def written(*runs, **options):
    path = report(Options(runs=runs, **{"device": "cpu", **options}))
    return path, Page(path.read_text())


@pytest.fixture(scope="module")
def whole(reported, tmp_path_factory):
    """The page of a trained run, made beside its folder, and the files of the folder before and after."""
    before = files(reported.run.output)
    path, page = written(reported.run.output, output=tmp_path_factory.mktemp("page") / "page.html", images=30)
    return path, page, before, files(reported.run.output)


@pytest.mark.slow
def test_curves_and_scores_are_those_of_the_log(whole, reported, events):
    _, page, *_ = whole
    lines = events(reported.run.output, "train")
    for figure, name, field in (
        ("loss", "loss", "loss"),
        ("rate", "run", "lr"),
        ("throughput", "run", "images_per_second"),
        ("wait", "run", "data_wait"),
    ):
        assert close_to(page.points(figure, name), [(each["global_step"], each[field]) for each in lines])
    scores = events(reported.run.output, "eval")
    for weights, shown in (("model", ""), ("ema", " (EMA)")):
        for head, name in (("class", "class"), ("distillation", "distillation"), ("fused_probabilities", "fused")):
            expected = [(e["epoch"] + 1, e[head]["top1"]) for e in scores if e["weights"] == weights]
            assert close_to(page.points("accuracy", name + shown), expected)
    best = events(reported.run.output, "best")[-1]
    assert (
        f"top1 {best['score']:.2f}%: fused probabilities, averaged weights (EMA), step {best['global_step']}"
        in page.text
    )
    assert "finished" in page.text


@pytest.mark.slow
def test_names_are_text_and_nothing_else(whole):
    """In tables, captions and alternative texts as in figures; the classes have the names of an attacker."""
    path, page, *_ = whole
    assert page.faults == []
    assert len(page.of("script")) == 3
    assert {attributes["src"].partition(",")[0] for _, attributes in page.of("img")} == {"data:image/png;base64"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "</script><script>alert(1)//" in page.text
    assert "\x1b" not in path.read_text()
    assert "\u202e" not in path.read_text()
    ticks = page.figures["figure-confusion"]["layout"]["yaxis"]["ticktext"]
    assert ticks[0] == "&lt;/script&gt;&lt;script&gt;al…"
    assert ticks[2] == "\\x1b[31mred\\u202e"


@pytest.mark.slow
def test_the_page_loads_nothing_and_runs_only_its_own_scripts(whole):
    path, page, *_ = whole
    assert path.stat().st_size < 8e6
    assert not page.of("link")
    assert all(value.startswith("#") for _, attributes in page.of("a") for value in [attributes["href"]])
    (policy,) = [a["content"] for _, a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    own = [script for script in page.scripts if not script.startswith("{")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in own]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "plotly.js" in own[0][:400]


@pytest.mark.slow
def test_a_page_can_be_read_and_reached(whole):
    _, page, *_ = whole
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for _, attributes in page.of("a")} <= set(ids)
    assert all(len(attributes["alt"]) > 10 for _, attributes in page.of("img"))
    assert {i for i in ids if i.startswith("figure-")} == set(page.figures)
    assert all(attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") in ("img", "region"))
    headings = [name for name, _ in page.tags if name in ("h1", "h2", "h3")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


@pytest.mark.slow
def test_the_same_run_makes_the_same_page_and_nothing_else(whole, reported, tmp_path):
    path, _, before, after = whole
    assert before == after
    again, _ = written(reported.run.output, output=tmp_path / "again.html", images=30)
    assert again.read_bytes() == path.read_bytes()
    assert os.listdir(tmp_path) == ["again.html"]


@pytest.mark.slow
def test_several_runs_share_their_curves(reported, tmp_path, monkeypatch, capsys):
    """The other was stopped, differs in a field, and has no checkpoint."""
    other = tmp_path / "other"
    shutil.copytree(reported.run.output, other)
    shutil.rmtree(other / "checkpoints")
    text = (other / "log.jsonl").read_text().replace('"lr": 0.002', '"lr": 0.003')
    (other / "log.jsonl").write_text("".join(line for line in text.splitlines(True) if '"event": "end"' not in line))
    monkeypatch.chdir(tmp_path)
    path, page = written(reported.run.output, other, images=4)
    assert str(path) == "report.html"
    assert {each["name"] for each in page.figures["figure-rate"]["data"]} == {"run", "other"}
    assert "optim.lr" in page.text
    assert "incomplete: still running, or killed" in page.text
    assert {"run1-confusion", "run2-network"} <= {attributes.get("id") for _, attributes in page.tags}
    why = f"{other}/checkpoints: there is no checkpoint yet"
    assert f"Not shown: {why}" in page.text
    assert f"{other}: the page lacks pictures: {why}" in capsys.readouterr().err
    assert not any(row in page.text for row in ("run.seed", "model.depth"))


@pytest.fixture
def plain(tmp_path):
    """A run that has only a log, with hostile texts."""
    warning = {"event": "warning", "time": BEGAN + 3, "text": HOSTILE}
    return write_run(tmp_path / "plain", start(forecast_seconds=90), train(1), train(2), warning, evaluation(0, 50.0))


def test_a_run_without_its_network(plain):
    path, page = written(plain, model=False)
    assert path == plain / "report.html"
    assert page.faults == []
    assert len(page.scripts) == 3
    assert not page.of("img")
    assert "Left out: the report was made with --no-model" in page.text
    assert "</script><script>alert(3)</script><img src=x>\\x1b[2J\\u202e" in page.text
    assert "90 s (1m 30s); the run has not finished" in page.text
    assert "not measured" in page.text
    assert "Every field is as in the recipe deit_tiny_distilled." in page.text


def test_a_field_that_an_older_version_lacked_is_no_difference(tmp_path):
    begun = start()
    assert begun["recipe"]["augment"].pop("crop") == "random_resized"
    _, page = written(write_run(tmp_path / "run", begun), model=False)
    assert "Every field is as in the recipe deit_tiny_distilled." in page.text


def test_a_run_without_incidents_says_none(tmp_path):
    _, page = written(write_run(tmp_path / "run", start()), model=False)
    assert re.search(r"Incidents\s+none", page.text)
    assert "The log has no training line yet." in page.text
    assert "The log has no evaluation." in page.text


@pytest.mark.slow
def test_a_long_log_makes_a_small_page(tmp_path):
    events = [start(), *(train(step, loss=5.0) for step in range(1, 100_001)), train(77_777, loss=99.0)]
    events += [{"event": "warning", "time": BEGAN, "text": "x" * 5000}] * 3000
    path, page = written(write_run(tmp_path, *events), model=False)
    assert path.stat().st_size < 8e6
    assert 99.0 in page.figures["figure-loss"]["data"][0]["y"]
    assert "2700 more are in log.jsonl." in page.text


def test_a_file_of_somebody_is_left_alone(plain, tmp_path):
    mine, away = tmp_path / "report.html", tmp_path / "away.html"
    mine.write_text("<!doctype html>\nmy own notes")
    with pytest.raises(UserError, match=r"report\.html: exists, and fastdeit report did not write it: .*--overwrite"):
        written(plain, model=False, output=mine)
    assert mine.read_text().endswith("my own notes")
    written(plain, model=False, output=mine, overwrite=True)
    written(plain, model=False, output=mine)  # a report may be replaced
    refused(r"there is no folder .*: make it", written, plain, model=False, output=tmp_path / "none" / "page.html")
    away.symlink_to("nowhere")
    for path in (tmp_path, away, tmp_path / "fifo"):
        if path.name == "fifo":
            os.mkfifo(path)
        refused(str(path), written, plain, model=False, output=path, overwrite=True, error=OSError)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"images": 0}, "--images 0: give at least 1"), ({"batch": -1}, "--batch -1"), ({"runs": ()}, "name the folder")],
)
def test_mistakes(plain, options, said):
    refused(said, report, Options(**{"runs": (plain,), **options}))


def test_without_plotly_the_sentence_says_how_to_get_it(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    refused(r"pip install 'fastdeit\[report\]'", written, plain, model=False)
    assert sorted(path.name for path in plain.iterdir()) == ["log.jsonl"]


def test_a_record_is_shown(plain):
    record = {"id": "feed", "starts": [{"command": "fastdeit train <x>", "processes": {"node1": ["H100", "H100"]}}]}
    record["starts"][0] |= {"versions": {"torch": "2.13", "ffcv": None}, "commit": "abc-dirty"}
    (plain / "run.json").write_text(json.dumps(record))
    _, page = written(plain, model=False)
    for shown in ("feed", "fastdeit train <x>", "node1: 2 x H100", "torch 2.13", "abc, with uncommitted changes"):
        assert shown in page.text
