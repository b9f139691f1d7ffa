"""Mutated archives end in an error that names the file, or in samples that were in it.

FASTDEIT_FUZZ multiplies the number of cases; a case that takes longer than a minute ends the process with a traceback.
"""

import gzip
import os
import pickle
from collections import Counter

import numpy as np
import pytest

from archives import imagenet_train, imagenet_v2, imagenet_val, labelled, packed, parquet
from damage import BLOCK, edit_tar_header, guarded, mutate
from fastdeit.pipelines.sources import SampleError, SourceError, open_source

CASES = 40 * int(os.environ.get("FASTDEIT_FUZZ", "1"))  # of each kind


def jpeg(i):
    return b"\xff\xd8" + bytes([i]) * (100 + 60 * i) + b"\xff\xd9"


def cifar():
    rng = np.random.default_rng(0)
    files = {}
    for name in ("train", "test"):
        batch = {"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), "fine_labels": [5, 0, 7], "x": [b"y", 1.5]}
        files[f"cifar-100-python/{name}"] = pickle.dumps(batch, protocol=2)
    files["cifar-100-python/meta"] = pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}, protocol=2)
    return "cifar-100-python.tar.gz", packed(files)


KINDS = {
    "imagenet train": lambda: imagenet_train(jpeg),
    "imagenet val": lambda: imagenet_val(jpeg),
    "imagenet v2": lambda: imagenet_v2(jpeg),
    "webdataset": lambda: ("train-0000.tar", packed(labelled((f"{'folder' * 20}/{i}", jpeg(i), i) for i in range(5)))),
    "parquet": lambda: parquet(jpeg, compression="none", write_page_checksum=True),
    "parquet snappy": lambda: parquet(jpeg, compression="snappy"),
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
        with guarded(f"{kind}, case {case}", mutated):
            read_all(path, counts)
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
