"""WebDataset shards, judged by the webdataset package, and parquet files, judged by PyArrow."""

import gzip
import json
import pickle

import numpy as np
import pytest

from archives import hugging_face, jpeg, pack, refused
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.sources import SampleError, SourceError, open_source
from fastdeit.pipelines.sources.parquet import CACHED

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
wds = pytest.importorskip("webdataset")


SHARDS = [
    [
        ("n01/a_1.jpg", b"one"),
        ("n01/a_1.cls", b"3"),
        ("n01/a_2.cls", b"4\n"),
        ("n01/a_2.json", b'{"label": 9}'),
        ("n01/a_2.PNG", b"two"),
        ("n02/a_1.jpeg", b"three"),
        ("n02/a_1.json", b'{"label": 5, "class": 7}'),
    ],
    [("x.img.webp", b"four"), ("x.cls", b"0"), ("x.txt", b"a caption"), ("y.jpg", b"five"), ("y.cls", b" 1 ")],
]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i, files in enumerate(SHARDS):
        pack(folder / f"train-{i:04d}.tar", files)
    return folder


@pytest.mark.parametrize("form", ["{}", "webdataset:{}", "{}/train-{{0000..0001}}.tar", "webdataset:{}/train-*.tar"])
def test_webdataset_is_that_packages(shards, form):
    source = open_source(form.format(shards))
    urls = [str(path) for path in sorted(shards.iterdir())]
    judge = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(source) == len(judge) == 5
    source = pickle.loads(pickle.dumps(source))
    for i, sample in enumerate(judge):
        image = next(sample[kind] for kind in ("jpg", "jpeg", "png", "img.webp") if kind in sample)
        label = int(sample["cls"]) if "cls" in sample else json.loads(sample["json"])["label"]
        data, ours, name = source.read(i)
        assert (data, ours, name) == (image, label, source.name(i))
        assert name.startswith(f"{sample['__url__']}:{sample['__key__']}.")
    assert source.class_names is None
    described = {"shards": 2, "incomplete_samples": 0, "other_members": 2, "hidden_files": 0}
    assert source.describe().items() >= described.items()


def test_webdataset_key_of_the_label(shards):
    source = open_source(f"webdataset:{shards}#label=class", class_names=[str(i) for i in range(10)])
    assert source.read(2)[1] == 7
    assert source.class_names == [str(i) for i in range(10)]
    refused(r"unknown option 'key=x'; it understands #label=", f"webdataset:{shards}#key=x")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.cls", b"1")], "a: no image in this sample; the members of a sample share their name up to its first dot"),
        ([("a.jpg", b"x")], "a.jpg: no .cls or .json with its label in this sample; the members"),
        ([("a.jpg", b"x"), ("a.cls", b"one")], r"its .cls holds b'one'"),
        ([("a.jpg", b"x"), ("a.cls", b"")], "its .cls holds b''"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 4000)], "its .cls holds"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "its .json cannot be read"),
        ([("a.jpg", b"x"), ("a.json", b"[1]")], "its .json holds no 'label'"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": "cat"}')], "is 'cat', not the number"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": 1.0}')], "not the number"),
        ([("a.jpg", b"x"), ("a.json", b" " * (2 << 20))], "a label of 2097152 bytes"),
    ],
)
def test_incomplete_samples_are_the_samples_fault(shards, files, reason):
    path = pack(shards / "train-0001.tar", [*files, *SHARDS[1]])
    source = open_source(shards)
    with pytest.raises(SampleError, match=reason) as error:
        source.read(3)
    assert f"{path}:a" in str(error.value)
    assert source.read(4)[0] == b"four"
    assert source.describe()["incomplete_samples"] == ("in this sample" in str(error.value))


