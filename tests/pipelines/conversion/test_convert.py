"""Conversion, judged by PIL on the very same files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastdeit.pipelines.conversion.convert import convert, sample_order
from fastdeit.pipelines.conversion.encode import CHANGES
from fastdeit.pipelines.conversion.workers import ConvertError
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.sources import SampleError, SourceError
from pictures import encoded, jpeg, picture
from refusals import not_converted
from system import wait_for
from tiny_datasets import Items, files, image_folder, linked


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """40 JPEGs of several sizes in four classes."""
    images = [jpeg(picture(i, (60 + i, 90 - i))) for i in range(40)]
    return image_folder(tmp_path_factory.mktemp("tree"), images, 4)


DAMAGED = (0, 17, 39)  # of damaged_tree's files, in its order


@pytest.fixture(scope="module")
def damaged_tree(tree, tmp_path_factory):
    """The same, three of the files being cut short."""
    root = shutil.copytree(tree, tmp_path_factory.mktemp("damaged") / "tree")
    for i, path in enumerate(sorted(root.rglob("*.jpg"))):
        if i in DAMAGED:
            os.truncate(path, 300)
    return root


def test_jpegs_pass_through_untouched(tree, tmp_path):
    report = convert(tree, tmp_path / "data.beton", progress=False)
    files = sorted(tree.rglob("*.jpg"))
    with BetonDataset(tmp_path / "data.beton") as dataset:
        assert dataset.class_names == ["class0", "class1", "class2", "class3"]
        for i, path in enumerate(files):
            assert dataset.read(i).tobytes() == path.read_bytes()
            assert (dataset.width[i], dataset.height[i]) == Image.open(path).size
            assert dataset.class_names[dataset.label[i]] == path.parent.name
    assert report.counts == {**dict.fromkeys(CHANGES, 0), "passed_through": 40}
    assert (report.num_samples, report.num_classes) == (40, 4)
    assert report.bytes == (tmp_path / "data.beton").stat().st_size
    for word in ("40 images in 4 classes", "40 passed through", str(tree), "samples 40", "images/s"):
        assert word in str(report)


def test_sidecar_says_what_was_done(tree, tmp_path):
    convert(tree, tmp_path / "data.beton", max_side=80, quality=80, shuffle_seed=3, limit=25, progress=False)
    sidecar = json.loads((tmp_path / "data.beton.json").read_text())
    assert sidecar["num_samples"] == 25
    assert sidecar["source"]["path"] == str(tree)
    options = {"mode": "auto", "quality": 80, "max_side": 80, "shuffle_seed": 3, "limit": 25}
    assert sidecar["options"].items() >= options.items()
    counts = sidecar["counts"]
    assert counts["passed_through"] + counts["reencoded"] == 25
    assert counts["reencoded"] == counts["resized"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mode": "jpeg", "max_side": 70, "shuffle_seed": 1}])
def test_workers_change_no_byte(damaged_tree, tmp_path, options):
    options = {**options, "on_error": "skip", "progress": False}
    for workers in (1, 2):
        report = convert(damaged_tree, tmp_path / f"{workers}.beton", workers=workers, **options)
        assert len(report.rejects) == 3
    for suffix in ("beton", "beton.json", "beton.rejects.jsonl"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()


def test_shuffled_order(tree, tmp_path):
    whole, again, other = (sample_order(1000, seed, None) for seed in (1, 1, 2))
    assert sorted(whole) == list(range(1000))
    assert (whole == again).all()
    assert (whole != other).any()
    assert np.abs(np.corrcoef(whole, np.arange(1000))[0, 1]) < 0.1
    assert (sample_order(1000, 1, 10) == whole[:10]).all()
    convert(tree, tmp_path / "data.beton", shuffle_seed=5, limit=30, progress=False)
    files = sorted(tree.rglob("*.jpg"))
    with BetonDataset(tmp_path / "data.beton") as dataset:
        for i, source in enumerate(sample_order(40, 5, 30)):
            assert dataset.read(i).tobytes() == files[source].read_bytes()


GOOD = encoded(picture(0, (90, 60)), "JPEG")


@pytest.mark.parametrize(
    ("bad", "error", "reason"),
    [
        (GOOD[: len(GOOD) // 2], ConvertError, r"item 3, sample 3: cannot be converted: .*truncated"),
        (GOOD[:-2], ConvertError, r"item 3, sample 3: cannot be converted: .*truncated"),
        (GOOD[:200], ConvertError, "item 3, sample 3: cannot be converted"),
        (b"", ConvertError, "item 3, sample 3: cannot be converted: not an image"),
        (b"GIF89a, or so it says", ConvertError, "item 3, sample 3: cannot be converted"),
        (encoded(picture(0, (90, 60)), "PNG")[:-400], ConvertError, "item 3, sample 3: cannot be converted"),
        (OSError("disk on fire"), ConvertError, "sample 3: cannot be converted: disk on fire"),
        (SampleError("item 3: no colour in it"), ConvertError, "sample 3: cannot be converted: no colour in it"),
        (MemoryError(), ConvertError, "item 3, sample 3: memory ran out. Give fewer"),
        (SourceError("the source says so"), SourceError, "the source says so"),
        (Image.new("RGB", (65520, 1)), ConvertError, "sample 3: cannot be converted: .*65500"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_a_failed_conversion_looks_like_none(tmp_path, bad, error, reason, format):
    source, dest = Items([GOOD, GOOD, GOOD, bad, GOOD]), tmp_path / "data"
    not_converted(reason, source, dest, format=format, error=error)
    # What was done is kept, under names that nothing takes for a data set.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.journal", "data.partial"]
    with pytest.raises(UserError):
        open_dataset(tmp_path / "data.partial")
    # An older data set stays as it was.
    convert(Items([GOOD]), dest, format=format, progress=False)
    before = files(tmp_path)
    with pytest.raises(error):
        convert(source, dest, format=format, progress=False)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith(("data.journal", "data.partial")) for name in after.keys() - before.keys())


@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_nothing_is_kept_of_nothing(tmp_path, format):
    for on_error in ("fail", "skip"):
        not_converted("item 0", Items([b"bad", b"too"]), tmp_path / "data", format=format, on_error=on_error)
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_image_in_order_is_named(damaged_tree, tmp_path, workers):
    with pytest.raises(ConvertError, match=r"00\.jpg, sample 0: cannot be converted.*--on-error skip --resume"):
        convert(damaged_tree, tmp_path / "data.beton", workers=workers, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_rejects_are_listed_and_left_out(damaged_tree, tmp_path, format):
    dest = tmp_path / "data"
    report = convert(damaged_tree, dest, format=format, on_error="skip", shuffle_seed=4, progress=False)
    order = sample_order(40, 4, None)
    paths = sorted(damaged_tree.rglob("*.jpg"))
    listed = [json.loads(line) for line in (tmp_path / "data.rejects.jsonl").read_text().splitlines()]
    assert [entry["index"] for entry in listed] == [i for i in order if i in DAMAGED]
    assert [entry["name"] for entry in listed] == [str(paths[entry["index"]]) for entry in listed]
    assert all("truncated" in entry["reason"].lower() for entry in listed)
    assert report.sidecar["rejected"] == [entry["index"] for entry in listed]
    assert (report.num_samples, sum(report.counts[c] for c in ("passed_through", "reencoded"))) == (37, 37)
    for word in ("left out: 3, listed in", "data.rejects.jsonl", str(paths[17])):
        assert word in str(report)
    with open_dataset(dest) as dataset:
        good = [i for i in order if i not in DAMAGED]
        assert [dataset.read(k).tobytes() for k in range(len(dataset))] == [paths[i].read_bytes() for i in good]
        assert [dataset.class_names[label] for label in dataset.label] == [paths[i].parent.name for i in good]
        assert dataset.check() == []
    # A conversion without rejects leaves no list behind.
    convert(Items([GOOD]), dest, format=format, progress=False)
    assert not (tmp_path / "data.rejects.jsonl").exists()


def test_both_formats_hold_the_same(tree, tmp_path):
    hashes = set()
    for format in ("beton", "webdataset"):
        report = convert(tree, tmp_path / format, format=format, max_side=70, shard_size=9, nodes=2, progress=False)
        hashes.add(report.sidecar["content_hash"])
        with open_dataset(tmp_path / format) as dataset:
            assert dataset.content_hash in hashes
    assert len(hashes) == 1
    assert len(list((tmp_path / "webdataset").glob("*.tar"))) == 6


def test_names_and_reasons_that_cannot_be_printed(tmp_path):
    class Odd(Items):
        def name(self, index):
            return f"\udcff\n{index}"

    error = ValueError("bad \x1b[31m <object at 0x7f0123456789>\udc80")
    report = convert(Odd([GOOD, error]), tmp_path / "x.beton", on_error="skip", progress=False)
    (reject,) = report.rejects
    assert (reject.name, reject.reason) == ("\\udcff\\n1", "bad \\x1b[31m <object>\\udc80")
    str(report).encode()


def test_class_names_that_are_no_utf8(tmp_path):
    source = Items([GOOD, GOOD])
    source.class_names = ["caf\udce9", "日本"]
    convert(source, tmp_path / "x.beton", progress=False)
    with open_dataset(tmp_path / "x.beton") as dataset:
        assert dataset.class_names == source.class_names


def test_real_labels_of_what_is_stored(tmp_path):
    class Val(Items):
        def name(self, index):
            return f"val.tar:ILSVRC2012_val_{index + 1:08d}.JPEG"

    lists = [[i, 100 + i] for i in range(6)]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    source = Val([GOOD, GOOD, b"bad", GOOD, GOOD, GOOD])
    options = {"real_labels": tmp_path / "real.json", "shuffle_seed": 7, "on_error": "skip", "progress": False}
    report = convert(source, tmp_path / "val.beton", **options)
    assert report.sidecar["real_labels"] == [lists[i] for i in sample_order(6, 7, None) if i != 2]
    with pytest.raises(SourceError, match="not one of ILSVRC2012's val images"):
        convert(Items([GOOD]), tmp_path / "other.beton", **options)
    assert not list(tmp_path.glob("other*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_conversion_can_go_on(tree, out, tmp_path, number, status):
    """Ctrl-C reaches the whole process group of a terminal, a request to terminate the first process."""
    many = linked(tree / "class3" / "39.jpg", tmp_path / "many", 8000, 4)
    command = [sys.executable, "-m", "fastdeit.commands.convert", str(many), str(out / "x.beton"), "--mode", "jpeg"]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    # The journal begins with a description; its next line says that images are safe. Others are pending then.
    journal = out / "x.beton.journal"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 2, process)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert sorted(path.name for path in out.iterdir()) == ["x.beton.journal", "x.beton.partial"]
    kept = int(re.search(r"x\.beton: (\d+) of 8000 images are kept; continue with --resume", err)[1])
    report = convert(many, out / "x.beton", mode="jpeg", resume=True, progress=False)
    assert 0 < kept == 8000 - report.done
    assert f"continued after {kept} images" in report.notes[0]
    assert sorted(path.name for path in out.iterdir()) == ["x.beton", "x.beton.json"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "png"}, "not one of auto, jpeg, raw"),
        ({"quality": 0}, "quality 0"),
        ({"max_side": 0}, "max_side 0"),
        ({"workers": -1}, "-1 workers"),
        ({"limit": 0}, "limit 0"),
        ({"shuffle_seed": -1}, "shuffle seed -1"),
        ({"class_names": ["class0"]}, "class 'class1' is not in the list"),
        ({"format": "zip"}, "format 'zip' is not one of beton, webdataset"),
        ({"on_error": "ignore"}, "on_error 'ignore' is not one of fail, skip"),
        ({"real_labels": "none.json"}, "none.json"),
    ],
)
def test_mistaken_options(tree, tmp_path, options, reason):
    not_converted(reason, tree, tmp_path / "data.beton", **options, error=(UserError, FileNotFoundError))
    assert not list(tmp_path.iterdir())


def test_mistaken_destinations(tree, tmp_path):
    not_converted("does not exist: create it first", tree, tmp_path / "none" / "data.beton")
    not_converted("is a folder: name a file", tree, tmp_path)
    not_converted("give class_names to open_source", Items([GOOD]), tmp_path / "data.beton", class_names=["a"])
    not_converted("holds no images", Items([]), tmp_path / "data.beton")


def test_places_within_the_source(tree, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(tree, root)
    for dest in (root, root / "train", root / "class0" / "train", tmp_path / "root" / ".." / "root" / "train"):
        for format in ("beton", "webdataset"):
            not_converted(r"lies within the source .*root: name a place outside", root, dest, format=format)
    convert(root, tmp_path / "shards", format="webdataset", progress=False)
    not_converted("lies within", tmp_path / "shards", tmp_path / "shards" / "again", format="webdataset")
    # One more file beside tar files makes no other source of them.
    convert(tmp_path / "shards", tmp_path / "shards" / "all.beton", progress=False)
    assert sorted(path.name for path in root.iterdir()) == [f"class{i}" for i in range(4)]


def test_labels_must_have_names(tmp_path):
    source = Items([GOOD] * 3, class_names=None)
    report = convert(source, tmp_path / "data.beton", progress=False)
    assert report.sidecar["class_names"] == ["0", "1", "2"]
    source.class_names = ["a", "b"]
    unnamed = "item 2, sample 2: cannot be converted: label 2 names no class, there are 2"
    not_converted(unnamed, source, tmp_path / "data.beton")
    # Without names each label below it would get one.
    source.class_names = None
    for label in (1 << 20, 10**17, 10**30, -1):
        source.read = lambda index, label=label: (GOOD, label, f"item {index}")
        not_converted(f"label {label} names no class, labels go up to 1048575", source, tmp_path / "data.beton")
