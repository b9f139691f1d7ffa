"""Mutated archives end in an error that names the file, or in samples that were in it.

FASTDEIT_FUZZ multiplies the number of cases; a case that takes longer than a minute ends the process with a traceback.
"""

import faulthandler
import gzip
import io
import json
import os
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest

from archives import packed
from damage import BLOCK, edit_tar_header, mutate
from fastdeit.pipelines.sources import SampleError, SourceError, open_source

CASES = 40 * int(os.environ.get("FASTDEIT_FUZZ", "1"))  # of each kind
SECONDS = 60


def jpeg(i):
    return b"\xff\xd8" + bytes([i]) * (100 + 60 * i) + b"\xff\xd9"


def imagenet_train():
    inner = {f"n0000000{c}.tar": packed({f"n0000000{c}_{i}.JPEG": jpeg(4 * c + i) for i in range(3)}) for c in range(3)}
    return "ILSVRC2012_img_train.tar", packed(inner)


def imagenet_val():
    return "ILSVRC2012_img_val.tar", packed({f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in range(1, 7)})


def imagenet_v2():
    files = {f"imagenetv2-top-images-format-val/{i}/{'long' * 30}.jpeg": jpeg(i) for i in range(5)}
    return "imagenetv2-top-images.tar", packed(files, tarfile.PAX_FORMAT)


def webdataset():
    files = {}
    for i in range(5):
        files[f"{'folder' * 20}/{i}.jpg"] = jpeg(i)
        files[f"{'folder' * 20}/{i}.{'cls' if i % 2 else 'json'}"] = b"%d" % i if i % 2 else b'{"label": %d}' % i
    return "train-0000.tar", packed(files)


def parquet(compression):
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(7)]
    table = pyarrow.table({"image": images, "label": [i % 2 for i in range(7)]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    checked = compression == "none"
    pq.write_table(table, file, row_group_size=3, compression=compression, write_page_checksum=checked)
    return "train-00000-of-00001.parquet", file.getvalue()


def cifar():
    rng = np.random.default_rng(0)
    files = {}
    for name in ("train", "test"):
        batch = {"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), "fine_labels": [5, 0, 7], "x": [b"y", 1.5]}
        files[f"cifar-100-python/{name}"] = pickle.dumps(batch, protocol=2)
    files["cifar-100-python/meta"] = pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}, protocol=2)
    return "cifar-100-python.tar.gz", packed(files)


KINDS = {
    "imagenet train": imagenet_train,
    "imagenet val": imagenet_val,
    "imagenet v2": imagenet_v2,
    "webdataset": webdataset,
    "parquet": lambda: parquet("none"),
    "parquet snappy": lambda: parquet("snappy"),
    "cifar": cifar,
}


def read_all(path, counts):
    """The samples that opening and reading give; every error names the file, and is counted."""
    split = "train" if path.name.startswith("cifar") else None
    errors, samples = [], []
    try:
        source = open_source(path, split)
        counts["opened"] += 1
    except (SourceError, OSError) as error:
        source = ()
        errors.append(error)
        counts["refused"] += 1
    for i in range(len(source)):
        assert source.name(i).startswith(str(path))
        try:
            item, label, name = source.read(i)
        except (SampleError, SourceError, OSError) as error:
            errors.append(error)
            counts["bad samples"] += 1
            continue
        assert name == source.name(i)
        assert type(label) is int
        samples.append(item if isinstance(item, bytes) else item.tobytes())
    assert all(str(path) in str(error) for error in errors), errors
    counts["samples"] += len(samples)
    return samples


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_archives(kind, tmp_path):
    name, seed = KINDS[kind]()
    path = tmp_path / name
    if kind == "imagenet val":
        (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("n00000001\n" * 6)

    def write(data):
        path.write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)

    counts = Counter()
    write(seed)
    originals = read_all(path, counts)
    assert counts["samples"] == len(originals) >= 3
    rng = np.random.default_rng(list(KINDS).index(kind))
    for case in range(CASES):
        in_header = ".tar" in name and case % 3 == 0
        start = len(seed) * (case % 2) // 2
        mutated = edit_tar_header(seed, rng) if in_header else mutate(seed, rng, BLOCK, start=start)
        write(mutated)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            read_all(path, counts)
        except Exception as error:
            error.add_note(f"{kind}, case {case}: {mutated.hex()}")
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
    print(kind, dict(counts))  # shown by -rP
    assert counts["refused"]


@pytest.mark.parametrize("case", range(8))
def test_mutated_gzip(tmp_path, case):
    """A gzipped archive has a checksum: nothing mutated comes through, but for what its header may say of itself."""
    name, seed = cifar()
    zipped = gzip.compress(seed, mtime=0)
    path = tmp_path / name
    path.write_bytes(zipped)
    originals = read_all(path, Counter())
    rng = np.random.default_rng(case)
    for _ in range(CASES // 8):
        path.write_bytes(mutate(zipped, rng))
        assert read_all(path, Counter()) in ([], originals)
