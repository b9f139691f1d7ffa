"""Tar shards, judged by those who read such files: webdataset, DALI and its wds2idx, tarfile, GNU tar and PIL."""

import errno
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastdeit.pipelines import shard_writer, shards
from fastdeit.pipelines.beton import JPEG, MIN_PAGE, RAW, BetonWriter
from fastdeit.pipelines.dataset import open_dataset
from fastdeit.pipelines.shards import ShardDataset, ShardError, ShardWriter
from fastdeit.pipelines.sidecar import SidecarError
from fastdeit.pipelines.writing import Record

NAMES = [f"class {i}" for i in range(1000)]


def make_samples(count):
    """`add` arguments of JPEG files and, every third, of raw pixels; the sizes leave every kind of padding."""
    rng = np.random.default_rng(count)
    samples = []
    for i in range(count):
        height, width = (int(side) for side in rng.integers(9, 110, 2))
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image, mode = noise.filter(ImageFilter.GaussianBlur(2)), RAW if i % 3 == 2 else JPEG
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92)
        data = image.tobytes() if mode == RAW else file.getvalue()
        samples.append((data, {"height": height, "width": width, "label": int(rng.integers(1000)), "mode": mode}))
    return samples


def record(data, described):
    return Record(size=len(data), crc32=zlib.crc32(data), **described)


def write(path, samples, *, capacity=None, **options):
    with ShardWriter(path, capacity or len(samples), **options) as writer:
        for data, described in samples:
            writer.add(data, **described)
        writer.finish(class_names=NAMES, source={"kind": "test"})
    return path


