"""`run.json`: the same id over all starts of a run, and how each was started."""

import json

import pytest
import torch

from fastdeit.distributed import World
from fastdeit.training.run_record import describe_processes, record_start, source_commit
from runs import train
from system import run

ALONE = World(0, 1, 1, torch.device("cpu"))


def test_starts_share_an_id(tmp_path):
    processes = describe_processes(ALONE)
    first = record_start(tmp_path, processes, None)
    assert record_start(tmp_path, processes, tmp_path / "x.pt") == first
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["id"] == first
    assert [start["checkpoint"] for start in stored["starts"]] == [None, str(tmp_path / "x.pt")]
    assert stored["starts"][0]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert [*stored["starts"][0]["processes"].values()] == [["cpu"]]
    other = tmp_path / "other"
    other.mkdir()
    assert record_start(other, processes, None) != first


@pytest.mark.parametrize("text", ["", "{}", "[" * 40000, '{"id": 3, "starts": []}', '{"id": "x", "starts": {}}'])
def test_a_file_that_is_not_ours_stays_as_it_is(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="not a record that fastdeit wrote"):
        record_start(tmp_path, {}, None)
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.slow
def test_the_log_names_the_run_and_a_file_that_is_not_ours_is_a_warning(tiny, events):
    recipe = tiny(run={"epochs": 1})
    train(recipe)
    path = recipe.run.output / "run.json"
    assert events(recipe.run.output, "start")[0]["run"] == json.loads(path.read_text())["id"]
    path.write_text("mine")
    train(recipe)
    assert path.read_text() == "mine"
    assert any("this start is not recorded" in event["text"] for event in events(recipe.run.output, "warning"))


def test_the_commit_is_of_the_files_own_checkout(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return run("git", "-C", tmp_path, *identity, *words, check=True).stdout.strip()

    ours, installed = tmp_path / "ours.py", tmp_path / "site-packages" / "other.py"
    installed.parent.mkdir()
    ours.write_text("1")
    installed.write_text("1")
    assert source_commit(ours) is None
    git("init", "-q")
    git("add", "ours.py")
    git("commit", "-qm", "first")
    assert source_commit(ours) == git("rev-parse", "HEAD")
    ours.write_text("2")
    assert source_commit(ours) == git("rev-parse", "HEAD") + "-dirty"
    assert source_commit(installed) is None


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit() is None
