"""Labels that are no class: every source names them by sample, and a conversion can leave them out."""

import json
import math
import pickle

import numpy as np
import pytest
import torchvision
from PIL import Image

from archives import jpeg, pack
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.sources import open_source
from refusals import not_converted

NAMES = ["cat", "dog", "owl"]


def tar_source(kind, written):
    def make(folder, labels):
        files = {}
        for i, label in enumerate(labels):
            files |= {f"{i}.jpg": jpeg(i), f"{i}.{kind}": written(label).encode()}
        return str(pack(folder / "a.tar", files)), "a.tar:{}.jpg"

    return make


def parquet_source(folder, labels):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    values = [float(label) for label in labels]
    pq.write_table(pyarrow.table({"image": [jpeg(i) for i in range(len(labels))], "y": values}), folder / "a.parquet")
    return f"parquet:{folder / 'a.parquet'}#label=y", "a.parquet[{}]"


def cifar_source(folder, labels):
    batch = {"data": np.zeros((len(labels), 3072), np.uint8), "labels": labels}
    files = {"x/test_batch": pickle.dumps(batch, 2), "x/batches.meta": pickle.dumps({"label_names": NAMES}, 2)}
    return f"cifar:{pack(folder / 'cifar-10-python.tar.gz', files, 'w:gz')}:test", ":test_batch[{}]"


def torchvision_source(folder, labels):
    class Labelled(torchvision.datasets.VisionDataset):
        def __init__(self, root):
            super().__init__(root)

        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return Image.new("RGB", (40, 30), (index, 0, 0)), labels[index]

    torchvision.datasets.Labelled = Labelled
    return f"torchvision:Labelled:{folder}", "[{}]"


INTEGERS = [0, -1, 2, 3, -(10**17), 1]
NUMBERS = [*INTEGERS, 1.5, math.nan, math.inf]
ANYTHING = [*NUMBERS, "owl", "1.5", 10**30]


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (tar_source("json", lambda label: json.dumps({"label": label})), [*ANYTHING, None, True, [1], {"a": 1}]),
        (tar_source("cls", str), [*ANYTHING, ""]),
        (parquet_source, NUMBERS),
        (cifar_source, [*ANYTHING, None, True, 10**5000]),
        (torchvision_source, [*ANYTHING, np.float32(0.5), np.int64(-3), np.float64(math.nan)]),
    ],
)
def test_labels_that_are_no_class(tmp_path, monkeypatch, make, labels):
    monkeypatch.setattr(torchvision.datasets, "Labelled", None, raising=False)  # to be removed at the end
    text, name = make(tmp_path, labels)
    good = [i for i, label in enumerate(labels) if type(label) is int and 0 <= label < 3]
    bad = [i for i in range(len(labels)) if i not in good]
    source = open_source(text, class_names=NAMES)
    report = convert(source, tmp_path / "x", on_error="skip", progress=False)
    assert [reject.index for reject in report.rejects] == bad
    for reject in report.rejects:
        assert name.format(reject.index) in reject.name
        assert "the number of a class" in reject.reason or "names no class, there are 3 class names" in reject.reason
        assert len(reject.reason) < 200
    lines = [json.loads(line) for line in (tmp_path / "x.rejects.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == bad
    with open_dataset(tmp_path / "x") as dataset:
        assert dataset.label.tolist() == [labels[i] for i in good]
    not_converted(r", sample 1: cannot be converted: .*(names no class|number of a class)", source, tmp_path / "y")


def test_labels_of_idx_files_and_of_imagenet_v2(tmp_path):
    """Whose labels are numbers of one byte and names of folders."""
    images = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 2]) + bytes(16)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 4, 0, 3, 255, 2]))
    source = open_source(tmp_path / "t10k-images-idx3-ubyte", class_names=NAMES)
    report = convert(source, tmp_path / "x", on_error="skip", progress=False)
    assert [reject.index for reject in report.rejects] == [1, 2]
    names = ["0/a.jpg", "2/b.jpg", "3/c.jpg", "owl/d.jpg", "e.jpg", "-1/f.jpg", "1.5/g.jpg", "999999/h.jpg"]
    source = open_source(f"imagenetv2:{pack(tmp_path / 'v2.tar', {name: jpeg() for name in names})}", class_names=NAMES)
    report = convert(source, tmp_path / "y", on_error="skip", progress=False)
    assert report.num_samples == 2
    assert {reject.name.rpartition(":")[2] for reject in report.rejects} == set(names[2:])
