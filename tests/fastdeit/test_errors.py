"""What a person can mend ends in a sentence and status 2; a bug in a traceback and status 1."""

import errno
import hashlib
import io
import os
import signal
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision

from fastdeit import checkpoint
from fastdeit.cli import run
from fastdeit.pipelines.errors import UserError, fact, naming
from fastdeit.pipelines.formats import files
from fastdeit.pipelines.machine import machine_error
from fastdeit.pipelines.sources import open_source
from fastdeit.teacher.label_cache import LabelCache
from fastdeit.training.run_lock import RunLock
from system import refusing, run_python

SCRIPT = """
import errno, os, sys
from fastdeit.cli import run
from fastdeit.pipelines.conversion.workers import ConvertError
def main():
    raise {error}
run(main)
"""


def end(error):
    """Exit status and standard error of a program that `error` ends."""
    done = run_python("-c", SCRIPT.format(error=error))
    return done.returncode, done.stderr


@pytest.mark.parametrize("error", ["ValueError('shape (3, 4)')", "KeyError('a')", "OSError('no errno at all')"])
def test_a_bug_is_a_traceback(error):
    status, said = end(error)
    assert status == 1
    assert "Traceback" in said


def test_what_a_person_can_mend_is_a_sentence():
    assert end("ConvertError('x.beton: is a folder')") == (2, "error: x.beton: is a folder\n")


def test_ctrl_c():
    assert end("KeyboardInterrupt") == (130, "interrupted\n")


def test_ctrl_c_that_a_library_turns_into_another_error(ended):
    """As NumPy's import does, into a RecursionError."""

    def main():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError("maximum recursion depth exceeded") from None

    assert ended(130, run, main).err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "number", [n for n in errno.errorcode if n not in (errno.EPIPE, errno.ECHILD, errno.ESRCH, errno.EINTR)]
)
def test_an_error_about_a_path_names_it_and_the_remedy(number, ended):
    said = ended(2, run, Mock(side_effect=OSError(number, os.strerror(number), "/data/train\n.beton"))).err
    assert said.startswith(f"error: /data/train\\n.beton: {os.strerror(number)}: ")
    assert said.count("\n") == 1


def test_a_full_machine_needs_no_path(ended):
    assert "No space left on device: free space" in ended(2, run, refusing(errno.ENOSPC)).err
    # Not the disk's fault: a bug, or a connection that has nothing to do with files.
    for number in (errno.EBADF, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENODEV):
        with pytest.raises(OSError, match=os.strerror(number)):
            run(refusing(number))


def test_a_refusal_without_a_known_remedy_invents_none():
    said = str(machine_error(OSError(errno.EINVAL, "Invalid argument"), "c.pt: cannot be written"))
    assert said.startswith("c.pt: cannot be written: Invalid argument: the operating system refuses: find out why")
    assert "out of memory: close" in str(machine_error(MemoryError(), "image 3: cannot be decoded"))


def test_a_real_full_disk_is_named():
    full = pytest.raises(OSError, match="No space left")
    with full as caught, naming("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize("size", [3, 100_000])
def test_a_checkpoint_on_a_full_disk(tmp_path, monkeypatch, size):
    """`/dev/full` stands in for it; PyTorch's writer reports it as a RuntimeError about its own positions."""
    path = tmp_path / "checkpoint-000000002.pt"
    checkpoint.save(tmp_path / "checkpoint-000000001.pt", {"weight": torch.ones(3)})
    monkeypatch.setattr(files, "open", lambda *_: io.FileIO("/dev/full", "w"), raising=False)
    with pytest.raises(
        UserError, match=r"checkpoint-000000002\.pt: cannot be written: No space left on device.*untouched"
    ):
        checkpoint.save(path, {"weight": torch.ones(size)})
    assert os.listdir(tmp_path) == ["checkpoint-000000001.pt"]
    assert torch.load(tmp_path / "checkpoint-000000001.pt")["weight"].sum() == 3


def test_an_output_that_is_a_file(tmp_path, ended):
    (tmp_path / "out").write_text("mine")
    said = ended(2, run, lambda: RunLock(tmp_path / "out")).err
    assert said == f"error: {tmp_path}/out: File exists: move it away, or name another place\n"
    assert (tmp_path / "out").read_text() == "mine"


def test_no_advice_of_another_library_is_passed_on(tmp_path):
    """NumPy's is to allow pickles; torchvision's to download."""
    (tmp_path / "labels.json").write_text("{}")
    np.save(tmp_path / "epoch.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle") as theirs:
        np.load(tmp_path / "epoch.npy")
    cache = LabelCache.__new__(LabelCache)
    cache.folder = tmp_path
    held = hashlib.sha256((tmp_path / "epoch.npy").read_bytes()).hexdigest()
    cache.described = SimpleNamespace(kind="hard")
    cache.epochs = {"0": {"file": "epoch.npy", "sha256": held}}
    with pytest.raises(UserError, match=r"epoch\.npy: not hard labels \(.*\): remove it") as ours:
        cache._read(0)
    assert "pickle" in str(theirs.value)
    assert "pickle" not in str(ours.value)
    with pytest.raises(RuntimeError, match="download=True"):
        torchvision.datasets.CIFAR10(tmp_path)
    with pytest.raises(UserError, match="Dataset not found or corrupted") as ours:
        open_source(f"torchvision:CIFAR10:{tmp_path}")
    assert "download=True" not in str(ours.value)


@pytest.mark.parametrize(
    ("said", "fact_of_it"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB. If reserved, set PYTORCH_CUDA_ALLOC_CONF", "CUDA out of memory"),
        ("CUDA error: launch failure\nCompile with `TORCH_USE_CUDA_DSA`", "CUDA error: launch failure"),
        ("/a.b/c.so: no such file", "/a.b/c.so: no such file"),
        ("", "RuntimeError"),
    ],
)
def test_the_fact_of_an_error(said, fact_of_it):
    assert fact(RuntimeError(said)) == fact_of_it
