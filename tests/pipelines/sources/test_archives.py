"""ImageNet's and CIFAR's own archives, judged by torchvision's readers of the same ones."""

import contextlib
import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from timm.data.real_labels import RealLabelsImagenet

from archives import cifar_files, jpeg, pack, packed, refused, write_cifar
from fastdeit.pipelines.sources import SampleError, SourceError, open_source
from fastdeit.pipelines.sources.imagenet import image_number, real_labels

savemat = pytest.importorskip("scipy.io").savemat

# IDs in another order than the wnids' own.
WNIDS = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n04254680"}
VAL = [3, 1, 4, 4, 2, 1, 3]


def devkit(path, truth=VAL, wnids=WNIDS):
    """The devkit's archive with classes, and above them synsets that are none, as meta.mat has them."""
    synsets = [(n, wnid, "a word, another", "gloss", 0.0, 0, 0.0, 9.0) for n, wnid in wnids.items()]
    synsets += [(1001, "n00001740", "entity", "gloss", 2.0, [1, 2], 1.0, 0.0)]
    names = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images"
    table = np.empty((len(synsets), 1), [(name, "O") for name in names.split()])
    table[:, 0] = synsets
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    top = "ILSVRC2012_devkit_t12"
    files = {
        f"{top}/readme.txt": b"",
        f"{top}/data/meta.mat": meta.getvalue(),
        f"{top}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in truth).encode(),
    }
    return pack(path / f"{top}.tar.gz", files, "w:gz")


