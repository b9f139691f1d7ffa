"""The DALI loader against PIL: pixels of every kind of JPEG, what it must not accept, and life after a failure."""

import os
import time
from collections import Counter

import numpy as np
import pytest
import torch

from fastdeit.pipelines.formats.beton_layout import JPEG, RAW
from fastdeit.pipelines.loaders import dali
from fastdeit.pipelines.loaders.base import DecodeError
from fastdeit.pipelines.loaders.dali import DaliLoader
from fastdeit.pipelines.loaders.jpeg_markers import frame_size, is_common, is_whole
from fastdeit.pipelines.plan.order import EpochOrder, EvalOrder
from ordered import Ordered, assert_images, first_batch, need_loader
from pictures import SAMPLINGS, decoded_or_none, jpeg, picture, plain_file, random_jpegs
from refusals import refused
from tiny_datasets import stored, write

need_loader("dali")


@pytest.fixture
def opened(pool):
    def open_one(dataset, batch=None, order=None, **options):
        order = order or EvalOrder(len(dataset), batch=batch or len(dataset))
        return Ordered(DaliLoader(dataset, pool=pool, threads=2, **options), order)

    return open_one


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_pixel_is_pillows(opened, tmp_path, sampled_jpeg, sampling):
    rng = np.random.default_rng(SAMPLINGS.index(sampling))
    images = random_jpegs(sampled_jpeg, rng, sampling, times=16, quality=(5, 101))
    batch = first_batch(opened(write(tmp_path / "k.beton", images)))
    assert batch.fallbacks == []
    assert_images(batch, [decoded_or_none(data) for data, _ in images])


@pytest.mark.parametrize("kind", ["rotated", "cmyk", "keep_rgb", "mpo", "trailing"])
def test_other_plain_files(opened, tmp_path, kind):
    data, size = plain_file(kind)
    batch = first_batch(opened(write(tmp_path / "k.beton", [(data, size)])))
    assert batch.fallbacks == []
    np.testing.assert_array_equal(batch.image(0), decoded_or_none(data))


def mutated(rng, data):
    """Damage without a second scan spliced in: DALI reads the first scan of such a file, and Pillow refuses it."""
    data = bytearray(data)
    kind, at = rng.integers(4), int(rng.integers(2, len(data)))
    if kind == 0:
        return bytes(data[: at + 20])
    if kind == 1:
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(2, len(data))] = rng.integers(256)
        return bytes(data)
    other = rng.integers(0, 256, rng.integers(1, 20), dtype=np.uint8).tobytes()
    return bytes(data[:at]) + (b"" if kind == 2 else other) + bytes(data[at + (len(other) if kind == 2 else 0) :])


@pytest.mark.slow
def test_what_pillow_refuses_is_never_accepted(opened, tmp_path):
    rng = np.random.default_rng(11)
    size = (72, 56)
    whole = [jpeg(picture(i, size), subsampling=i % 3, progressive=i % 4 == 3) for i in range(12)]
    whole += [jpeg(picture(i, size), restart_marker_rows=1) for i in range(4)]
    images = [mutated(rng, whole[rng.integers(len(whole))]) for _ in range(600)]
    images = [data for data in images if frame_size(np.frombuffer(data, np.uint8)) == size[::-1]]
    assert len(images) > 400
    dataset = write(tmp_path / "m.beton", [(data, size) for data in images])
    seen = Counter()
    with opened(dataset) as loader:
        out = np.empty((size[1], size[0], 3), np.uint8)
        for index, data in enumerate(images):
            expected = decoded_or_none(data)
            try:
                own = loader.decode_image(index, out)
            except DecodeError:
                assert expected is None
                seen["refused"] += 1
                continue
            assert expected is not None
            np.testing.assert_array_equal(out, expected)
            seen["by DALI" if own else "by PIL"] += 1
    assert min(seen["refused"], seen["by DALI"], seen["by PIL"]) > 10