def files(folder):
    """Every file below `folder` and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def decoded(data, described):
    if described["mode"] == RAW:
        return np.frombuffer(data, np.uint8).reshape(described["height"], described["width"], 3)
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def samples():
    return make_samples(11)


@pytest.fixture(scope="module")
def made(samples, tmp_path_factory):
    """Eleven samples in shards of 3, 3, 3 and 2, for two nodes. Not to be changed."""
    return write(tmp_path_factory.mktemp("shards") / "train", samples, shard_size=3, nodes=2)


@pytest.fixture
def own(made, tmp_path):
    """A copy of `made` that may be changed."""
    return shutil.copytree(made, tmp_path / "train")


def open_files(folder):
    """Files below `folder` that this process has open."""
    links = [f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.exists(link) and str(folder) in os.readlink(link)]


def tars(folder):
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def test_webdataset_reads_them(made, samples):
    webdataset = pytest.importorskip("webdataset")
    read = list(webdataset.WebDataset(tars(made), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in read] == [f"{i:09d}" for i in range(11)]
    assert [sample["cls"] for sample in read] == [described["label"] for _, described in samples]
    for sample, (data, described) in zip(read, samples, strict=True):
        image = sample["jpg" if described["mode"] == JPEG else "ppm"]
        assert np.array_equal(np.asarray(image), decoded(data, described))


@pytest.mark.parametrize("indexed", [True, False])
def test_dali_reads_them(made, samples, indexed):
    dali = pytest.importorskip("nvidia.dali")

    @dali.pipeline_def(batch_size=11, num_threads=1, device_id=None)
    def pipeline():
        index = {"index_paths": [tar.replace(".tar", ".idx") for tar in tars(made)]} if indexed else {}
        images, labels = dali.fn.readers.webdataset(paths=tars(made), ext=["jpg;ppm", "cls"], **index)
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


def test_the_index_is_that_of_dalis_script(made, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="comes with nvidia-dali")
    for tar in tars(made):
        with wds2idx.IndexCreator(tar, str(tmp_path / "index"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "index").read_bytes() == Path(tar).with_suffix(".idx").read_bytes()


def test_tarfile_and_tar_list_them(made, samples):
    with tarfile.open(made / "shard-000001.tar") as archive:
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
    listed = subprocess.run(["tar", "-tf", made / "shard-000001.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [m.name for m in members]
    assert listed.stderr == ""


def test_the_header_is_the_one_tarfile_writes(made):
    name = made / "shard-000000.tar"
    with tarfile.open(name) as archive:
        first = archive.getmembers()[0]
    assert name.read_bytes()[:512] == first.tobuf(tarfile.USTAR_FORMAT)


def test_samples_come_back(made, samples):
    with open_dataset(made) as dataset:
        assert isinstance(dataset, ShardDataset)
        assert len(dataset) == 11
        assert dataset.class_names == NAMES
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
        with pytest.raises(IndexError, match="no sample 11, only 0 to 10"):
            dataset.read(11)
        with pytest.raises(IndexError):
            dataset.is_jpeg(-1)
    with pytest.raises(ValueError, match="sample 0 asked for after the data set was closed"):
        dataset.read(0)


def test_both_formats_have_one_content_hash(made, samples, tmp_path):
    with BetonWriter(tmp_path / "train.beton", len(samples), page_size=MIN_PAGE) as writer:
        for data, described in samples:
            writer.add(data, **described)
        beton = writer.finish(class_names=NAMES)
    shard = ShardDataset(made).sidecar
    assert shard["content_hash"] == beton["content_hash"]
    assert shard["crc32"] == beton["crc32"]


def test_pickled_it_is_opened_by_its_path(made, samples):
    again = pickle.loads(pickle.dumps(ShardDataset(made)))
    assert [again.read(i).tobytes() for i in range(11)] == [data for data, _ in samples]


def test_threads_share_few_open_files(made, samples, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 1)
    dataset = ShardDataset(made)
    order = np.random.default_rng(1).integers(0, 11, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: dataset.read(i).tobytes() == samples[i][0], order))
    assert len(open_files(made)) == 1
    dataset.close()
    assert open_files(made) == []


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
    path = write(tmp_path / "d", make_samples(12)[:count], shard_size=shard_size, nodes=nodes)
    with ShardDataset(path) as dataset:
        assert np.bincount(dataset.shard).tolist() == expected
        each = dataset.sidecar["node_samples"]
    lists = [(path / "nodes" / f"node-{n:03d}.txt").read_text().split() for n in range(nodes)]
    assert sorted(name for names in lists for name in names) == [os.path.basename(tar) for tar in tars(path)]
    assert len({len(names) for names in lists}) == 1
    assert max(each) - min(each) <= 1
    for names, share in zip(lists, each, strict=True):
        total = 0
        for name in names:
            with tarfile.open(path / name) as archive:
                total += len([n for n in archive.getnames() if n.endswith(".cls")])
        assert total == share


def test_samples_that_were_rejected_leave_the_last_shards_short(samples, tmp_path):
    path = write(tmp_path / "d", samples[:7], capacity=11, shard_size=3, nodes=2)
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
        with pytest.raises(ShardError, match=r"it has no samples\.npy"):
            ShardDataset(tmp_path / "train.partial")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("done", range(12))
def test_an_interrupted_writer_is_taken_up(made, samples, tmp_path, done):
    path, options = tmp_path / "train", {"shard_size": 3, "nodes": 2}
    with ShardWriter(path, 11, **options) as writer:
        writer.keep = True
        for i, (data, described) in enumerate(samples[:done]):
            writer.add(data, **described)
            if i == done // 2:
                writer.flush()
    with ShardWriter(path, 11, **options) as writer:
        assert writer.restore(record(*sample) for sample in samples) == done
        for data, described in samples[done:]:
            writer.add(data, **described)
        writer.finish(class_names=NAMES, source={"kind": "test"})
    assert [p.name for p in tmp_path.iterdir()] == ["train"]
    assert files(path) == files(made)


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
def test_what_is_damaged_is_not_taken_up(made, samples, tmp_path, name, place, left):
    path = tmp_path / "train"
    partial = shutil.copytree(made, tmp_path / "train.partial")
    with open(partial / name, "r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        file.write(b"\1")
    with ShardWriter(path, 11, shard_size=3, nodes=2) as writer:
        assert writer.restore(record(*sample) for sample in samples) == left
        for data, described in samples[left:]:
            writer.add(data, **described)
        writer.finish(class_names=NAMES, source={"kind": "test"})
    assert files(path) == files(made)


def test_without_restore_it_begins_anew(made, samples, tmp_path):
    shutil.copytree(made, tmp_path / "train.partial")
    assert files(write(tmp_path / "train", samples, shard_size=3, nodes=2)) == files(made)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_data_set_is_replaced_whole(own, samples, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(shard_writer, "_exchange", lambda *_: False)
    old = ShardDataset(own)
    old.read(0)
    write(own, samples[:2], shard_size=1)
    assert [p.name for p in own.parent.iterdir()] == ["train"]
    with ShardDataset(own) as new:
        assert len(new) == 2
        assert new.check() == []
    # What is open is still the old data; what would be opened now is not.
    assert old.read(1).tobytes() == samples[1][0]
    with pytest.raises(ShardError, match=r"shard-000001\.tar, sample 3: it was changed or replaced"):
        old.read(3)
    with pytest.raises(ShardError, match=r"shard-000003\.tar, sample 10: it cannot be opened"):
        old.read(10)


def test_files_of_others_are_not_touched(samples, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    write(folder, samples[:1])  # an empty folder is as good as none
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(ShardError, match=r"photos: holds letter\.txt, which is not of a data set"):
        ShardWriter(folder, 1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "shard-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(ShardError, match=r"other: holds shard-000000\.tar, but no data set"):
        ShardWriter(other, 1)
    partial = tmp_path / "new.partial"
    (partial / "nodes").mkdir(parents=True)
    (partial / "nodes" / "mine").write_text("")
    with ShardWriter(tmp_path / "new", 1) as writer:
        with pytest.raises(ShardError, match=r"new\.partial: holds nodes/mine"):
            writer.add(samples[0][0], **samples[0][1])
        with pytest.raises(ShardError, match=r"new\.partial: holds nodes/mine"):
            writer.restore([])
    assert (partial / "nodes" / "mine").exists()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(folder)
    for name in ("file", "link"):
        with pytest.raises(ShardError, match="is not a folder"):
            ShardWriter(tmp_path / name, 1)


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
            with pytest.raises(ShardError, match=message):
                writer.add(data, **{**good, **changed})
        with pytest.raises(ShardError, match="no samples to write"):
            writer.finish(class_names=NAMES)
        writer.add(b"12", **good)
        with pytest.raises(ShardError, match="more samples than the 1 announced"):
            writer.add(b"12", **good)
        with pytest.raises(ShardError, match="0 class names, but label 0"):
            writer.finish(class_names=[])
    for capacity, options in [(0, {}), (10**9 + 1, {}), (1, {"shard_size": 0}), (1, {"nodes": 0})]:
        with pytest.raises(ShardError, match=r"give 1 or more|shards hold from 1"):
            ShardWriter(tmp_path / "d", capacity, **options)
    with pytest.raises(ShardError, match=r"5 samples cannot be 6 shards, a multiple of 3 nodes"):
        ShardWriter(tmp_path / "d", 5, shard_size=1, nodes=3)


def test_a_full_disk_leaves_nothing_open(samples, tmp_path):
    program = """
