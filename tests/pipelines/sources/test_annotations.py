"""Lists of images in COCO's layout, and joined splits; torchvision judges with its own readers of the data sets."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from archives import jpeg, parquet, refused
from fastdeit.on_demand import converted
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.conversion.workers import ConvertError
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.sources import SampleError, open_source

SPECIES = [(0, "Acer", "Plantae"), (1, "Bufo", "Amphibia"), (2, "Corvus", "Aves"), (3, "Dama", "Mammalia")]


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path)


@pytest.fixture
def inat(tmp_path):
    """iNaturalist 2018's layout with four species, the last one without images in `val2018.json`."""
    categories = [{"id": i, "name": name, "supercategory": kind} for i, name, kind in reversed(SPECIES)]
    lists = {"train": ([], []), "val": ([], [])}
    for number, (label, split) in enumerate([(0, "train"), (1, "train"), (2, "train"), (3, "train"), (1, "val")]):
        name = f"train_val2018/{SPECIES[label][2]}/{label}/{number:03d}.jpg"
        picture(tmp_path / "inat" / name, 40 * number)
        images, annotations = lists[split]
        images.append({"id": 90 - number, "file_name": name, "width": 8, "height": 6})
        annotations.insert(0, {"id": number, "image_id": 90 - number, "category_id": label})
    for split, (images, annotations) in lists.items():
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "inat" / f"{split}2018.json").write_text(json.dumps(content))
    return tmp_path / "inat"


def test_labels_are_those_of_torchvision_with_names(inat, tmp_path):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "2018").symlink_to(inat / "train_val2018")
    judge = torchvision.datasets.INaturalist(str(tmp_path / "judge"), version="2018")
    expected = {Path(judge.all_categories[label], name).name: label for label, name in judge.index}
    found = {}
    for split in ("train", "val"):
        source = pickle.loads(pickle.dumps(open_source(inat / f"{split}2018.json")))
        assert source.class_names == [name for _, name, _ in SPECIES]
        for i in range(len(source)):
            data, label, name = source.read(i)
            assert data == Path(name).read_bytes()
            assert source.name(i) == name
            found[Path(name).name] = label
    assert found == expected


def test_a_list_becomes_a_data_set(inat, tmp_path):
    convert(str(inat / "train2018.json"), tmp_path / "train.beton", progress=False)
    dataset = open_dataset(tmp_path / "train.beton")
    assert dataset.label.tolist() == [0, 1, 2, 3]
    assert dataset.class_names == [name for _, name, _ in SPECIES]
    with pytest.raises(ConvertError, match="lies within the source"):
        convert(str(inat / "train2018.json"), inat / "train_val2018" / "x.beton", progress=False)


def change(path, **lists):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | lists))


def test_what_is_left_out_is_counted(inat):
    path = inat / "train2018.json"
    content = json.loads(path.read_text())
    more = ["Aves/2/.hidden.jpg", "Aves/2/notes.txt", "Aves/2/nobody.jpg"]
    images = [{"id": number, "file_name": name} for number, name in enumerate(more)]
    labels = [{"image_id": number, "category_id": 2} for number in range(2)]
    change(path, images=[*content["images"], *images], annotations=[*content["annotations"], *labels])
    source = open_source(f"coco:{path}")
    assert len(source) == 4
    counts = {"files_that_are_no_images": 1, "hidden_files": 1, "images_without_category": 1}
    assert counts.items() <= source.describe().items()
    (inat / "train_val2018/Plantae/0/000.jpg").unlink()
    with pytest.raises(OSError, match="No such file"):
        source.read(0)
    (inat / "train_val2018/Amphibia/1/001.jpg").unlink()
    (inat / "train_val2018/Amphibia/1/001.jpg").mkdir()
    with pytest.raises(SampleError, match="not a regular file"):
        source.read(1)