def test_every_image_of_names_with_dots_is_named(shards, tmp_path):
    """All of a key are one sample to the webdataset package, and four images that somebody meant to convert."""
    keys = [*(f"n01.part{i}" for i in range(4)), "x"]
    kinds = (("jpg", jpeg()), ("cls", b"1"))
    path = pack(shards / "train-0001.tar", [(f"{key}.{kind}", data) for key in keys for kind, data in kinds])
    judge = list(wds.WebDataset([str(path)], shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in judge] == ["n01", "x"]
    report = convert(f"webdataset:{path}", tmp_path / "x", on_error="skip", progress=False)
    assert report.num_samples == 1
    assert [reject.name for reject in report.rejects] == [f"{path}:n01.part{i}.jpg" for i in range(4)]
    assert {reject.reason for reject in report.rejects} == {
        "one of several images in a sample; the members of a sample share their name up to its first dot. Rename them"
    }
    assert report.sidecar["source"]["incomplete_samples"] == 4


def test_scattered_samples_and_damaged_shards_are_refused(shards):
    path = pack(shards / "train-0001.tar", [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1"), ("b.cls", b"1")])
    refused(r"0001.tar:a.cls: does not lie with the rest of its sample", shards)
    path.write_bytes(path.read_bytes()[:1024])
    refused(r"0001.tar: ends at byte 1024", shards)
    pack(path, [])
    pack(shards / "train-0000.tar", [])
    refused("no samples in it", shards)


def test_splits_and_patterns(shards, tmp_path):
    pack(shards / "val-0000.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    assert (len(open_source(shards, "train")), len(open_source(shards, "val"))) == (5, 1)
    for text, split, reason in [
        (shards, None, "holds the splits train, val: choose one with --split"),
        (shards, "test", "no .*tar files of the split 'test'; found: train, val"),
        (f"{shards}/train-{{0000..0002}}.tar", None, r"train-0002.tar: there is no such file, of the 3"),
        (f"{shards}/train-{{0002..0000}}.tar", None, "counts down"),
        (f"{shards}/train-{{0..99999999999}}.tar", None, "more than 1000000 files"),
        (f"{shards}/other-*.tar", None, "no such file"),
        (f"{shards}/train-*.tar", "train", "leave out --split"),
        (f"webdataset:{tmp_path / 'nowhere'}", None, "there is no such file or folder"),
        ("webdataset:", None, "names no file or folder"),
    ]:
        refused(reason, text, split)


def test_gzipped_shards_are_refused(shards):
    (shards / "train-0000.tar").write_bytes(gzip.compress(b"x"))
    refused(r"train-0000.tar: is gzipped.*gunzip it first", shards)


def images(count, start=0):
    return [{"bytes": f"image {start + i}".encode() * 20, "path": f"{i}.jpg"} for i in range(count)]


@pytest.fixture
def parquet(tmp_path):
    """Two files of train and one of validation, with three rows a group."""
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for i, (split, count) in enumerate([("train", 10), ("train", 4), ("validation", 5)]):
        table = hugging_face(
            {"image": images(count, 100 * i), "label": [j % 2 for j in range(count)], "size": ["s"] * count},
            ["cat", "dog"],
        )
        pq.write_table(table, folder / f"{split}-{i:05d}-of-00003.parquet", row_group_size=3)
    return folder.parent


@pytest.mark.parametrize("form", ["{}", "parquet:{}", "parquet:{}#image=image,label=label"])
def test_parquet_is_pyarrows(parquet, form):
    source = pickle.loads(pickle.dumps(open_source(form.format(parquet), "train")))
    files = sorted((parquet / "data").glob("train*"))
    judge = [(str(path), i, row) for path in files for i, row in enumerate(pq.read_table(path).to_pylist())]
    assert len(source) == len(judge) == 14
    assert source.class_names == ["cat", "dog"]
    order = [*range(14), *np.random.default_rng(0).permutation(14).tolist()]
    for i in order:
        path, row, values = judge[i]
        assert source.read(i) == (values["image"]["bytes"], values["label"], f"{path}[{row}]")
        assert source.name(i) == f"{path}[{row}]"
    assert source.describe().items() >= {"files": 2, "image_column": "image", "label_column": "label"}.items()


def test_parquet_reads_a_row_group_once_in_order(parquet, monkeypatch):
    groups = []
    original = pq.ParquetFile.iter_batches

    def counted(self, **options):
        groups.extend(options["row_groups"])
        return original(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    source = open_source(parquet, "train")
    for i in range(14):
        source.read(i)
    assert groups == [0, 1, 2, 3, 0, 1]
    assert len(source._cursors) == CACHED


def test_parquet_of_plain_binary(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table({"jpeg": [b"a", b"b"], "y": pyarrow.array([1, 0], pyarrow.uint8())}), path)
    source = open_source(path)
    assert [source.read(i)[:2] for i in range(2)] == [(b"a", 1), (b"b", 0)]
    assert source.class_names is None
    assert open_source(path, class_names=["x", "y"]).class_names == ["x", "y"]


def test_parquet_columns_are_chosen_or_named(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"img": images(2), "fine": [1, 2], "coarse": [0, 0], "mask": images(2, 50)}
    pq.write_table(hugging_face(columns), path)
    source = open_source(f"parquet:{path}#image=mask,label=coarse")
    assert source.read(1)[:2] == (columns["mask"][1]["bytes"], 0)
    for text, reason in [
        (path, "2 image columns: name one with #image=COLUMN. Columns: img .*fine .int64"),
        (f"parquet:{path}#image=img", "2 label columns: name one with #label=COLUMN"),
        (f"parquet:{path}#image=fine", "'fine' is no image column"),
        (f"parquet:{path}#image=img,label=nowhere", "'nowhere' is no label column"),
        (f"parquet:{path}#image", "unknown option 'image'"),
    ]:
        refused(reason, text)
    pq.write_table(hugging_face({"image": images(2), "label": [1, 0], "width": [8, 8]}, ["a", "b"]), path)
    assert open_source(path).read(0)[1] == 1
    pq.write_table(pyarrow.table({"label": [1]}), path)
    refused("no image columns", path)


def test_parquet_rows_without_image_or_label(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [None, {"bytes": None, "path": "elsewhere.jpg"}, *({"bytes": data, "path": None} for data in (b"x", b"y"))]
    pq.write_table(hugging_face({"image": rows, "label": [0, 1, None, 3]}), path)
    source = open_source(path)
    for i, reason in enumerate(["'image' holds no image's bytes", "'image' holds no image's bytes", "holds no label"]):
        with pytest.raises(SampleError, match=reason) as error:
            source.read(i)
        assert f"{path}[{i}]" in str(error.value)
    assert source.read(3)[:2] == (rows[3]["bytes"], 3)


def test_parquet_files_must_agree(parquet):
    first, other = sorted((parquet / "data").glob("train*"))
    table = pq.read_table(other)
    pq.write_table(table.rename_columns(["picture", "label", "size"]), other)
    refused(r"train-00001.*columns or class names differ from those of .*train-00000", parquet, "train")
    pq.write_table(hugging_face({"image": images(1), "label": [0]}, ["dog", "cat"]), other)
    refused("columns or class names differ", parquet, "train")
    pq.write_table(table.slice(0, 0), other)
    pq.write_table(table.slice(0, 0), first)
    refused("no rows in it", parquet, "train")


def test_parquet_that_changes_is_noticed(parquet):
    source = open_source(parquet, "validation")
    path = next((parquet / "data").glob("validation*"))
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(SourceError, match=f"{path.name}: has changed since it was indexed"):
        source.read(0)


def test_damaged_parquet(parquet):
    path = next((parquet / "data").glob("validation*"))
    good = path.read_bytes()
    for content in (b"", b"PAR1", good[:-20], good[len(good) // 2 :], good[:-8] + b"\xff\xff\xff\x7fPAR1", bytes(100)):
        path.write_bytes(content)
        refused(rf"{path.name}: not a parquet file, or a damaged one", path)
    path.write_bytes(good[:4] + bytes(60) + good[64:])
    source = open_source(path)
    with pytest.raises(SampleError, match=r"\[0\]: row group 0 is damaged"):
        source.read(0)
    assert source.read(4)[0] == b"image 204" * 20


def test_a_stray_archive_makes_no_archive_of_an_image_folder(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(b"x")
    pack(tmp_path / "backup.tar", [])
    assert open_source(tmp_path).describe()["kind"] == "folder"
