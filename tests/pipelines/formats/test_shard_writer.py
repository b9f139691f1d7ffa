"""What is written under which name when, what is taken up, and what is refused, by the writer of tar shards."""

import errno
import os
import shutil
import tarfile
import zlib
from functools import partial

import numpy as np
import pytest

import refusals
from fastdeit.pipelines.formats import shard_writer
from fastdeit.pipelines.formats.beton_layout import JPEG, RAW
from fastdeit.pipelines.formats.shard_layout import ShardError
from fastdeit.pipelines.formats.shard_writer import ShardWriter
from fastdeit.pipelines.formats.shards import ShardDataset
from fastdeit.pipelines.formats.writer import Record
from fastdeit.pipelines.machine import MachineError
from system import run_python
from tiny_datasets import CLASS_NAMES, assert_whole, files, make_samples, write_shards

refused = partial(refusals.refused, error=ShardError)


def record(data, described):
    return Record(size=len(data), crc32=zlib.crc32(data), **described)


def take_up(writer, samples, left):
    """Restore `left` of the samples and write the rest."""
    assert writer.restore(record(*sample) for sample in samples) == left
    for data, described in samples[left:]:
        writer.add(data, **described)
    writer.finish(class_names=CLASS_NAMES, source={"kind": "test"})


@pytest.mark.parametrize(
    ("count", "shard_size", "nodes", "expected"),
    [
        (11, 100, 1, [11]),
        (11, 3, 1, [3, 3, 3, 2]),
        (12, 3, 1, [3, 3, 3, 3]),
        (11, 4, 2, [3, 3, 3, 2]),
        (11, 11, 3, [4, 4, 3]),
        (11, 2, 3, [2, 2, 2, 2, 2, 1]),
    ],
)
def test_shards_and_nodes_are_even(samples, tmp_path, count, shard_size, nodes, expected):
    path = write_shards(tmp_path / "d", make_samples(12)[:count], shard_size=shard_size, nodes=nodes)
    with ShardDataset(path) as dataset:
        assert np.bincount(dataset.shard).tolist() == expected
        each = dataset.sidecar["node_samples"]
    lists = [(path / "nodes" / f"node-{n:03d}.txt").read_text().split() for n in range(nodes)]
    assert sorted(name for names in lists for name in names) == [p.name for p in sorted(path.glob("*.tar"))]
    assert len({len(names) for names in lists}) == 1
    assert max(each) - min(each) <= 1
    for names, share in zip(lists, each, strict=True):
        total = 0
        for name in names:
            with tarfile.open(path / name) as archive:
                total += len([n for n in archive.getnames() if n.endswith(".cls")])
        assert total == share


def test_samples_that_were_rejected_leave_the_last_shards_short(samples, tmp_path):
    path = write_shards(tmp_path / "d", samples[:7], capacity=11, shard_size=3, nodes=2)
    with ShardDataset(path) as dataset:
        assert np.bincount(dataset.shard).tolist() == [3, 3, 1]
        assert dataset.sidecar["node_samples"] == [4, 3]
        assert dataset.check() == []
    assert (path / "nodes/node-001.txt").read_text().split() == ["shard-000001.tar"]


def test_nothing_has_the_name_before_all_is_complete(samples, tmp_path):
    path = tmp_path / "train"
    with ShardWriter(path, 11, shard_size=3) as writer:
        for data, described in samples[:8]:
            writer.add(data, **described)
        assert [p.name for p in tmp_path.iterdir()] == ["train.partial"]
        refused(r"it has no samples\.npy", ShardDataset, tmp_path / "train.partial")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("done", range(12))
def test_an_interrupted_writer_is_taken_up(made_shards, samples, tmp_path, done):
    path, options = tmp_path / "train", {"shard_size": 3, "nodes": 2}
    with ShardWriter(path, 11, **options) as writer:
        writer.keep = True
        for i, (data, described) in enumerate(samples[:done]):
            writer.add(data, **described)
            if i == done // 2:
                writer.flush()
    with ShardWriter(path, 11, **options) as writer:
        take_up(writer, samples, done)
    assert [p.name for p in tmp_path.iterdir()] == ["train"]
    assert files(path) == files(made_shards)


