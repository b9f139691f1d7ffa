"""A flipped bit is noticed when its image is first read, by every loader, in both formats. Judge: Pillow."""

import zlib

import numpy as np
import pytest

from fastdeit.pipelines.formats import checksums
from fastdeit.pipelines.formats.beton_layout import JPEG, RAW, sidecar_path
from fastdeit.pipelines.formats.checksums import Checksums, unchecked
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.loaders.base import DecodeError
from fastdeit.pipelines.loaders.choose import choose_loader, open_loader
from fastdeit.pipelines.loaders.prefetch import make_pool
from fastdeit.pipelines.plan.order import EpochOrder, EvalOrder
from pictures import decoded_or_none, picture
from tiny_datasets import stored, write

COUNT, SIDE, RAW_AT = 20, 64, 7


def rot(stored, rng):
    """The JPEG with one bit flipped that Pillow still decodes, to other pixels."""
    whole = decoded_or_none(stored)
    while True:
        data = bytearray(stored)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        pixels = decoded_or_none(bytes(data))
        if pixels is not None and pixels.shape == whole.shape and (pixels != whole).any():
            return bytes(data)


@pytest.fixture(scope="module", params=["beton", "shards"])
def rotten(request, tmp_path_factory):
    """A data set whose file rotted after it was written: a bit in each of five images that decode all the same."""
    path = tmp_path_factory.mktemp(request.param) / ("x.beton" if request.param == "beton" else "x")
    rng = np.random.default_rng(0)
    samples = [stored(picture(i, (SIDE, SIDE)), RAW if i == RAW_AT else JPEG) for i in range(COUNT)]
    write(path, samples).close()
    with open_dataset(path) as dataset:
        file = path if path.is_file() else path / "shard-000000.tar"
        with open(file, "r+b") as written:
            for i in (2, RAW_AT, 11, 12, COUNT - 1):
                data = samples[i][0]
                data = rot(data, rng) if i != RAW_AT else bytes([data[0] ^ 4]) + data[1:]
                written.seek(int(dataset.offset[i]))
                written.write(data)
    return path


BAD = {2: 3, RAW_AT: 8, 11: 13, 12: 13, COUNT - 1: 0}


@pytest.mark.slow
def test_no_rotten_image_trains(opened, rotten):
    with open_dataset(rotten) as dataset:
        for bad in BAD:
            order = EvalOrder(COUNT, batch=1)
            with opened(dataset, order) as loader, pytest.raises(DecodeError) as caught:
                next(loader.batches(0, bad))
            expected = f"{rotten}: image {bad}: its checksum (crc32) does not match; copy the data set"
            assert str(caught.value).startswith(expected)


def test_they_are_replaced_and_counted_where_that_is_asked_for(opened, rotten):
    with open_dataset(rotten) as dataset:
        order = EpochOrder(COUNT, global_batch=8, group_size=4, repeats=3, seed=1)
        for epoch in (0, 1):  # the same whether images were compared before or not
            with opened(dataset, order, on_error="replace") as loader:
                for batch in loader.batches(epoch):
                    assert batch.replaced == sorted((i, BAD[i]) for i in set(batch.index.tolist()) & set(BAD))
                    assert batch.label.tolist() == [BAD.get(i, i) for i in batch.index.tolist()]


def test_auto_says_so_too(rotten):
    with open_dataset(rotten) as dataset, make_pool(2) as pool:
        order = EvalOrder(COUNT, batch=COUNT)
        samples = order.step(0, 0)
        name, _ = choose_loader(dataset, samples, pool=pool, threads=2)
        with open_loader(name, dataset, pool=pool, threads=2) as loader, pytest.raises(DecodeError):
            loader.decode(samples)


def test_an_image_is_compared_once(monkeypatch):
    """The second epoch costs nothing."""
    counted = []
    monkeypatch.setattr(checksums.zlib, "crc32", lambda data: counted.append(1) or zlib.adler32(data))
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 256, 999, np.uint8) for _ in range(5)]
    sums = Checksums(np.array([zlib.adler32(d) for d in data], np.uint32))
    assert all(sums.fits(i, d) for _ in range(3) for i, d in enumerate(data))
    assert len(counted) == 5


def test_a_data_set_without_checksums_is_announced(rotten):
    if rotten.is_dir():
        pytest.skip("plain FFCV writes beton files alone")
    described = sidecar_path(rotten)
    away = described.rename(described.with_name("away"))
    try:
        with open_dataset(rotten) as dataset:
            assert "has no checksums" in unchecked(dataset.path, dataset.checksums)
    finally:
        away.rename(described)
    with open_dataset(rotten) as dataset:
        assert unchecked(dataset.path, dataset.checksums) is None