def test_stray_markers_and_missing_ends_are_found():
    """DALI reads zeros after a marker that has no place in a scan, and says nothing: PIL has to judge."""
    data = jpeg(picture(0, (90, 70)), quality=95)
    scan = data.index(b"\xff\xda")
    at = scan + (len(data) - scan) // 2
    for marker in (b"\xff\x5c", b"\xff\xd8", b"\xff\x01", b"\xff\xf5"):
        assert not is_whole(np.frombuffer(data[:at] + marker + data[at + 2 :], np.uint8), 64)
    array = np.frombuffer(data, np.uint8)
    assert is_whole(array, 64)
    assert not any(is_whole(array[:end], 64) for end in range(len(array)))
    progressive = np.frombuffer(jpeg(picture(0, (90, 70)), progressive=True), np.uint8)
    assert is_whole(progressive, 64)
    assert not is_whole(progressive, 2)


@pytest.fixture
def failing(monkeypatch):
    """Files whose Huffman tables DALI gets damaged, so that its pipeline fails; and how many it got at a time."""
    monkeypatch.setattr(dali, "_CPU_CHUNK", 64)
    bad, runs = set(), []
    build = DaliLoader._build

    def damaged(data):
        lengths = data.tobytes().index(b"\xff\xc4") + 5
        return np.concatenate([data[:lengths], np.full(16, 255, np.uint8), data[lengths + 16 :]])

    def damaging(loader):
        pipeline = build(loader)
        feed = pipeline.feed_input

        def feed_damaged(name, data):
            runs.append(len(data))
            feed(name, [damaged(jpeg) if jpeg.tobytes() in bad else jpeg for jpeg in data])

        pipeline.feed_input = feed_damaged
        return pipeline

    monkeypatch.setattr(DaliLoader, "_build", damaging)
    return bad, runs


def test_a_failed_batch_is_halved_until_the_image_is_found(opened, tmp_path, failing):
    bad, runs = failing
    images = [jpeg(picture(i, (50 + i, 40))) for i in range(40)]
    bad.update(images[i] for i in (7, 30))
    dataset = write(tmp_path / "f.beton", [(data, (50 + i, 40)) for i, data in enumerate(images)])
    with opened(dataset) as loader:
        for epoch in (0, 1):
            batch = next(loader.batches(epoch))
            assert batch.fallbacks == [7, 30]
            assert_images(batch, map(decoded_or_none, images))
            if epoch == 0:
                assert runs[:3] == [40, 20, 10]
                assert sum(runs) < 40 + 4 * 40
                del runs[:]
    assert runs == [38]  # those it refused are not given to it again


def test_headers_that_its_parser_refuses_harm_no_image(opened, tmp_path, monkeypatch):
    """DALI 2.4 leaves other tasks running in memory that it has given back when one of a batch has such a header."""
    monkeypatch.setattr(dali, "_CPU_CHUNK", 64)
    images = [bytearray(jpeg(picture(i, (50 + i, 40)))) for i in range(40)]
    for i, (field, value) in {7: (9, 2), 20: (4, 12)}.items():  # components, bits
        images[i][images[i].index(b"\xff\xc0") + field] = value
        assert not is_common(np.frombuffer(images[i], np.uint8))
    dataset = write(tmp_path / "h.beton", [(bytes(data), (50 + i, 40)) for i, data in enumerate(images)])
    with opened(dataset, on_error="replace") as loader:
        for epoch in range(20):
            batch = next(loader.batches(epoch))
            assert batch.replaced == [(7, 8), (20, 21)]
            np.testing.assert_array_equal(batch.image(6), decoded_or_none(bytes(images[6])))


def test_damage_among_good_images(opened, tmp_path):
    images = [(jpeg(picture(i, (50 + i, 40))), (50 + i, 40)) for i in range(40)]
    images[20] = images[20][0][:-300], images[20][1]
    dataset = write(tmp_path / "d.beton", images)
    with opened(dataset) as loader, pytest.raises(DecodeError, match=r"d\.beton: image 20: PIL cannot read it"):
        next(loader.batches(0))
    with opened(dataset, batch=10) as loader:
        steps = loader.batches(0, 1)
        before = next(steps)
        refused("image 20", next, steps, error=DecodeError)
        after = next(loader.batches(0, 3))
    for first, batch in ((10, before), (30, after)):
        assert_images(batch, [decoded_or_none(data) for data, _ in images[first : first + 10]])