import resource, signal, sys, os
from fastdeit.pipelines.shards import ShardWriter
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
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "d"], capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_cut_short_under_the_reader(own):
    dataset = ShardDataset(own)
    dataset.read(0)
    os.truncate(own / "shard-000000.tar", int(dataset.offset[1]) + 5)
    with pytest.raises(ShardError, match=r"shard-000000\.tar, sample 1: .* 5 of \d+ bytes are left"):
        dataset.read(1)
    with pytest.raises(ShardError, match=r"shard-000000\.tar, sample 2: .* 0 of"):
        dataset.read(2)
    assert dataset.read(3).size
    os.truncate(own / "shard-000002.tar", 100)
    with pytest.raises(ShardError, match=r"shard-000002\.tar, sample 6: it was changed"):
        dataset.read(6)


def test_what_is_missing_is_named(own, tmp_path):
    with pytest.raises(ShardError, match=r"is not a data set of fastdeit-convert: it has no samples\.npy"):
        open_dataset(tmp_path)
    with open(own / "shard-000001.tar", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ShardError, match=r"shard-000001\.tar: it has \d+ bytes instead of \d+"):
        ShardDataset(own)
    (own / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar: it is missing"):
        ShardDataset(own)


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
    write(own, samples[:3])
    assert dataset.check() == [f"{own}: it was changed or replaced since the data set was opened"]


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