def test_categories_of_one_name_are_told_apart(inat):
    path = inat / "train2018.json"
    change(
        path,
        categories=[
            {"id": 0, "name": "Prunella", "supercategory": "Plantae"},
            {"id": 1, "name": "Prunella", "supercategory": "Aves"},
            {"id": 2, "name": "Ficus", "supercategory": "Plantae"},
            {"id": 3, "name": "Ficus", "supercategory": "Plantae"},
            {"id": 7},
        ],
    )
    assert open_source(path).class_names == [
        "Prunella (Plantae)", "Prunella (Aves)", "Ficus (Plantae) (2)", "Ficus (Plantae) (3)", "7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ({"images": None}, "has no list `images` of objects; a list in COCO's layout has images, annotations, cat"),
        ({"categories": [3]}, "has no list `categories` of objects"),
        ({"annotations": []}, "no usable image: all lack a category"),
        ({"annotations": [{"image_id": 90, "category_id": 9}]}, "image 90 has category 9, which `categories` lacks"),
        ({"annotations": [{"image_id": "90", "category_id": 1}]}, "an entry has image_id '90' instead of a number"),
        (
            {"annotations": [{"image_id": 90, "category_id": 1}, {"image_id": 90, "category_id": 2}]},
            "image 90 has several categories",
        ),
        ({"categories": [{"id": 1}, {"id": 1}]}, "two categories have the same id"),
        ({"images": [{"id": 90, "file_name": "../x.jpg"}]}, "'../x.jpg', outside of the list's folder"),
        ({"images": [{"id": 90, "file_name": "/etc/x.jpg"}]}, "'/etc/x.jpg', outside of the list's folder"),
        ({"images": [{"id": 90, "file_name": 4}]}, "an image has file_name 4"),
        ({"images": [{"id": 90, "file_name": "\ud800.jpg"}]}, r"an image has file_name '\\ud800.jpg'"),
        ({"images": [{"id": 90, "file_name": "a.jpg"}, {"id": 90, "file_name": "b.jpg"}]}, "'b.jpg', is listed twice"),
        ({"images": [{"id": 90, "file_name": "a.jpg"}, {"id": 91, "file_name": "a.jpg"}]}, "'a.jpg', is listed twice"),
        ({"categories": [{"id": 0, "name": ""}]}, "category 0 has name ''"),
        ({"categories": [{"id": 0, "name": ["x"]}]}, "category 0 has name a list"),
        (
            {"categories": [{"id": i, "name": name} for i, name in enumerate(("A", "A", "A () (0)"))]},
            r"names of categories, line 3: 'A \(\) \(0\)' is there twice",
        ),
    ],
)
def test_other_lists_are_refused(inat, lists, reason):
    change(inat / "train2018.json", **lists)
    refused(reason, inat / "train2018.json")


def test_class_names_order_the_labels(inat):
    names = ["Dama", "Lutra", "Acer", "Corvus", "Bufo"]
    source = open_source(inat / "train2018.json", None, names)
    assert source.class_names == names
    assert [source.read(i)[1] for i in range(4)] == [2, 4, 3, 0]
    refused("class 'Corvus' is not in the list", inat / "train2018.json", None, ["Acer", "Bufo", "Dama"])


def test_a_list_that_is_too_large_says_so(inat, monkeypatch):
    monkeypatch.setattr("fastdeit.pipelines.sources.annotations.MAX_LIST", 100)
    refused("too large for a list of images: convert folders", inat / "train2018.json")


def test_lists_that_are_converted_on_demand_keep_their_classes(inat, tmp_path, monkeypatch):
    """The validation list may name fewer classes than the training list; a link to a list is not followed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    val = json.loads((inat / "val2018.json").read_text())
    change(inat / "val2018.json", categories=[each for each in val["categories"] if each["name"] == "Bufo"])
    train = converted(inat / "train2018.json")
    own = converted(inat / "val2018.json", like=train)
    assert open_dataset(own).class_names == open_dataset(train).class_names
    assert open_dataset(own).label.tolist() == [1]
    (tmp_path / "elsewhere").mkdir()
    (inat / "val2018.json").rename(tmp_path / "elsewhere" / "list.json")
    (inat / "val2018.json").symlink_to(tmp_path / "elsewhere" / "list.json")
    assert open_dataset(converted(inat / "val2018.json", like=train)).label.tolist() == [1]


def test_archives_with_other_names_are_not_renamed_on_demand(tmp_path, monkeypatch):
    """A parquet file may name its labels itself: the names of another data set would only take their place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("train/cat/1.png", "train/cow/2.png"):
        picture(tmp_path / name)
    name, data = parquet(jpeg)
    (tmp_path / name).write_bytes(data)
    train = converted(tmp_path / "train")
    assert open_dataset(train).class_names == ["cat", "cow"]
    assert open_dataset(converted(tmp_path / name, like=train)).class_names == ["cat", "dog"]