def test_chunks_and_raw_images(opened, tmp_path, monkeypatch):
    """More images than DALI gets at once, and raw ones between them."""
    monkeypatch.setattr(dali, "_CPU_CHUNK", 6)
    pictures = [picture(i, (30 + i, 40)) for i in range(25)]
    samples = [stored(image, RAW if i % 4 == 1 else JPEG) for i, image in enumerate(pictures)]
    batch = first_batch(opened(write(tmp_path / "c.beton", samples)))
    assert_images(batch, [image if i % 4 == 1 else decoded_or_none(jpeg(image)) for i, image in enumerate(pictures)])


def test_closing_frees_the_pipeline(opened, tmp_path):
    def threads():
        """Their number, once those that are ending, also of other tests, have ended: the same for half a second."""
        counts = []
        while len(set(counts[-6:])) != 1 or len(counts) < 6:
            assert len(counts) < 100
            counts.append(len(os.listdir("/proc/self/task")))
            time.sleep(0.1)
        return counts[-1]

    dataset = write(tmp_path / "t.beton", [(jpeg(picture(0, (50, 40))), (50, 40))] * 4)
    with opened(dataset) as loader:
        next(loader.batches(0))
    before = threads()
    loaders = [opened(dataset) for _ in range(3)]
    for loader in loaders:
        next(loader.batches(0))
    assert threads() >= before + 6  # two each decode
    for loader in loaders:
        loader.close()
        loader.close()
    assert threads() == before


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def on_device(request, opened):
    """Function: a loader whose batches are tensors on a GPU, or, as a stand-in, on the host."""

    def open_one(dataset, **options):
        loader = opened(dataset, **options, **({"device_id": 0, "on_device": True} if request.param == "gpu" else {}))
        if request.param == "host":
            loader.loader._device = torch.device("cpu")
        return loader

    return open_one


def test_pixels_stay_on_the_device(opened, on_device, tmp_path, monkeypatch):
    """Decoded there, or on the host where PIL must or nothing is to be decoded; and copied from the step before."""
    monkeypatch.setattr(dali, "_CPU_CHUNK", 6)
    samples = [stored(picture(i, (30 + i, 40)), RAW if i % 4 == 1 else JPEG) for i in range(21)]
    dataset = write(tmp_path / "d.beton", samples)
    order = EpochOrder(21, global_batch=7, seed=0, rank=0, world=1, repeats=3, group_size=7, cell_groups=1)
    with on_device(dataset, order=order) as loader, opened(dataset, order=order) as plain:
        loader._unfit.add(3)  # as if DALI had refused it
        fallbacks = set()
        for ours, theirs in zip(loader.batches(0), plain.batches(0), strict=True):
            assert isinstance(ours.pixels, torch.Tensor)
            for slot in range(len(theirs.offset)):
                difference = ours.image(slot).cpu().int() - torch.from_numpy(theirs.image(slot)).int()
                assert difference.abs().float().mean() <= (2 if ours.pixels.is_cuda else 0)
            assert theirs.fallbacks == []
            fallbacks.update(ours.fallbacks)
        assert loader.reused == plain.reused > 0
        assert fallbacks == {3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_decoding_there_says_so(opened, tmp_path):
    dataset = write(tmp_path / "g.beton", [(jpeg(picture(0, (50, 40))), (50, 40))])
    refused(r"DALI cannot build its pipeline \(.*\): .*use another loader", opened, dataset, device_id=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_pixels_are_close_to_pillows(opened, tmp_path):
    images = [(jpeg(picture(i, (200 + i, 160))), (200 + i, 160)) for i in range(40)]
    with opened(write(tmp_path / "g.beton", images), device_id=0) as loader:
        assert loader.name == "dali-mixed"
        batch = next(loader.batches(0))
    for slot, (data, _) in enumerate(images):
        difference = np.abs(batch.image(slot).astype(int) - decoded_or_none(data))
        assert difference.mean() < 2
