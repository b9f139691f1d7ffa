"""`run.wandb`, offline; the judge is the file that W&B would send."""

import json
import os
import re
import sys
from unittest.mock import Mock

import pytest

from fastdeit.pipelines.errors import UserError
from fastdeit.training.wandb_run import open_wandb
from forked import succeed
from refusals import refused
from run_logs import open_log
from runs import changed, train


def records(path):
    """The records of W&B's file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2  # takes seconds

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def losses(path):
    """The loss by step that W&B would send."""
    found = {}
    for record in records(path):
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in row:
            found[row["global_step"]] = row["train/loss"]
    return found


def train_offline(recipe):
    os.environ["WANDB_MODE"] = "offline"
    train(recipe)


@pytest.mark.slow
def test_all_starts_are_one_run_with_the_losses_of_the_log(tiny, events):
    recipe = tiny(run={"epochs": 1, "tensorboard": True, "wandb": "deit"})
    for epochs in (1, 2):  # the second start resumes
        out, _ = succeed(train_offline, changed(recipe, run={"epochs": epochs, "resume_changed": True}))
    folder = recipe.run.output
    run_id = json.loads((folder / "run.json").read_text())["id"]
    assert f"Weights & Biases: project deit, run {run_id} (offline)" in out
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    assert [path.name.rpartition("-")[2] for path in runs] == [run_id] * 2
    sent = losses(runs[0] / f"run-{run_id}.wandb") | losses(runs[1] / f"run-{run_id}.wandb")
    logged = {event["global_step"]: event["loss"] for event in events(folder, "train")}
    assert sent.keys() == logged.keys()
    assert all(sent[step] == pytest.approx(logged[step], rel=1e-6) for step in sent)


def test_what_keeps_it_from_starting_is_told(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    refuse = Mock(side_effect=RuntimeError("No API key configured"))
    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(UserError, match=re.escape("cannot be started (No API key configured): run `wandb login`, set")):
        open_wandb("deit", "0123abcd", tmp_path, {}, log)
    assert refuse.call_args.kwargs["id"] == "0123abcd"
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(re.escape("pip install 'fastdeit[wandb]'"), open_wandb, "deit", "0123abcd", tmp_path, {}, log)