def test_what_is_no_list_is_refused(inat, tmp_path):
    for number, content in enumerate((b"{", b"[1, 2]", b"\xff\xfe")):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        refused("not a list of images in JSON|has no list `images`", path)
    refused("one list is one split", inat / "train2018.json", "train")
    refused("there is no such file", f"coco:{tmp_path}/absent.json")


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Flowers-102's layout with 12 images."""
    root = tmp_path / "data" / "flowers-102"
    for number in range(1, 13):
        picture(root / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(root / "imagelabels.mat", {"labels": np.arange(1, 13) * 8})
    savemat(root / "setid.mat", {"trnid": [[7, 1, 3]], "valid": [[2, 9]], "tstid": [[4, 5, 6, 8, 10, 11, 12]]})
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda *_: True)
    return tmp_path / "data"


def test_train_and_val_of_flowers_are_joined(flowers):
    parts = [torchvision.datasets.Flowers102(str(flowers), split) for split in ("train", "val")]
    source = pickle.loads(pickle.dumps(open_source(f"torchvision:Flowers102:{flowers}", "train+val")))
    assert len(source) == 5
    assert len(source.class_names) == 102
    assert source.class_names[55] == "bishop of llandaff"
    expected = [(path, label) for part in parts for path, label in zip(part._image_files, part._labels, strict=True)]
    for i, (path, label) in enumerate(expected):
        assert source.read(i) == (path.read_bytes(), label, str(path))
    refused("must join different splits", f"torchvision:Flowers102:{flowers}", "train+train")
    refused("must join different splits", f"torchvision:Flowers102:{flowers}", "train+")
    same = open_source(f"torchvision:Flowers102:{flowers}:train+val")
    assert [same.name(i) for i in range(5)] == [source.name(i) for i in range(5)]
    refused("cannot find or open it there", f"torchvision:Flowers102:{flowers}", "train+other")


def test_folders_are_joined_if_their_classes_are_the_same(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "few/a/5.png"):
        picture(tmp_path / name)
    source = open_source(tmp_path, "train+val")
    assert [source.read(i)[1:] for i in range(4)] == [
        (label, str(tmp_path / name))
        for label, name in ((0, "train/a/1.png"), (1, "train/b/2.png"), (0, "val/a/3.png"), (1, "val/b/4.png"))
    ]
    assert source.inputs() == [*open_source(tmp_path, "train").inputs(), *open_source(tmp_path, "val").inputs()]
    refused("must join different splits", tmp_path, "train+train/")
    refused("have different classes: give all of them one list with --class-names", tmp_path, "train+few")
    assert open_source(tmp_path, "train+few", ["a", "b"]).class_names == ["a", "b"]
    (tmp_path / "train+val" / "c").mkdir(parents=True)
    picture(tmp_path / "train+val" / "c" / "6.png")
    assert open_source(tmp_path, "train+val").class_names == ["c"]


def test_stanford_cars_has_its_own_names(tmp_path):
    root = tmp_path / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi S4 Sedan 2012"]
    for number in range(1, 4):
        picture(root / "cars_train" / f"{number:05d}.jpg", number)
    (root / "devkit").mkdir()
    kind = [("fname", object), ("class", object)]
    entries = np.array([("00001.jpg", 3), ("00002.jpg", 1), ("00003.jpg", 2)], dtype=kind)
    savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": entries})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    source = open_source(f"torchvision:StanfordCars:{tmp_path}:train")
    assert source.class_names == names
    assert [source.read(i)[1] for i in range(3)] == [2, 0, 1]
    assert source.read(1)[0] == (root / "cars_train" / "00002.jpg").read_bytes()
