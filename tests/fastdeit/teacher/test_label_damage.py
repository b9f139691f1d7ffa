"""Hostile caches of labels, and machines that cannot read them. Judges: numpy, the OS's accounts."""

import errno
import io
import os
import resource
import zipfile

import numpy as np
import pytest

from fastdeit.pipelines.machine import MachineError
from fastdeit.teacher.label_cache import Described, LabelCache, LabelWriter
from hostile import vouch
from refusals import refused
from system import refusing

ENTRIES = np.arange(50)


@pytest.fixture(params=["hard", "soft"])
def cache(request, tmp_path):
    """A folder with one epoch of labels, and its file."""
    soft, rng = request.param == "soft", np.random.default_rng(0)
    described = Described({"run.seed": 0}, "0" * 64, "resnet10t", None, num_classes=9, topk=3 if soft else 0)
    shape = (50, 3) if soft else (50,)
    LabelWriter(tmp_path, described).write(0, rng.integers(0, 9, shape), rng.normal(size=shape) if soft else None)
    read(tmp_path)
    return tmp_path, tmp_path / ("epoch-0000.npz" if soft else "epoch-0000.npy")


def read(folder):
    labels = LabelCache(folder)
    return labels.logits(0, ENTRIES) if labels.described.topk else labels.labels(0, ENTRIES)


def array(shape, dtype="<u2", data=b""):
    """A file of numpy's whose header claims any shape."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


@pytest.mark.slow
def test_more_than_the_file_holds_is_refused_without_memory(cache):
    folder, file = cache
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    large = bytes(1 << 28)
    for compression, index in (
        (zipfile.ZIP_DEFLATED, array((1 << 27, 1), data=large)),
        (zipfile.ZIP_STORED, array((10**12, 3))),
        (zipfile.ZIP_STORED, array((10**12, 10**12))),
        (zipfile.ZIP_STORED, b"not of numpy"),
    ):
        if file.suffix == ".npz":
            with zipfile.ZipFile(file, "w", compression) as archive:
                archive.writestr("index.npy", index)
                archive.writestr("logits.npy", array((10**12, 3), "<f2"))
        else:
            file.write_bytes(index[:1000])
        vouch(file)
        refused(r"epoch-0000\.np.: not (hard|soft) labels .*: remove it and make it again", read, folder)
    # What this test itself made is in it: the zeros and what they are packed into.
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 3 * 256 + 100


def test_the_machine_is_not_the_labels_damage(cache, monkeypatch):
    folder, file = cache
    for number in (errno.EMFILE, errno.EIO, errno.ESTALE):
        with monkeypatch.context() as broken:
            broken.setattr("fastdeit.teacher.label_cache.open_regular", refusing(number))
            message = refused(r"epoch-0000\.np.: cannot be read: ", read, folder, error=MachineError)
            assert "fastdeit-label" not in message
    read(folder)
    assert file.exists()


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[" + "[]," * (6 << 20) + "0]"])
def test_an_index_that_is_deep_or_long(cache, text):
    folder, _ = cache
    (folder / "labels.json").write_text(text)
    refused(r"labels\.json: damaged .*: make it again with fastdeit-label", LabelCache, folder)


def test_an_epoch_that_is_a_pipe_does_not_hang(cache):
    folder, file = cache
    file.unlink()
    os.mkfifo(file)
    refused(r"no labels for 1 of the run's epochs|is a pipe, not a file", read, folder)


def test_a_full_disk_keeps_what_is_there(cache, monkeypatch):
    folder, _ = cache
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    writer = LabelWriter(folder, LabelCache(folder).described)
    rng, shape = np.random.default_rng(1), (50, 3) if writer._described.topk else (50,)
    with monkeypatch.context() as full:
        full.setattr("fastdeit.teacher.label_cache.os.fsync", refusing(errno.ENOSPC))
        with pytest.raises(MachineError, match="epoch 1: cannot be written: No space left on device"):
            writer.write(1, rng.integers(0, 9, shape), rng.normal(size=shape) if len(shape) == 2 else None)
    assert {name: data for name, data in before.items() if (folder / name).read_bytes() == data} == before
    assert not LabelCache(folder).has(1)
    read(folder)
