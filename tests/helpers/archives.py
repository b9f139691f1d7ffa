"""Tiny JPEGs, tar archives and a parquet file for the tests of sources, and sources that are refused."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastdeit.pipelines.sources import SourceError, open_source


def jpeg(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, shade // 256, 0)).save(file, "JPEG")
    return file.getvalue()


def packed(files, format=tarfile.GNU_FORMAT, mode="w"):
    """The bytes of an archive of `files`: bytes by name, or pairs of name and bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as archive:
        for name, data in dict(files).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pack(path, files, mode="w"):
    """Write an archive of `files` and return its path."""
    path.write_bytes(packed(files, mode=mode))
    return path


def cifar_files(kind, count=6):
    """The files of both versions of CIFAR-10 or CIFAR-100, of the same images, by the name of the archive."""
    rng = np.random.default_rng(0)
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if kind == "10" else ["train", "test"]
    pickled, binary = {}, {}
    for name in batches:
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        fine, coarse = (rng.integers(0, n, count) for n in (10 if kind == "10" else 100, 20))
        # As Python 2 pickled them, at protocol 2.
        if kind == "10":
            content = {"data": data, "labels": fine.tolist(), "batch_label": "x", "filenames": ["a"] * count}
            labels = fine[:, None]
        else:
            content = {"data": data, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
            labels = np.stack([coarse, fine], axis=1)
        pickled[name] = pickle.dumps(content, protocol=2)
        binary[f"{name}.bin"] = np.concatenate([labels.astype(np.uint8), data], axis=1).tobytes()
    if kind == "10":
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        pickled["batches.meta"] = pickle.dumps({"label_names": names, "num_vis": 3072}, protocol=2)
        binary["batches.meta.txt"] = ("\n".join(names) + "\n\n").encode()
        return {"cifar-10-batches-py": pickled}, {"cifar-10-batches-bin": binary}
    names = [f"class_{i}" for i in range(100)]
    pickled["meta"] = pickle.dumps({"fine_label_names": names, "coarse_label_names": ["x"] * 20}, protocol=2)
    binary["fine_label_names.txt"] = ("\n".join(names) + "\n").encode()
    return {"cifar-100-python": pickled}, {"cifar-100-binary": binary}


def write_cifar(root, kind):
    """Both versions of the archive, pickled and binary, in the folder `root`."""
    for version, folders in zip(("python", "binary"), cifar_files(kind), strict=True):
        files = {f"{folder}/{name}": data for folder, files in folders.items() for name, data in files.items()}
        pack(root / f"cifar-{kind}-{version}.tar.gz", files, "w:gz")


def imagenet_train(jpeg):
    """The name and the bytes of ILSVRC2012's training archive with three classes of three images `jpeg(number)`."""
    inner = {f"n0000000{c}.tar": packed({f"n0000000{c}_{i}.JPEG": jpeg(4 * c + i) for i in range(3)}) for c in range(3)}
    return "ILSVRC2012_img_train.tar", packed(inner)


def imagenet_val(jpeg):
    """Of its validation archive with six images."""
    return "ILSVRC2012_img_val.tar", packed({f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in range(1, 7)})


def imagenet_v2(jpeg):
    """Of ImageNet V2's with five images under long names."""
    files = {f"imagenetv2-top-images-format-val/{i}/{'long' * 30}.jpeg": jpeg(i) for i in range(5)}
    return "imagenetv2-top-images.tar", packed(files, tarfile.PAX_FORMAT)


def labelled(samples):
    """The files of a WebDataset shard of (key, JPEG file, label) samples: odd labels in .cls, even ones in .json."""
    files = {}
    for key, data, label in samples:
        kind, text = ("cls", "%d") if label % 2 else ("json", '{"label": %d}')
        files |= {f"{key}.jpg": data, f"{key}.{kind}": (text % label).encode()}
    return files


def parquet(jpeg, **options):
    """The name and the bytes of a parquet file of seven images in row groups of three; `options` go to PyArrow."""
    pq = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(7)]
    file = io.BytesIO()
    table = hugging_face({"image": images, "label": [i % 2 for i in range(7)]}, ["cat", "dog"])
    pq.write_table(table, file, row_group_size=3, **options)
    return "train-00000-of-00001.parquet", file.getvalue()


def hugging_face(columns, names=None):
    """A table with the metadata that the datasets package writes."""
    table = pytest.importorskip("pyarrow").table(columns)
    if names is None:
        return table
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def refused(reason, source, split=None, class_names=None):
    """The message of the error with which opening a source ends, for a `reason`."""
    with pytest.raises(SourceError, match=reason) as error:
        open_source(source, split, class_names)
    return str(error.value)