@pytest.fixture
def root(tmp_path):
    """ILSVRC2012 in its distributed form, with few images."""
    train = {
        f"{wnid}.tar": packed({f"{wnid}_{i}.JPEG": jpeg(100 * n + i) for i in (10, 9, 111)[: 4 - n % 3]})
        for n, wnid in WNIDS.items()
    }
    pack(tmp_path / "ILSVRC2012_img_train.tar", train)
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(1000 + i) for i in [4, 2, 7, 1, 3, 5, 6]}
    pack(tmp_path / "ILSVRC2012_img_val.tar", val)
    devkit(tmp_path)
    return tmp_path


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision checks the MD5 of the real archives, which small stand-ins cannot have."""
    for module in ("cifar", "imagenet"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, *_: Path(path).exists())


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "form", ["{root}", "imagenet:{root}", "imagenet:{root}:{split}", "{root}/ILSVRC2012_img_{split}.tar"]
)
def test_imagenet_is_torchvisions(root, unchecked, split, form):
    alone = form.format(root=root, split=split)
    source = open_source(alone, None if "split" in form else split)
    judge = torchvision.datasets.ImageNet(str(root), split)
    assert source.class_names == judge.wnids == sorted(WNIDS.values())
    # torchvision goes by class, the val tar by number.
    samples = sorted(judge.samples, key=lambda s: Path(s[0]).name) if split == "val" else judge.samples
    assert len(source) == len(samples)
    source = pickle.loads(pickle.dumps(source))
    for i, (path, label) in enumerate(samples):
        data, ours, name = source.read(i)
        assert (data, ours) == (Path(path).read_bytes(), label)
        assert name == source.name(i)
        assert name.endswith(f".tar:{Path(path).name}")
    assert not source.in_memory


def test_imagenet_by_a_list_of_wnids(root):
    names = [*WNIDS.values(), "n09999999"]
    for split in ("train", "val"):
        plain, listed = open_source(root, split), open_source(root, split, names)
        assert listed.class_names == names
        for i in range(len(plain)):
            assert plain.read(i)[0] == listed.read(i)[0]
            assert plain.class_names[plain.read(i)[1]] == names[listed.read(i)[1]]
        refused("class 'n02119789' is not in the list", root, split, names[1:])


def test_val_labels_in_their_other_forms(root):
    judge = open_source(root, "val")
    expected = [judge.read(i) for i in range(len(judge))]
    synsets = "".join(f"{WNIDS[n]}\n" for n in VAL)
    rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[n]} 1 2 3 4 {WNIDS[n]} 1 2 3 4\n" for i, n in enumerate(VAL, 1)]
    forms = {
        "LOC_val_solution.csv": "ImageId,PredictionString\n" + "".join(rows[::-1]),
        "imagenet_2012_validation_synset_labels.txt": synsets,
    }
    (root / "ILSVRC2012_devkit_t12.tar.gz").rename(root / "aside.tar.gz")
    refused(r"labels are not beside it: put ILSVRC2012_devkit_t12.tar.gz there", root, "val")
    for name, text in forms.items():
        (root / name).write_text(text)
        source = open_source(root, "val")
        assert [source.read(i) for i in range(len(source))] == expected
        assert source.describe()["labels"] == str(root / name)
        (root / name).unlink()
    (root / "mine.txt").write_text(synsets)
    for labels in ("mine.txt", "aside.tar.gz"):
        source = open_source(f"imagenet:{root}:val#labels={root / labels}")
        assert [source.read(i) for i in range(len(source))] == expected


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        ([*VAL, 1], "7 images, but 8 labels"),
        (VAL[1:], "7 images, but 6 labels"),
        ([*VAL[:3], 1001, *VAL[4:]], "line 4 of the ground truth, '1001'"),
        ([*VAL[:3], "x", *VAL[4:]], "line 4 of the ground truth, 'x'"),
    ],
)
def test_ground_truth_must_fit(root, truth, reason):
    devkit(root, truth)
    refused(reason, root, "val")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("LOC_val_solution.csv", "a,b\n1,2\n", "not a table of ImageId"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000002,n01440764 1\n", "without a gap"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\nx,n01440764 1\n", "without a gap"),
        ("imagenet_2012_validation_synset_labels.txt", "n01440764\ntench\n", "image 2: 'tench' is not a wnid"),
        ("imagenet_2012_validation_synset_labels.txt", b"\xff\xfe", "not text"),
    ],
)
def test_mistaken_label_files(root, name, text, reason):
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(reason, root, "val")
    assert name in message


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no images in it"),
        ({"n01440764.JPEG": b""}, "not a class's tar"),
        ({"tench.tar": packed({"a.JPEG": b"x"})}, "tench.tar: not a class's tar"),
        ({"n01440764.tar": packed({})}, "no images of this class"),
        ({"n01440764.tar": packed({"a.JPEG": b"x"})[:1024]}, r"n01440764.tar: ends at byte 1024"),
        ({"n01440764.tar": packed({"/a.JPEG": b"x"})}, r"n01440764.tar:/a.JPEG: an absolute name"),
    ],
)
def test_mistaken_train_tars(tmp_path, files, reason):
    path = pack(tmp_path / "ILSVRC2012_img_train.tar", files)
    message = refused(reason, path)
    assert str(path) in message


def test_imagenet_needs_a_split(root):
    refused("choose --split train or --split val", root)
    (root / "ILSVRC2012_img_val.tar").unlink()
    assert len(open_source(root)) == len(open_source(root, "train"))
    refused(r"ILSVRC2012_img_val.tar: there is no such file", root, "val")
    refused("one file is one split", root / "ILSVRC2012_img_train.tar", "val")


def test_unpacked_splits_come_before_the_tars(root):
    (root / "val" / "n01440764").mkdir(parents=True)
    (root / "val" / "n01440764" / "a.JPEG").write_bytes(jpeg(0))
    assert open_source(root, "val").describe()["kind"] == "folder"
    assert open_source(root, "train").describe()["kind"] == "imagenet train"


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar"])
def test_imagenet_v2_goes_by_numbers(tmp_path, suffix):
    top = "imagenetv2-matched-frequency-format-val"
    files = {f"{top}/{label}/{i}.jpeg": jpeg(10 * label + i) for label in range(12) for i in range(2)}
    path = tmp_path / f"imagenetv2-matched-frequency{suffix}"
    pack(path, files, "w:gz" if suffix == ".tar.gz" else "w")
    source = open_source(path)
    assert (len(source), source.in_memory) == (24, suffix == ".tar.gz")
    assert [source.read(i)[1] for i in range(24)] == [i // 2 for i in range(24)]
    # As torchvision's weights and data sets order them: tench, goldfish, great white shark.
    assert source.class_names[:3] == ["n01440764", "n01443537", "n01484850"]
    assert len(source.class_names) == 1000
    assert open_source(path, class_names=[f"class {i}" for i in range(12)]).class_names[-1] == "class 11"
    for i, (name, data) in enumerate(files.items()):
        assert source.read(i) == (data, i // 2, f"{path}:{name}")
    pack(path, {**files, f"{top}/tench/a.jpeg": b"x"}, "w:gz" if suffix == ".tar.gz" else "w")
    source = open_source(f"imagenetv2:{path}")
    with pytest.raises(SampleError, match=r"tench/a.jpeg: is not in a folder named by the number"):
        source.read(0)
    assert [source.read(i)[1] for i in range(1, 25)] == [i // 2 for i in range(24)]
    pack(path, {f"{top}/tench/a.jpeg": b"x"}, "w:gz" if suffix == ".tar.gz" else "w")
    refused(r"tench/a.jpeg: is not in a folder named by the number", f"imagenetv2:{path}")


def test_real_labels_follow_the_names(root):
    lists = [[i, i + 1][: i % 3] for i in range(7)]
    (root / "real.json").write_text(json.dumps(lists))
    source = open_source(root, "val")
    names = [source.name(i) for i in (6, 0, 3)]
    assert real_labels(root / "real.json", names) == [lists[6], lists[0], lists[3]]
    assert real_labels(root / "real.json", ["/val/n01440764/ILSVRC2012_val_00000002.JPEG"]) == [lists[1]]
    for name in ("n01440764_10026.JPEG", "ILSVRC2012_val_00000008.JPEG", "ILSVRC2012_val_00000000.JPEG"):
        with pytest.raises(SourceError, match=f"{name}: not one of ILSVRC2012's val images 1 to 7"):
            real_labels(root / "real.json", [name])
    assert image_number("a/ILSVRC2012_val_00050000.JPEG") == 50_000


def test_real_labels_that_timm_ships():
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    judge = RealLabelsImagenet(names)
    assert real_labels(Path("timm"), names) == list(judge.real_labels.values())


@pytest.mark.parametrize("text", ["", "[", "{}", "[]", "[1]", "[[1.5]]", "[[-1]]", "[[true]]", "[" * 100_000])
def test_damaged_real_labels(tmp_path, text):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(SourceError, match=r"real.json: "):
        real_labels(tmp_path / "real.json", [])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["10", "100"])
def test_cifar_is_torchvisions(tmp_path, unchecked, kind, split):
    write_cifar(tmp_path, kind)
    with contextlib.redirect_stdout(io.StringIO()), tarfile.open(tmp_path / f"cifar-{kind}-python.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    judge = getattr(torchvision.datasets, f"CIFAR{kind}")(str(tmp_path), train=split == "train")
    for version in ("python", "binary"):
        path = tmp_path / f"cifar-{kind}-{version}.tar.gz"
        source = open_source(path, split)
        assert len(source) == len(judge) == (30 if kind == "10" and split == "train" else 6)
        assert source.class_names == judge.classes
        for i, (image, label) in enumerate(judge):
            pixels, ours, name = source.read(i)
            np.testing.assert_array_equal(pixels, np.asarray(image))
            assert (ours, name) == (label, source.name(i))
        assert len(open_source(f"cifar:{path}:{split}")) == len(source)
    if (kind, split) == ("10", "train"):
        assert open_source(tmp_path / "cifar-10-python.tar.gz", "train").name(8).endswith(":data_batch_2[2]")


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_pickles_run_no_code(tmp_path, capsys):
    (folders, _) = cifar_files("100")
    files = dict(folders["cifar-100-python"])
    huge = b"\x80\x02r\xff\xff\xff\x7f."  # a place in the memo that takes 16 GiB to hold
    array = b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"."
    deep = b"\x80\x02" + b"(" * 100_000
    for content, reason in [
        (pickle.dumps({"data": Hostile()}, protocol=2), "asks for __builtin__.print"),
        (pickle.dumps({"data": Hostile()}, protocol=4), "asks for builtins.print"),
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        (b"cnumpy\nload\n(S'x'\ntR.", "asks for numpy.load"),
        (huge, "not read as a pickle"),
        (array, "not read as a pickle"),
        (deep, "not read as a pickle"),
        (pickle.dumps({"data": np.zeros((6, 3072), np.float32), "fine_labels": [0] * 6}, 2), "pixels are not those"),
        (pickle.dumps({"data": np.zeros((5, 3072), np.uint8), "fine_labels": [0] * 6}, 2), "pixels are not those"),
        (pickle.dumps({"data": np.zeros((6, 3072), np.uint8), "fine_labels": (0,) * 6}, 2), "of their kinds"),
        (pickle.dumps([1], protocol=2), "no dictionary"),
        (b"", "not read as a pickle"),
    ]:
        files["train"] = content
        path = pack(tmp_path / "cifar-100-python.tar.gz", {f"x/{name}": data for name, data in files.items()}, "w:gz")
        message = refused(reason, path, "train")
        assert f"{path}:x/train" in message
    assert capsys.readouterr().out == ""


def test_mistaken_cifar_archives(tmp_path):
    write_cifar(tmp_path, "10")
    path = tmp_path / "cifar-10-binary.tar.gz"
    refused("choose --split train or --split test", path)
    refused("choose --split", path, "val")
    _, folders = cifar_files("10")
    files = folders["cifar-10-batches-bin"]
    pack(path, {**files, "test_batch.bin": files["test_batch.bin"][:-1]}, "w:gz")
    refused(r"test_batch.bin: 18437 bytes are not whole images", path, "test")
    pack(path, {name: data for name, data in files.items() if name != "data_batch_3.bin"}, "w:gz")
    refused(r"holds no data_batch_3.bin", path, "train")
    pack(path, {"x/readme": b""}, "w:gz")
    refused("not an archive of CIFAR-10 or CIFAR-100", path, "train")
    path.write_bytes(gzip.compress(bytes(2048))[:-4])
    refused("truncated or damaged", path, "train")
