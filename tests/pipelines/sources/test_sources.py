"""Sources, judged by torchvision: its order, its labels, its readers of the same files."""

import gzip
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from archives import refused
from fastdeit.pipelines.sources import SampleError, SourceError, open_source, read_class_names
from fastdeit.pipelines.sources.idx import Idx

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # as Debian's dataset-fashion-mnist installs it


@pytest.fixture
def folder(tmp_path):
    """Class folders with awkward names, nested and oddly named files, and files that are no images."""
    root = tmp_path / "images"
    names = "b/2.jpg b/10.PNG b/sub/1.jpeg B/x.webp a_c/z.bmp a_c/Z.tiff a_c/.h.ppm 10/q.pgm 9/q.tif"
    for i, name in enumerate(names.split()):
        path = root / name.replace("_", " ")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), i).save(path)
    (root / "b" / "notes.txt").write_text("no image")
    (root / "README").write_text("no image either")
    return root


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, *, zipped=False, count=20, test=7):
    """A data set in MNIST's four files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", count), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 20), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            path = folder / f"{split}-{name}-ubyte"
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx_bytes(array), mtime=0))
            else:
                path.write_bytes(idx_bytes(array))
    return folder


def test_image_folder_is_torchvisions(folder):
    ours, judge = open_source(folder), torchvision.datasets.ImageFolder(str(folder))
    seen = [sample for sample in judge.samples if "/." not in sample[0]]
    assert ours.class_names == judge.classes
    assert len(ours) == len(seen) == len(judge) - 1
    for i, (path, label) in enumerate(seen):
        assert ours.read(i) == (Path(path).read_bytes(), label, path)
        assert ours.name(i) == path
    assert ours.describe().items() >= {"files_that_are_no_images": 2, "hidden_files": 1}.items()


def test_formats_that_torchvision_passes_over(folder):
    for name in ("b/a.gif", "B/y.jp2"):
        Image.new("L", (4, 4)).save(folder / name)
    source = open_source(folder)
    names = [source.name(i) for i in range(len(source))]
    assert {str(folder / "b/a.gif"), str(folder / "B/y.jp2")} <= set(names)
    assert len(source) == len(torchvision.datasets.ImageFolder(str(folder))) - 1 + 2


def test_what_is_no_image_file_is_not_read(folder):
    os.mkfifo(folder / "10" / "a.jpg")
    with open(folder / "10" / "b.jpg", "wb") as file:
        file.truncate((1 << 28) + 1)
    (folder / "10" / "c.jpg").symlink_to("nowhere")
    source = open_source(folder)
    with pytest.raises(SampleError, match=r"a\.jpg: is not a regular file"):
        source.read(0)
    with pytest.raises(SampleError, match=r"b\.jpg: 268435457 bytes, but an image may have at most 268435456"):
        source.read(1)
    with pytest.raises(FileNotFoundError):
        source.read(2)


def test_class_list_orders_the_labels(folder):
    names = ["b", "absent", "9", "10", "B", "a c"]
    source = open_source(folder, class_names=names)
    assert source.class_names == names
    for i in range(len(source)):
        _, label, path = source.read(i)
        assert Path(path).relative_to(folder).parts[0] == names[label]
    assert source.describe()["classes_without_folder"] == ["absent"]
    refused("class 'a c' is not in the list", folder, class_names=["b", "9", "10", "B"])
    refused("'b' is there twice", folder, class_names=["b", "b"])


def test_mistaken_folders_are_named(folder, tmp_path):
    (folder / "empty").mkdir()
    refused("empty: no images", folder)
    refused("no class folders", folder / "9")
    refused("nowhere: there is no such", tmp_path / "nowhere")
    refused("neither a folder nor a file whose name shows", folder / "README")


def test_split_is_a_subfolder(folder, tmp_path):
    folder.rename(tmp_path / "train")
    (tmp_path / "val").mkdir()
    assert open_source(tmp_path, "train").class_names == ["10", "9", "B", "a c", "b"]
    refused("splits train, val, not classes: choose one with --split", tmp_path)
    refused("test: there is no such", tmp_path, "test")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_idx_is_what_torchvision_reads(tmp_path, zipped, split):
    # torchvision reads plain files only, so it judges through their twins.
    plain = write_mnist(tmp_path / "judge" / "MNIST" / "raw")
    judge = torchvision.datasets.MNIST(str(tmp_path / "judge"), train=split == "train")
    source = open_source(write_mnist(tmp_path / "idx", zipped=True) if zipped else plain, split)
    assert len(source) == len(judge)
    for i, (image, label) in enumerate(judge):
        pixels, ours, name = source.read(i)
        np.testing.assert_array_equal(pixels, np.asarray(image))
        assert ours == label
        assert name == source.name(i)
        assert name.endswith(f"[{i}]")
    assert source.class_names == [str(i) for i in range(10 if split == "train" else 7)]


def test_idx_by_file_and_class_names(tmp_path):
    folder = write_mnist(tmp_path)
    (folder / "train-labels-idx1-ubyte").rename(folder / "aside")
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress((folder / "aside").read_bytes()))
    names = [f"name {i}" for i in range(10)]
    source = open_source(folder / "train-images-idx3-ubyte", class_names=names)
    assert (len(source), source.class_names) == (20, names)
    refused("choose --split train or --split test", folder)
    refused("leave out --split", folder / "train-images-idx3-ubyte", "train")
    (folder / "more-train-images-idx3-ubyte").write_bytes(b"")
    refused("found: more-train-images-idx3-ubyte, train-images-idx3-ubyte", folder, "train")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("what", ["images-idx3", "labels-idx1"])
def test_damaged_idx_files_are_named(tmp_path, zipped, what):
    write_mnist(tmp_path, zipped=zipped)
    suffix = ".gz" if zipped else ""
    images, path = (tmp_path / f"train-{name}-ubyte{suffix}" for name in ("images-idx3", what))
    good = path.read_bytes()
    swapped = bytearray(gzip.decompress(good) if zipped else good)
    swapped[4:8] = swapped[4:8][::-1]  # a little-endian count
    short = gzip.decompress(good)[:-3] if zipped else good[:-3]
    for content in (short, bytes(swapped), short[:6], b"", bytes([0, 0, 9]) + short[3:]):
        path.write_bytes(gzip.compress(content) if zipped else content)
        with pytest.raises(SourceError, match=path.name):
            Idx(images)
    if zipped:
        for content in (good[: len(good) // 2], b"no gzip", good[:20] + b"\xff" * 8 + good[28:]):
            path.write_bytes(content)
            with pytest.raises(SourceError, match=r"truncated or damaged|not an IDX"):
                Idx(images)
    path.unlink()
    with pytest.raises((SourceError, FileNotFoundError), match=r"train-labels|train-images"):
        Idx(images)


@pytest.mark.slow
def test_idx_files_that_unpack_to_more_than_they_announce(tmp_path):
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    good = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(good + bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(SourceError, match="more than 11200 bytes of data, but its header announces 11200"):
        Idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24
    path.write_bytes(gzip.compress(good[:4] + b"\xff" * 12))
    with pytest.raises(SourceError, match=r"its header announces .* bytes, and up to"):
        Idx(path)


def test_idx_counts_must_agree(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(19, np.uint8)))
    refused("20 images, but 19 labels", tmp_path, "train")


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist():
    source = open_source(FASHION_MNIST, "test")
    assert len(source) == 10_000
    assert np.bincount([source.read(i)[1] for i in range(10_000)]).tolist() == [1000] * 10


def write_cifar10(root, count=6):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": list(range(count))}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision checks the MD5 of the real CIFAR-10, which a small stand-in cannot have."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


@pytest.mark.parametrize(("split", "count"), [("train", 30), ("test", 6)])
def test_torchvision_in_memory(tmp_path, unchecked, split, count):
    write_cifar10(tmp_path)
    judge = torchvision.datasets.CIFAR10(str(tmp_path), train=split == "train")
    for source in (
        open_source(f"torchvision:CIFAR10:{tmp_path}", split),
        pickle.loads(pickle.dumps(open_source(f"torchvision:CIFAR10:{tmp_path}:{split}"))),
    ):
        assert len(source) == len(judge) == count
        assert source.class_names == judge.classes
        assert source.in_memory
        for i, (image, label) in enumerate(judge):
            ours, our_label, _ = source.read(i)
            assert (np.asarray(ours).tobytes(), our_label) == (np.asarray(image).tobytes(), label)


def test_torchvision_files_are_taken_as_they_are(tmp_path):
    """Of the data sets with a choosable loader the files' own bytes come, not what was decoded of them."""
    root = tmp_path / "eurosat" / "2750"
    for name in ("Forest", "River"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(root / name / f"{name}_{i}.jpg")
    source = open_source(f"torchvision:EuroSAT:{tmp_path}")
    judge = torchvision.datasets.EuroSAT(str(tmp_path))
    assert source.class_names == judge.classes == ["Forest", "River"]
    assert not source.in_memory
    for i, (path, label) in enumerate(judge.samples):
        assert source.read(i) == (Path(path).read_bytes(), label, str(path))
    refused("this data set of torchvision has no splits: leave out 'train'", f"torchvision:EuroSAT:{tmp_path}:train")


@pytest.mark.parametrize(
    ("text", "split", "reason"),
    [
        ("torchvision:CIFAR10:{}", None, "cannot find or open it there"),
        ("torchvision:SVHN:{}", "nosuch", "cannot find or open it there"),
        ("torchvision:CIFAR10:{}", "val", "only the splits train and test, not 'val'"),
        ("torchvision:CIFAR10:{}:test", "train", "names the split 'test', --split names 'train'"),
        ("torchvision:Cifar-10:{}", None, "no data set named 'Cifar-10'; did you mean .*CIFAR10"),
        ("torchvision:CIFAR10", None, "write torchvision:NAME:ROOT"),
    ],
)
def test_torchvision_mistakes(tmp_path, text, split, reason):
    refused(reason, text.format(tmp_path), split)


def test_torchvision_targets_must_be_classes(tmp_path):
    source = open_source(f"torchvision:VOCSegmentation:{voc(tmp_path)}")
    with pytest.raises(SourceError, match="it cannot be converted"):
        source.read(0)


def voc(root):
    """One image with a segmentation mask, in the layout of Pascal VOC 2012."""
    base = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text("one\n")
    Image.new("RGB", (8, 8)).save(base / "JPEGImages" / "one.jpg")
    Image.new("P", (8, 8)).save(base / "SegmentationClass" / "one.png")
    return root


def test_class_name_files(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("T-shirt\nÅngström \n\n", encoding="utf-8")
    assert read_class_names(path) == ["T-shirt", "Ångström"]
    for text, reason in (
        ("", "no class names"),
        ("a\n\nb", "line 2: empty"),
        ("a\nb\na", "line 3: 'a' is there twice"),
    ):
        path.write_text(text)
        with pytest.raises(SourceError, match=reason):
            read_class_names(path)
