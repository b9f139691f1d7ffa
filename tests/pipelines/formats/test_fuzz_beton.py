"""Damaged and hostile beton files end in an error that names them, or in the right pixels: never outside of the file.

FASTDEIT_FUZZ multiplies the number of cases.
"""

import hashlib
import os
import struct

import numpy as np
import pytest

from damage import mutate, same_json
from fastdeit.pipelines.conversion.verify import verify
from fastdeit.pipelines.formats import sidecar
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.beton_layout import JPEG, MIN_PAGE, RAW, BetonError, sidecar_path
from fastdeit.pipelines.formats.sidecar import SidecarError
from fastdeit.pipelines.loaders.base import DecodeError, read_stored, read_with_pil
from pictures import decoded, picture
from tiny_datasets import reseal, stored, write

FUZZ = int(os.environ.get("FASTDEIT_FUZZ", "1"))
COUNT = 9
# Offsets in the file, as FFCV's types.py lays it out: header of 24 bytes, two fields of 1041, records of 24.
RECORD = 24 + 2 * 1041
EXTREMES = [0, 1, 2, 255, 2**15, 2**16 - 1, 2**21, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 24, 2**64 - 1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "x.beton"
    images = [picture(i, (31, 20 + i)) for i in range(COUNT)]
    write(path, [stored(image, RAW if i % 3 == 2 else JPEG) for i, image in enumerate(images)]).close()
    return path.read_bytes(), sidecar_path(path).read_bytes()


@pytest.fixture(scope="module")
def pixels(made, tmp_path_factory):
    """The images, decoded by plain PIL."""
    path = tmp_path_factory.mktemp("right") / "x.beton"
    path.write_bytes(made[0])
    with BetonDataset(path) as dataset:
        return [
            decoded(dataset.read(i).tobytes())
            if dataset.is_jpeg(i)
            else dataset.read(i).reshape(dataset.height[i], dataset.width[i], 3)
            for i in range(COUNT)
        ]


def outcome(path, pixels=None):
    """Open, read and decode everything; the errors. With `pixels`, what has none is to be right."""
    try:
        dataset = BetonDataset(path)
    except (BetonError, SidecarError) as error:
        return [str(error)]
    found = dataset.check()
    assert all(str(path) in sentence for sentence in found)
    with dataset:
        crc32 = None if dataset.sidecar is None else sidecar.crc32s(dataset.sidecar)
        for i in range(len(dataset)):
            height, width = int(dataset.height[i]), int(dataset.width[i])
            assert 0 <= dataset.offset[i] < dataset.offset[i] + dataset.size[i] <= path.stat().st_size
            try:
                if dataset.is_jpeg(i):
                    out = np.empty((height, width, 3), np.uint8)
                    read_with_pil(dataset, i, out)
                else:
                    out = read_stored(dataset, i).reshape(height, width, 3)
            except DecodeError as error:
                found.append(str(error))
                continue
            if crc32 is not None and pixels is not None and sidecar.binascii.crc32(dataset.read(i)) == crc32[i]:
                np.testing.assert_array_equal(out, pixels[i])
    return found


def telling(rng, size):
    """A place in a table, most of the time, because most of the file is zeros."""
    tables = [(0, 24), (24, RECORD), (RECORD, RECORD + 24 * COUNT), (size - 24 * COUNT, size)]
    where = [*tables, (MIN_PAGE, size), (0, size)]
    region = where[rng.integers(len(where))]
    return int(rng.integers(*(region if 0 <= region[0] < region[1] <= size else (0, size))))


@pytest.mark.slow
@pytest.mark.parametrize("described", [True, False])
def test_damage_is_named_or_harmless(made, pixels, tmp_path, described):
    path = tmp_path / "x.beton"
    if described:
        sidecar_path(path).write_bytes(made[1])
    rng = np.random.default_rng(described)
    refused = 0
    for case in range(150 * FUZZ):
        changed = mutate(made[0], rng, place=telling, lengths=EXTREMES)
        path.write_bytes(changed)
        found = outcome(path, pixels)
        assert all(str(path) in sentence for sentence in found)
        refused += bool(found)
        if described and case % 5 == 0:
            assert verify(path, workers=1, progress=False).ok == (changed == made[0])
    assert refused > 100 * FUZZ


def test_a_damaged_sidecar(made, tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(made[0])
    rng = np.random.default_rng(7)
    for _ in range(150 * FUZZ):
        data = bytearray(made[1])
        for _ in range(rng.integers(1, 4)):
            at, length = int(rng.integers(len(data))), int(rng.integers(1, 60))
            match rng.integers(3):
                case 0:
                    data[at] = int(rng.integers(256))
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = rng.choice([b"[", b"{", b"9" * 5000, b"null", b"1e999", b'"', rng.bytes(length)])
        sidecar_path(path).write_bytes(data)
        found = outcome(path)
        assert bool(found) != same_json(data, made[1])
        assert all(str(path) in sentence for sentence in found)


def seal(path):
    """Make the sidecar fit the tables again."""
    records = path.read_bytes()[RECORD : RECORD + 24 * COUNT]
    reseal(sidecar_path(path), metadata_hash=hashlib.sha256(records).hexdigest())


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [True, False])
def test_tables_that_agree_with_each_other_lead_nowhere_else(made, tmp_path, sealed):
    """Record and allocation are changed together, so that only what the file can hold stops them."""
    path = tmp_path / "x.beton"
    rng = np.random.default_rng(3)
    size = len(made[0])
    reached = 0
    for _ in range(150 * FUZZ):
        data = bytearray(made[0])
        table = size - 24 * COUNT
        for _ in range(rng.integers(1, 3)):
            i = int(rng.integers(COUNT))
            record, allocation = RECORD + 24 * i, table + 24 * i
            near = [size, table, table - 1, RECORD, MIN_PAGE, 2 * MIN_PAGE, *EXTREMES]
            value = int(rng.choice(np.array(near, np.uint64)))
            match rng.integers(4):
                case 0:  # place
                    data[record + 5 : record + 13] = data[allocation + 8 : allocation + 16] = struct.pack("<Q", value)
                case 1:  # length
                    data[allocation + 16 : allocation + 24] = struct.pack("<Q", value)
                case 2:  # sides
                    data[record + 1 : record + 5] = struct.pack("<HH", *rng.integers(0, 2**16, 2).tolist())
                case 3:  # kind
                    data[record] ^= 1
        path.write_bytes(data)
        if sealed:
            sidecar_path(path).write_bytes(made[1])
            seal(path)
        found = outcome(path)
        reached += "outside" in "".join(found)
        assert found or data == made[0]
    assert reached > 20 * FUZZ


@pytest.mark.parametrize("number", [2**60, 2**64 - 1, 2**64 // 24 + 1, COUNT + 1, COUNT - 1])
def test_a_hostile_number_of_samples(made, tmp_path, number):
    path = tmp_path / "x.beton"
    data = bytearray(made[0])
    data[8:16] = struct.pack("<Q", number)
    path.write_bytes(data)
    with pytest.raises(BetonError, match="do not fit a file"):
        BetonDataset(path)


def test_a_file_that_shrinks_while_it_is_read(made, pixels, tmp_path):
    """A mapped file would end the process here."""
    path = tmp_path / "x.beton"
    for keep in (0, RECORD, MIN_PAGE, MIN_PAGE + 3000, len(made[0]) - 300):
        path.write_bytes(made[0])
        with BetonDataset(path) as dataset:
            os.truncate(path, keep)
            for i in range(COUNT):
                out = np.empty((dataset.height[i], dataset.width[i], 3), np.uint8)
                if dataset.offset[i] + dataset.size[i] > keep:
                    with pytest.raises(BetonError, match=rf"x\.beton, sample {i}: the file was cut short"):
                        read_with_pil(dataset, i, out)
                elif dataset.is_jpeg(i):
                    read_with_pil(dataset, i, out)
                    np.testing.assert_array_equal(out, pixels[i])
            assert dataset.check()
