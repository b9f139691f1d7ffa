"""What is damaged is found and named, judged by damaging it."""

import os
import shutil
import zlib

import numpy as np
import PIL
import pytest

from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.conversion.verify import NAMED, VerifyError, verify
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.beton_layout import JPEG
from fastdeit.pipelines.formats.beton_writer import BetonWriter
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.formats.shards import ShardDataset
from pictures import jpeg, picture
from tiny_datasets import FORMATS, Items, image_folder, reseal

FUZZ = int(os.environ.get("FASTDEIT_FUZZ", "1"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """30 JPEGs in three classes, one of them cut short."""
    images = [jpeg(picture(i), quality=75) for i in range(30)]
    root = image_folder(tmp_path_factory.mktemp("verify") / "tree", images, 3)
    os.truncate(root / "class1" / "13.jpg", 300)
    return root


@pytest.fixture(scope="module")
def made(tree, tmp_path_factory):
    """The tree in both formats. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    for format in FORMATS:
        options = {"shuffle_seed": 2, "limit": 28, "on_error": "skip", "shard_size": 9, "nodes": 2}
        convert(tree, folder / format, format=format, progress=False, **options)
    return folder


@pytest.fixture
def own(made, tmp_path):
    return shutil.copytree(made, tmp_path / "own")


def findings(path, **options):
    return verify(path, progress=False, **options).findings


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_found_where_nothing_is_wrong(made, tree, format, capsys):
    found = verify(made / format, tree, workers=2)
    assert (found.ok, found.count, found.num_samples) == (True, 0, 27)
    assert (found.findings, found.unchecked, found.notes) == ([], [], [])
    assert f"{made / format}: 27 images checked in" in capsys.readouterr().out
    assert verify(made / format, str(tree), workers=1, progress=False).ok


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_every_flipped_bit_is_found(own, format):
    """At hundreds of places in all of the files; one in an image is named."""
    paths = [own / format, *own.glob("beton.json")] if format == "beton" else sorted((own / format).rglob("*.*"))
    rng = np.random.default_rng(5)
    with open_dataset(own / format) as dataset:
        offset, size = dataset.offset, dataset.size
        shard = np.zeros_like(offset) if format == "beton" else dataset.shard
        labels = [dataset.class_names[label] for label in dataset.label]
    interesting = np.concatenate([np.arange(3000), offset, offset - 1, offset + size - 1, offset + size])
    named = 0
    for path in paths:
        total = path.stat().st_size
        places = rng.integers(0, total, 60 * FUZZ)
        if path == own / "beton":
            # Most of this file is zeros: what is not comes more often.
            images = (offset + rng.random((3, len(offset))) * size).astype(int).ravel()
            places = np.concatenate([places, images, rng.choice(interesting, 200), total - rng.integers(1, 700, 60)])
        for place in places.tolist():
            with open(path, "r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << int(rng.integers(8))]))
                file.flush()
                found = findings(own / format, workers=1)
                file.seek(place)
                file.write(bytes([byte]))
            assert found, (path, place)
            inside = (place >= offset) & (place < offset + size)
            if path.suffix == ".tar":
                inside &= shard == int(path.stem.removeprefix("shard-"))
            elif path != own / "beton":
                inside[:] = False
            for index in np.flatnonzero(inside):
                sample = f"{own / format}, sample {index} (class '{labels[index]}')"
                assert f"{sample}: its checksum (crc32) does not match" in found[0]
                named += 1
    assert named > 30
    assert findings(own / format) == []


def test_all_findings_are_counted(own):
    with BetonDataset(own / "beton") as dataset, open(own / "beton", "r+b") as file:
        for index in range(25):
            file.seek(dataset.offset[index] + 100)
            file.write(b"damage")
    found = verify(own / "beton", progress=False)
    assert (found.count, len(found.findings)) == (26, NAMED)  # and the content hash
    assert "beton, sample 19 (" in found.findings[19]
    assert f"and {26 - NAMED} more" in str(found)
    assert "26 findings" in str(found)


def test_a_truncated_file_and_one_that_is_not_there(own, tmp_path):
    os.truncate(own / "beton", 9_000_000 - 1_000_000)
    found = verify(own / "beton", progress=False)
    assert "do not fit a file" in found.findings[0]
    assert found.unchecked == ["everything else, since the data set does not open"]
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "none.beton", progress=False)


def test_what_plain_ffcv_wrote(tmp_path):
    """Without a sidecar it is decoded and its tables are checked, and what could not be checked is said."""
    path = tmp_path / "x.beton"
    with BetonWriter(path, 3) as writer:
        for i in range(3):
            # The sides of sample 1 are not its own; sample 2 is no JPEG.
            data = bytes(1000) if i == 2 else jpeg(picture(i))
            writer.add(data, height=40, width=48 + i % 2, label=i, mode=JPEG)
        writer.finish(class_names=["a", "b", "c"])
    (tmp_path / "x.beton.json").unlink()
    found = verify(path, progress=False)
    assert found.findings[0].endswith("sample 1 (class 1): it has 48 x 40 pixels, but the tables say 49 x 40")
    assert "sample 2 (class 2): PIL cannot decode it (" in found.findings[1]
    assert "0x" not in found.findings[1]
    assert found.count == 2
    assert found.unchecked == ["labels, class names and checksums, since there is no sidecar"]
    with pytest.raises(VerifyError, match=r"does not say how it was converted.*Leave out --against"):
        verify(path, Numbers(), progress=False)


class Numbers(Items):
    """Small images in memory, of classes without names; `change` has other images and labels by index."""

    def __init__(self, change=None, count=12):
        images = [(np.full((8, 8, 3), index, np.uint8), index % 4) for index in range(count)]
        super().__init__([(change or {}).get(index, image) for index, image in enumerate(images)], class_names=None)

    def read(self, index):
        return *self.items[index], self.name(index)


@pytest.mark.parametrize("format", FORMATS)
def test_the_source_is_compared(tmp_path, format):
    bad = {5: (b"no image", 1)}
    convert(Numbers(bad), tmp_path / "x", format=format, on_error="skip", progress=False)
    assert findings(tmp_path / "x", against=Numbers(bad)) == []
    zeros = np.zeros((8, 8, 3), np.uint8)
    changed = {2: (zeros, 2), 5: (zeros, 1), 7: (np.full((8, 8, 3), 7, np.uint8), 0), 9: (b"no image", 1)}
    changed[11] = (np.full((4, 16, 3), 11, np.uint8), 3)  # the same bytes, other sides
    found = findings(tmp_path / "x", against=Numbers(changed))
    where, of = f"{tmp_path / 'x'}, sample", "of the source"
    assert found == [
        f"{where} 2 (class '2'): its bytes differ from those that the source gives; it is item 2, sample 2 {of}",
        f"item 5, sample 5 {of}: was left out, but can be read now",
        f"{where} 6 (class '3'): it is of class 3, but in the source of class 0; it is item 7, sample 7 {of}",
        f"{where} 8 (class '1'): it can no longer be read from the source (not an image that PIL knows); "
        f"it is item 9, sample 9 {of}",
        f"{where} 10 (class '3'): its bytes differ from those that the source gives; it is item 11, sample 11 {of}",
    ]
    for count in (11, 13):
        (found,) = findings(tmp_path / "x", against=Numbers(bad, count))
        assert f"holds 11 samples, and 1 were left out, but the source has {count}: none was compared" in found


def test_classes_are_compared_by_name_where_both_have_names(tree, tmp_path):
    names = ["class2", "other", "class0", "class1"]
    convert(tree, tmp_path / "x", class_names=names, on_error="skip", progress=False)
    found = verify(tmp_path / "x", tree, progress=False)
    assert (found.count, found.notes) == (0, [])
    source = Numbers()
    convert(source, tmp_path / "y", progress=False)
    source.class_names = ["a", "b", "c", "d"]
    found = verify(tmp_path / "y", source, progress=False)
    assert found.count == 0
    assert found.notes == ["the source names other classes, so labels were compared by number"]


def test_another_pillow_is_said(tmp_path, monkeypatch):
    convert(Numbers(), tmp_path / "x", progress=False)
    monkeypatch.setattr(PIL, "__version__", "99.0")
    found = verify(tmp_path / "x", Numbers(), progress=False)
    assert found.ok
    assert "compared with 99.0, which may encode an image differently" in found.notes[0]


def test_checksums_that_agree_with_each_other_but_not_with_the_content(tmp_path):
    """A sidecar that was forged as a whole, but for the content hash."""
    convert(Numbers(), tmp_path / "x", mode="raw", progress=False)
    reseal(tmp_path / "x.json", content_hash="sha256:" + "0" * 64)
    (found,) = findings(tmp_path / "x")
    assert "its content hash is sha256:" in found


def test_raw_and_jpeg_samples_of_both_formats(tmp_path):
    for dataset, path in ((BetonDataset, "x.beton"), (ShardDataset, "x")):
        format = "beton" if dataset is BetonDataset else "webdataset"
        source = Numbers({3: (picture(1, (80, 70)), 2)})
        convert(source, tmp_path / path, format=format, progress=False)
        with dataset(tmp_path / path) as opened:
            assert {opened.is_jpeg(i) for i in range(12)} == {True, False}
            assert zlib.crc32(opened.read(0)) == zlib.crc32(bytes(192))
            assert opened.size[0] == 192
        assert findings(tmp_path / path, against=source) == []