@pytest.mark.parametrize(
    ("name", "place", "left"),
    [
        ("shard-000000.tar", 3, 0),  # the name in the first header
        ("shard-000001.tar", 512 + 10, 3),  # the file of sample 3
        ("shard-000003.tar", -1025, 10),  # the padding of the last label
        ("shard-000003.tar", -1, 11),  # the end, which is written again
        ("shard-000002.idx", 0, 11),  # as is the index
    ],
)
def test_what_is_damaged_is_not_taken_up(made_shards, samples, tmp_path, name, place, left):
    path = tmp_path / "train"
    partial = shutil.copytree(made_shards, tmp_path / "train.partial")
    with open(partial / name, "r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        file.write(b"\1")
    with ShardWriter(path, 11, shard_size=3, nodes=2) as writer:
        take_up(writer, samples, left)
    assert files(path) == files(made_shards)


def test_without_restore_it_begins_anew(made_shards, samples, tmp_path):
    shutil.copytree(made_shards, tmp_path / "train.partial")
    assert files(write_shards(tmp_path / "train", samples, shard_size=3, nodes=2)) == files(made_shards)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_data_set_is_replaced_whole(own, samples, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(shard_writer, "_exchange", lambda *_: False)
    old = ShardDataset(own)
    old.read(0)
    write_shards(own, samples[:2], shard_size=1)
    assert [p.name for p in own.parent.iterdir()] == ["train"]
    assert_whole(own, 2)
    # What is open is still the old data; what would be opened now is not.
    assert old.read(1).tobytes() == samples[1][0]
    refused(r"shard-000001\.tar, sample 3: it was changed or replaced", old.read, 3)
    gone = r"shard-000003\.tar, sample 10: cannot be opened: No such file or directory: it was there"
    refused(gone, old.read, 10, error=MachineError)


def test_files_of_others_are_not_touched(samples, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    write_shards(folder, samples[:1])  # an empty folder is as good as none
    (folder / "letter.txt").write_text("dear")
    refused(r"photos: holds letter\.txt, which is not part of a data set", ShardWriter, folder, 1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "shard-000000.tar").write_bytes(b"somebody's")
    refused(r"other: is not a data set .*it has no samples\.npy\): move it away", ShardWriter, other, 1)
    partial = tmp_path / "new.partial"
    (partial / "nodes").mkdir(parents=True)
    (partial / "nodes" / "mine").write_text("")
    with ShardWriter(tmp_path / "new", 1) as writer:
        refused(r"new\.partial: holds nodes/mine", writer.add, samples[0][0], **samples[0][1])
        refused(r"new\.partial: holds nodes/mine", writer.restore, [])
    assert (partial / "nodes" / "mine").exists()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(folder)
    for name in ("file", "link"):
        refused("is not a folder", ShardWriter, tmp_path / name, 1)
        (tmp_path / f"of-{name}.partial").symlink_to(tmp_path / name)
        with (
            ShardWriter(tmp_path / f"of-{name}", 1) as writer,
            pytest.raises(ShardError, match=r"\.partial: is not a folder"),
        ):
            writer.restore([])


def test_what_cannot_be_stored_is_said(tmp_path):
    good = {"height": 2, "width": 2, "label": 0, "mode": JPEG}
    with ShardWriter(tmp_path / "d", 1) as writer:
        for data, changed, message in [
            (b"", {}, "0 bytes cannot be stored"),
            (b"12", {"mode": RAW}, "2 bytes cannot be stored as 2 x 2"),
            (b"12", {"mode": 2}, "cannot be stored"),
            (b"12", {"width": 65536}, "sides go up to 65535"),
            (b"12", {"height": 0}, "2 x 0 pixels"),
            (b"12", {"label": -1}, "label -1 is negative"),
        ]:
            refused(message, writer.add, data, **{**good, **changed})
        refused("no samples to write", writer.finish, class_names=CLASS_NAMES)
        writer.add(b"12", **good)
        refused("more samples than the 1 announced", writer.add, b"12", **good)
        refused("0 class names, but label 0", writer.finish, class_names=[])
    for capacity, options in [(0, {}), (10**9 + 1, {}), (1, {"shard_size": 0}), (1, {"nodes": 0})]:
        refused(r"give 1 or more|shards hold from 1", ShardWriter, tmp_path / "d", capacity, **options)
    with pytest.raises(ShardError, match=r"5 samples cannot be 6 shards, a multiple of 3 nodes"):
        ShardWriter(tmp_path / "d", 5, shard_size=1, nodes=3)


def test_a_full_disk_leaves_nothing_open(samples, tmp_path):
    program = """
import resource, signal, sys, os
from fastdeit.pipelines.formats.shard_writer import ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
before = len(os.listdir("/proc/self/fd"))
try:
    with ShardWriter(sys.argv[1], 9) as writer:
        for i in range(9):
            writer.add(bytes(300_000), height=100, width=1000, label=0, mode=1)
        writer.finish(class_names=["a"])
except OSError as error:
    assert len(os.listdir("/proc/self/fd")) == before
    print(error.errno)
"""
    done = run_python("-c", program, tmp_path / "d", check=True)
    assert int(done.stdout) == errno.EFBIG
    assert not list(tmp_path.iterdir())
