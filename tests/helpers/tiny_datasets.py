"""Small data sets in both formats, and a source in memory."""

import hashlib
import json
import os
import shutil
from functools import partial

import numpy as np

from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.beton_layout import JPEG, MIN_PAGE, RAW, sidecar_path
from fastdeit.pipelines.formats.beton_writer import BetonWriter
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.formats.shard_writer import ShardWriter
from pictures import jpeg, picture

FORMATS = ["beton", "webdataset"]
CLASS_NAMES = [f"class {i}" for i in range(1000)]


def stored(image, mode=JPEG):
    """A sample for `write`: the image as a JPEG file, or its raw pixels."""
    return (jpeg(image) if mode == JPEG else image.tobytes()), image.size, mode


def write(path, samples, labels=None, **options):
    """A data set of (bytes, (width, height)[, mode]) samples: a beton file by its suffix, else a folder of shards.

    The mode is JPEG and labels count up unless given; `options` go to the writer. Returns the open data set.
    """
    labels = range(len(samples)) if labels is None else labels
    kind = partial(BetonWriter, page_size=MIN_PAGE) if path.suffix == ".beton" else ShardWriter
    with kind(path, len(samples), **options) as writer:
        for sample, label in zip(samples, labels, strict=True):
            data, (width, height), mode = (*sample, JPEG)[:3]
            writer.add(data, height=height, width=width, label=label, mode=mode)
        names = [f"class {i}" for i in range(max(labels) + 1)]
        writer.finish(class_names=names, source={}, options={}, counts={})
    return open_dataset(path)


def assert_whole(path, count):
    """The data set holds so many images, and all its parts fit each other."""
    with open_dataset(path) as dataset:
        assert len(dataset) == count
        assert dataset.check() == []


def add_all(writer, dataset, first=0):
    """Add every sample of an open data set, from number `first` on."""
    for i in range(first, len(dataset)):
        sides = {"height": int(dataset.height[i]), "width": int(dataset.width[i])}
        mode = JPEG if dataset.is_jpeg(i) else RAW
        writer.add(dataset.read(i).tobytes(), label=int(dataset.label[i]), mode=mode, **sides)


def make_samples(count):
    """Arguments for a writer's `add`: JPEG files and, every third, raw pixels, of many sizes."""
    rng = np.random.default_rng(count)
    samples = []
    for i in range(count):
        height, width = (int(side) for side in rng.integers(9, 110, 2))
        data, _, mode = stored(picture(i, (width, height)), RAW if i % 3 == 2 else JPEG)
        samples.append((data, {"height": height, "width": width, "label": int(rng.integers(1000)), "mode": mode}))
    return samples


def write_shards(path, samples, *, capacity=None, **options):
    """A folder of shards of `make_samples`; returns its path."""
    with ShardWriter(path, capacity or len(samples), **options) as writer:
        for data, described in samples:
            writer.add(data, **described)
        writer.finish(class_names=CLASS_NAMES, source={"kind": "test"})
    return path


def image_folder(root, files, classes):
    """A folder of classes: file `i` (bytes) is `class{i % classes}/{i:02d}.jpg`."""
    for i, data in enumerate(files):
        path = root / f"class{i % classes}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def linked(file, root, count, classes):
    """A folder of classes of `count` links to a file; returns it."""
    for i in range(count):
        (root / f"{i % classes}").mkdir(parents=True, exist_ok=True)
        os.link(file, root / f"{i % classes}" / f"{i}.jpg")
    return root


def copy_beton(path, to):
    """A copy of a beton file and its sidecar; returns its path."""
    shutil.copy(path, to)
    shutil.copy(sidecar_path(path), sidecar_path(to))
    return to


def overwrite(path, dataset, index):
    """Write zeros over an image in the file of a data set."""
    with open(path, "r+b") as file:
        file.seek(int(dataset.offset[index]))
        file.write(bytes(int(dataset.size[index])))


def files(folder):
    """The bytes of every file below `folder`, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def reseal(sidecar, **changes):
    """Change a sidecar and make its seal fit, as somebody with bad intentions would."""
    described = {**json.loads(sidecar.read_text()), **changes}
    described.pop("seal")
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    sidecar.write_text(json.dumps({**described, "seal": hashlib.sha256(canonical.encode()).hexdigest()}))


class Hooked:
    """A data set that calls `hook` with every index before that is read."""

    def __init__(self, dataset, hook=lambda index: None):
        self.dataset, self.hook = dataset, hook

    def __len__(self):
        return len(self.dataset)

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def read(self, index):
        self.hook(index)
        return self.dataset.read(index)


class Items:
    """A source of the items it is given, labels 0, 1, 2, 0, ...; it raises an item that is an exception."""

    in_memory = True

    def __init__(self, items, class_names=("a", "b", "c"), **described):
        self.items, self.class_names, self.described = items, class_names, described

    def __len__(self):
        return len(self.items)

    def inputs(self):
        return []

    def describe(self):
        return {"kind": "items", **self.described}

    def name(self, index):
        return f"item {index}"

    def read(self, index):
        if isinstance(self.items[index], BaseException):
            raise self.items[index]
        return self.items[index], index % 3, self.name(index)


def some_classes(source, path, names):
    """Write a data set with only those images of `source` whose class is in `names`; returns its path."""
    with BetonDataset(source) as data:
        kept = [i for i, label in enumerate(data.label) if data.class_names[label] in names]
        with BetonWriter(path, len(kept)) as writer:
            for i in kept:
                sides = {"height": int(data.height[i]), "width": int(data.width[i])}
                label = names.index(data.class_names[data.label[i]])
                writer.add(data.read(i).tobytes(), label=label, mode=JPEG if data.is_jpeg(i) else RAW, **sides)
            writer.finish(class_names=names)
    return path
