"""Tar shards, judged by those who read such files: webdataset, DALI and its wds2idx, tarfile, GNU tar and PIL."""

import io
import os
import pickle
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import refusals
from fastdeit.pipelines.formats import shards
from fastdeit.pipelines.formats.beton_layout import JPEG, MIN_PAGE, RAW
from fastdeit.pipelines.formats.beton_writer import BetonWriter
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.formats.shard_layout import ShardError
from fastdeit.pipelines.formats.shards import ShardDataset
from fastdeit.pipelines.formats.sidecar import SidecarError
from system import run
from tiny_datasets import CLASS_NAMES, files, write_shards

refused = partial(refusals.refused, error=ShardError)


def decoded(data, described):
    if described["mode"] == RAW:
        return np.frombuffer(data, np.uint8).reshape(described["height"], described["width"], 3)
    return np.asarray(Image.open(io.BytesIO(data)))


def open_files(folder):
    """Files below `folder` that this process has open."""
    links = [f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.exists(link) and str(folder) in os.readlink(link)]


def tars(folder):
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def test_webdataset_reads_them(made_shards, samples):
    webdataset = pytest.importorskip("webdataset")
    read = list(webdataset.WebDataset(tars(made_shards), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in read] == [f"{i:09d}" for i in range(11)]
    assert [sample["cls"] for sample in read] == [described["label"] for _, described in samples]
    for sample, (data, described) in zip(read, samples, strict=True):
        image = sample["jpg" if described["mode"] == JPEG else "ppm"]
        assert np.array_equal(np.asarray(image), decoded(data, described))


@pytest.mark.slow
@pytest.mark.parametrize("indexed", [True, False])
def test_dali_reads_them(made_shards, samples, indexed):
    dali = pytest.importorskip("nvidia.dali")

    @dali.pipeline_def(batch_size=11, num_threads=1, device_id=None)
    def pipeline():
        index = {"index_paths": [tar.replace(".tar", ".idx") for tar in tars(made_shards)]} if indexed else {}
        images, labels = dali.fn.readers.webdataset(paths=tars(made_shards), ext=["jpg;ppm", "cls"], **index)
        return images, dali.fn.decoders.image(images, device="cpu"), labels

    pipe = pipeline()
    pipe.build()
    stored, images, labels = pipe.run()
    for i, (data, described) in enumerate(samples):
        assert bytes(np.asarray(stored.at(i))).endswith(data)
        assert int(bytes(np.asarray(labels.at(i)))) == described["label"]
        image = np.asarray(images.at(i)).astype(int)
        assert image.shape == (described["height"], described["width"], 3)
        # Nothing differs where DALI and PIL are built with one version of libjpeg-turbo.
        bound = 0 if described["mode"] == RAW else 4
        assert np.abs(image - decoded(data, described)).max() <= bound


def test_the_index_is_that_of_dalis_script(made_shards, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="comes with nvidia-dali")
    for tar in tars(made_shards):
        with wds2idx.IndexCreator(tar, str(tmp_path / "index"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "index").read_bytes() == Path(tar).with_suffix(".idx").read_bytes()


def test_tarfile_and_tar_list_them(made_shards, samples):
    with tarfile.open(made_shards / "shard-000001.tar") as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == [
            "000000003.jpg", "000000003.cls", "000000004.jpg", "000000004.cls", "000000005.ppm", "000000005.cls"
        ]  # fmt: skip
        for member in members:
            assert member.isreg()
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")
        assert archive.extractfile(members[2]).read() == samples[4][0]
        assert archive.extractfile(members[3]).read() == str(samples[4][1]["label"]).encode()
        image = Image.open(archive.extractfile(members[4]))
        assert image.format == "PPM"
        assert image.tobytes() == samples[5][0]
    listed = run("tar", "-tf", made_shards / "shard-000001.tar", check=True)
    assert listed.stdout.split() == [m.name for m in members]
    assert listed.stderr == ""


def test_the_header_is_the_one_tarfile_writes(made_shards):
    name = made_shards / "shard-000000.tar"
    with tarfile.open(name) as archive:
        first = archive.getmembers()[0]
    assert name.read_bytes()[:512] == first.tobuf(tarfile.USTAR_FORMAT)


def test_samples_come_back(made_shards, samples):
    with open_dataset(made_shards) as dataset:
        assert isinstance(dataset, ShardDataset)
        assert len(dataset) == 11
        assert dataset.class_names == CLASS_NAMES
        assert dataset.num_classes == 1000
        assert dataset.sidecar["source"] == {"kind": "test"}
        assert dataset.shard.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
        for i in np.random.default_rng(0).permutation(11).tolist():
            data, described = samples[i]
            stored = dataset.read(i)
            assert stored.tobytes() == data
            assert not stored.flags.writeable
            assert dataset.is_jpeg(i) == (described["mode"] == JPEG)
            assert (dataset.height[i], dataset.width[i]) == (described["height"], described["width"])
            assert dataset.label[i] == described["label"]
        assert [a.dtype for a in (dataset.height, dataset.width, dataset.label)] == ["int32", "int32", "int64"]
        assert dataset.check() == []
        refused("no sample 11, only 0 to 10", dataset.read, 11, error=IndexError)
        with pytest.raises(IndexError):
            dataset.is_jpeg(-1)
    refused("sample 0 was requested after the data set was closed", dataset.read, 0, error=ValueError)


def test_both_formats_have_one_content_hash(made_shards, samples, tmp_path):
    with BetonWriter(tmp_path / "train.beton", len(samples), page_size=MIN_PAGE) as writer:
        for data, described in samples:
            writer.add(data, **described)
        beton = writer.finish(class_names=CLASS_NAMES)
    shard = ShardDataset(made_shards).sidecar
    assert shard["content_hash"] == beton["content_hash"]
    assert shard["crc32"] == beton["crc32"]


def test_pickled_it_is_opened_by_its_path(made_shards, samples):
    again = pickle.loads(pickle.dumps(ShardDataset(made_shards)))
    assert [again.read(i).tobytes() for i in range(11)] == [data for data, _ in samples]


def test_threads_share_few_open_files(made_shards, samples, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 1)
    dataset = ShardDataset(made_shards)
    order = np.random.default_rng(1).integers(0, 11, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: dataset.read(i).tobytes() == samples[i][0], order))
    assert len(open_files(made_shards)) == 1
    dataset.close()
    assert open_files(made_shards) == []


def test_cut_short_under_the_reader(own):
    dataset = ShardDataset(own)
    dataset.read(0)
    os.truncate(own / "shard-000000.tar", int(dataset.offset[1]) + 5)
    refused(r"shard-000000\.tar, sample 1: .* 5 of \d+ bytes are left", dataset.read, 1)
    refused(r"shard-000000\.tar, sample 2: .* 0 of", dataset.read, 2)
    assert dataset.read(3).size
    os.truncate(own / "shard-000002.tar", 100)
    refused(r"shard-000002\.tar, sample 6: it was changed", dataset.read, 6)


def test_what_is_missing_is_named(own, tmp_path):
    refused(r"is not a data set of fastdeit-convert: it has no samples\.npy", open_dataset, tmp_path)
    with open(own / "shard-000001.tar", "ab") as file:
        file.write(b"\0")
    refused(r"shard-000001\.tar: it has \d+ bytes instead of \d+", ShardDataset, own)
    (own / "shard-000001.tar").unlink()
    refused(r"shard-000001\.tar: it is missing", ShardDataset, own)


def test_without_sidecar_there_are_no_names(own):
    (own / "dataset.json").unlink()
    with ShardDataset(own) as dataset:
        assert dataset.sidecar is dataset.class_names is dataset.content_hash is None
        assert dataset.num_classes == dataset.label.max() + 1
        assert dataset.check() == []


def test_check_names_what_is_missing_or_too_much(own, samples):
    dataset = ShardDataset(own)
    (own / "shard-000001.idx").unlink()
    (own / "shard-000009.tar").write_bytes(b"")
    (own / "nodes" / "node-002.txt").write_bytes(b"")
    found = dataset.check()
    assert len(found) == 3
    for name, sentence in zip(("shard-000001.idx", "shard-000009.tar", "nodes"), found, strict=True):
        assert re.search(rf"{name}: it ", sentence)
    write_shards(own, samples[:3])
    assert dataset.check() == [f"{own}: it was changed or replaced since the data set was opened"]


@pytest.mark.slow
def test_a_flipped_bit_is_found_wherever_it_is(own, samples):
    """In a sample's own bytes its crc32 tells, which the sidecar holds; everywhere else opening or `check`."""
    original = files(own)
    with ShardDataset(own) as dataset:
        inside = {name: np.zeros(len(data), bool) for name, data in original.items()}
        for shard, offset, size in zip(dataset.shard, dataset.offset, dataset.size, strict=True):
            inside[f"shard-{shard:06d}.tar"][offset : offset + size] = True
    rng = np.random.default_rng(0)
    for name, data in original.items():
        outside = np.flatnonzero(~inside[name])
        for place in rng.choice(outside, min(len(outside), 60), replace=False).tolist():
            changed = bytearray(data)
            changed[place] ^= 1 << int(rng.integers(8))
            (own / name).write_bytes(changed)
            try:
                with ShardDataset(own) as dataset:
                    found = dataset.check()
            except (ShardError, SidecarError) as error:
                found = [str(error)]
            # A table that no longer fits says so where it does not fit: at the sidecar or at a shard.
            named = own if name == "samples.npy" else own / name.split("/")[0]
            assert any(str(named) in sentence for sentence in found), (name, place, found)
        (own / name).write_bytes(data)
    assert ShardDataset(own).check() == []
