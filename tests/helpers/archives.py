"""Tiny JPEGs, tar archives and a parquet file for the tests of sources, and sources that are refused."""

import io
import json
import tarfile

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
