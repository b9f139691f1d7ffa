"""Damaged and hostile shards end in an error that names a file, or in the right bytes: never outside of a file.

FASTDEIT_FUZZ multiplies the number of cases.
"""

import hashlib
import os
import shutil
import zlib

import numpy as np
import pytest

from damage import BLOCK, mutate, same_json, uniform
from fastdeit.pipelines.formats import sidecar
from fastdeit.pipelines.formats.beton_layout import JPEG, RAW
from fastdeit.pipelines.formats.shard_layout import SAMPLE, ShardError
from fastdeit.pipelines.formats.shards import ShardDataset
from fastdeit.pipelines.formats.sidecar import SidecarError
from pictures import picture
from tiny_datasets import reseal, stored, write

FUZZ = int(os.environ.get("FASTDEIT_FUZZ", "1"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "train"
    images = [picture(i, (9, 8 + i)) for i in range(7)]
    write(path, [stored(image, RAW if i % 2 else JPEG) for i, image in enumerate(images)], shard_size=3).close()
    return path


@pytest.fixture
def own(made, tmp_path):
    return shutil.copytree(made, tmp_path / "train")


def outcome(path, original):
    """The errors that opening, reading and checking give; what is read without one is as it was or so crc32 tells."""
    try:
        with ShardDataset(path) as dataset:
            found = dataset.check()
            crc32 = sidecar.crc32s(dataset.sidecar) if dataset.sidecar else None
            for i in range(len(dataset)):
                stored = dataset.read(i)
                assert stored.size == dataset.size[i]
                if crc32 is not None and zlib.crc32(stored) != crc32[i]:
                    found.append(f"{path}, sample {i}: crc32")
                elif crc32 is not None and not found:
                    assert stored.tobytes() == original[i]
            return found
    except (ShardError, SidecarError) as error:
        return [str(error)]


@pytest.fixture(scope="module")
def original(made):
    with ShardDataset(made) as dataset:
        return [dataset.read(i).tobytes() for i in range(len(dataset))]


@pytest.mark.parametrize(
    "name", ["samples.npy", "dataset.json", "shard-000000.tar", "shard-000001.idx", "nodes/node-000.txt"]
)
def test_a_damaged_file_is_found(own, original, name):
    data = (own / name).read_bytes()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(60 * FUZZ):
        changed = mutate(data, rng, BLOCK, place=uniform)
        (own / name).write_bytes(changed)
        found = outcome(own, original)
        assert bool(found) == (changed != data and not same_json(changed, data)), changed
        assert all(str(own) in sentence for sentence in found)


def seal(folder):
    """Make the sidecar fit the table again."""
    table = (folder / "samples.npy").read_bytes()
    reseal(folder / "dataset.json", metadata_hash=hashlib.sha256(table).hexdigest())


@pytest.mark.parametrize("sealed", [True, False])
def test_a_hostile_table_leads_nowhere(own, original, sealed):
    table = np.load(own / "samples.npy")
    if not sealed:
        (own / "dataset.json").unlink()
    rng = np.random.default_rng(1)
    extremes = np.array([0, 1, 2, 511, 512, 2**16, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    for _ in range(150 * FUZZ):
        changed = table.copy()
        for _ in range(rng.integers(1, 3)):
            name, at = str(rng.choice(SAMPLE.names)), int(rng.integers(len(table)))
            old = int(table[at][name])
            value = rng.choice(extremes) if rng.random() < 0.5 else np.uint64((old + int(rng.integers(-3, 4))) % 2**64)
            changed[name][at] = value.astype(changed[name].dtype)
        np.save(own / "samples.npy", changed)
        if sealed:
            seal(own)
        found = outcome(own, original)
        # The sides of a JPEG are in its own bytes: they are compared where it is decoded.
        judged, jpeg = changed.copy(), table["mode"] == JPEG
        for name in ("height", "width"):
            judged[name][jpeg] = table[name][jpeg]
        if (judged != table).any():
            assert found
        elif (changed == table).all():
            assert not found


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (7,), }",
        *(
            str({"descr": SAMPLE.descr, "fortran_order": False, "shape": shape})
            for shape in [(7, 1), (2**60,), (-1,), (8,), (), (7.0,), ("7",)]
        ),
        "{'descr': [('offset', '<u8', (1000000000000,))], 'fortran_order': False, 'shape': (7,), }",
        "{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (7,), }",
        "(" * 5000,
        "",
    ],
)
def test_a_hostile_header_of_the_table(own, header):
    data = (own / "samples.npy").read_bytes()
    text = header.encode() + b"\n"
    (own / "samples.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data[-7 * 37 :])
    with pytest.raises(ShardError, match=r"samples\.npy: "):
        ShardDataset(own)


def test_an_empty_table(own):
    np.save(own / "samples.npy", np.zeros(0, SAMPLE))
    with pytest.raises(ShardError, match=r"samples\.npy: it holds no samples"):
        ShardDataset(own)


@pytest.mark.parametrize("nodes", [10**18, -1, "2", None, [1], True, 2.0])
def test_a_hostile_sidecar(own, nodes):
    reseal(own / "dataset.json", nodes=nodes)
    with ShardDataset(own) as dataset:
        found = dataset.check()
    assert bool(found) == (nodes is not True)
    assert all(f"{own / 'nodes'}: " in sentence for sentence in found)
