"""Checkpoints: whole or absent, safe to read, and named when they are not."""

import os
import pickle
import time

import pytest
import torch

from fastdeit import checkpoint
from fastdeit.pipelines.errors import UserError
from forked import Forked, run_code
from refusals import refused
from system import wait_for


def state(value=1.0):
    fields = {"optimizer": {}, "recipe": {}, "effective": {}, "epoch": 0, "step": 3, "global_step": 3}
    return {"format": checkpoint.FORMAT, "model": {"w": torch.full((4,), value)}, "ema": None, **fields}


def test_round_trip(tmp_path):
    path = checkpoint.step_path(tmp_path, 12)
    checkpoint.save(path, state())
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["w"], torch.ones(4))
    assert loaded["step"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_newest_first_and_pruned(tmp_path):
    for step in (5, 100, 20):
        checkpoint.save(checkpoint.step_path(tmp_path, step), state())
    (tmp_path / "checkpoint-000000200.pt.tmp").write_bytes(b"half")
    (tmp_path / "checkpoint-notes.pt").write_bytes(b"mine")
    assert [p.name for p in checkpoint.found(tmp_path)] == [
        "checkpoint-000000100.pt",
        "checkpoint-000000020.pt",
        "checkpoint-000000005.pt",
    ]
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-000000020.pt",
        "checkpoint-000000100.pt",
        "checkpoint-notes.pt",
    ]


class Evil:
    def __reduce__(self):
        return os.system, ("echo pwned > /tmp/fastdeit-pwned",)


@pytest.mark.parametrize("payload", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, payload):
    path = tmp_path / "evil.pt"
    if payload == "torch":
        torch.save({"format": 1, "model": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps(Evil()))
    refused(r"evil\.pt", checkpoint.load, path)
    assert not os.path.exists("/tmp/fastdeit-pwned")


@pytest.mark.parametrize("cut", [0, 10, 200, -1])
def test_damaged_file_is_named(tmp_path, cut):
    path = tmp_path / "cut.pt"
    checkpoint.save(path, state())
    path.write_bytes(path.read_bytes()[:cut])
    refused(r"cut\.pt", checkpoint.load, path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"model": {}}, path)
    refused("not a fastdeit training checkpoint", checkpoint.load, path)
    refused("no such checkpoint", checkpoint.load, tmp_path / "missing.pt")


def test_failure_while_writing_leaves_the_old_one(tmp_path):
    path = tmp_path / "checkpoint-000000001.pt"
    checkpoint.save(path, state(1.0))
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.save(path, {**state(2.0), "bad": lambda: None})
    assert torch.equal(checkpoint.load(path)["model"]["w"], torch.ones(4))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_killed_while_writing(tmp_path):
    """A process that does nothing but overwrite one checkpoint is killed; the file is whole each time."""
    path = tmp_path / "checkpoint-000000001.pt"
    code = (
        "import sys, torch; from pathlib import Path; from fastdeit import checkpoint\n"
        f"path = Path({str(path)!r}); i = 0\n"
        "while True:\n"
        "    i += 1\n"
        "    checkpoint.save(path, {'format': 1, 'model': torch.full((300000,), float(i)), 'step': i})\n"
    )
    for delay in (0.02, 0.07, 0.15):
        process = Forked(run_code, code)
        before = path.stat().st_mtime_ns if path.exists() else 0
        wait_for(lambda before=before: path.exists() and path.stat().st_mtime_ns != before)
        time.sleep(delay)
        process.kill()
        process.wait()
        loaded = checkpoint.read_checkpoint(path)
        assert (loaded["model"] == float(loaded["step"])).all()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (POINTER, "Git LFS pointer.*git lfs pull"),
        ("\n<!DOCTYPE html>\n<html>404</html>", "web page.*fetch the file again"),
        ("<HTML><head>", "web page"),
        ("weights", "not a checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_what_was_fetched_instead_is_named(tmp_path, text, said, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_text(text)
    refused(rf"weights{suffix}.*{said}", checkpoint.read_checkpoint, path)


@pytest.mark.parametrize("held", [Evil(), os.system, torch.nn.Linear(2, 2)], ids=["call", "function", "module"])
def test_nobody_is_told_to_load_a_file_unsafely(tmp_path, held):
    """As PyTorch tells in its own message of the same file."""
    path = tmp_path / "whole.pt"
    torch.save({"model": held}, path)
    refused("weights_only", torch.load, path, error=pickle.UnpicklingError)
    with pytest.raises(UserError) as caught:
        checkpoint.read_checkpoint(path)
    said = str(caught.value)
    assert "whole.pt holds an object of " in said
    assert not any(word in said for word in ("weights_only", "add_safe_globals", "torch.load", "trust"))
