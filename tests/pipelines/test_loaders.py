"""Both loaders against PIL, PyTorch's own sampler of indices, and damaged files; one suite for both."""

import importlib.util
import io
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

from fastdeit.pipelines.beton import JPEG, MIN_PAGE, RAW, BetonDataset, BetonWriter
from fastdeit.pipelines.loader_ffcv import FfcvLoader
from fastdeit.pipelines.loading import open_loader
from fastdeit.pipelines.order import EpochOrder, EvalOrder
from fastdeit.pipelines.pool import Prefetcher, make_pool
from fastdeit.pipelines.threaded import DecodeError

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
NAMES = ["torch", pytest.param("ffcv", marks=needs_ffcv)]
# What libjpeg-turbo's fast DCT may differ from PIL: most and mean absolute levels, by quality. See `FfcvLoader`.
FAST_DCT = {75: (10, 1.2), 85: (10, 1.2), 92: (10, 1.2), 95: (20, 1.8)}


def picture(seed, size):
    """A smooth image, (width, height) pixels."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return noise.filter(ImageFilter.GaussianBlur(2))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def write(path, samples):
    """A beton file of (bytes, (width, height), mode) samples; labels count 0, 3, 6, ..."""
    with BetonWriter(path, len(samples), page_size=MIN_PAGE) as writer:
        for i, (data, (width, height), mode) in enumerate(samples):
            writer.add(data, height=height, width=width, label=3 * i, mode=mode)
        writer.finish(class_names=[f"c{i}" for i in range(3 * len(samples))], source={}, options={}, counts={})
    return BetonDataset(path)


def with_pil(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pil_pixels(dataset, index):
    return with_pil(dataset.read(index).tobytes())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """40 JPEGs of different sizes."""
    sizes = [(33 + 7 * (i % 5), 40 + i) for i in range(40)]
    samples = [(jpeg(picture(i, size)), size, JPEG) for i, size in enumerate(sizes)]
    return write(tmp_path_factory.mktemp("many") / "many.beton", samples)


@pytest.fixture
def pool():
    with make_pool(3) as pool:
        yield pool


@pytest.fixture(params=NAMES)
def opened(request, pool):
    """Opens the loader under test on a data set and an order; by default evaluation in batches of 8."""

    def open_one(dataset, order=None):
        order = order or EvalOrder(len(dataset), batch=8)
        return open_loader(request.param, dataset, order, pool=pool, threads=3)

    open_one.name = request.param
    return open_one


class Reading:
    """A data set that counts what is read of it."""

    def __init__(self, dataset):
        self.dataset, self.counts = dataset, Counter()

    def __len__(self):
        return len(self.dataset)

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def read(self, index):
        self.counts[index] += 1
        return self.dataset.read(index)


def check_pixels(dataset, batch):
    most, mean = FAST_DCT[92]
    for slot in range(len(batch.offset)):
        index = batch.index[np.nonzero(batch.source == slot)[0][0]]
        difference = np.abs(batch.image(slot).astype(int) - pil_pixels(dataset, index))
        assert difference.max() <= most
        assert difference.mean() <= mean


def test_batches_are_those_of_the_order(opened, many):
    order = EpochOrder(len(many), global_batch=24, group_size=4, seed=5)
    for epoch in (0, 3):
        with opened(many, order) as loader:
            batches = list(loader.batches(epoch))
        assert [(b.epoch, b.step) for b in batches] == [(epoch, step) for step in range(order.steps)]
        for batch in batches:
            np.testing.assert_array_equal(batch.index, order.step(epoch, batch.step).index)
            np.testing.assert_array_equal(batch.label, 3 * batch.index)
            assert batch.fallbacks == []
            # Distinct images, in the order that they first appear in.
            assert list(dict.fromkeys(batch.index.tolist())) == [
                batch.index[batch.source == slot][0] for slot in range(len(batch.offset))
            ]
            assert (batch.height[batch.source] == many.height[batch.index]).all()
            check_pixels(many, batch)


def test_images_do_not_overlap_and_are_aligned(opened, many):
    with opened(many) as loader:
        batch = next(iter(loader.batches(0)))
    assert ((batch.pixels.ctypes.data + batch.offset) % 64 == 0).all()
    end = batch.offset + batch.height.astype(np.int64) * batch.width * 3
    assert (end[:-1] <= batch.offset[1:]).all()
    assert end[-1] <= len(batch.pixels)


def test_each_image_is_decoded_once_for_all_its_copies(opened, many):
    order = EpochOrder(len(many), global_batch=20, group_size=4, repeats=3)  # 20 is no multiple of 3
    reading = Reading(many)
    with opened(reading, order) as loader:
        batches = list(loader.batches(2))
    images = {i for b in batches for i in b.index.tolist()}
    straddling = sum(len(set(a.index.tolist()) & set(b.index.tolist())) for a, b in itertools.pairwise(batches))
    assert straddling > 0
    assert reading.counts == Counter(dict.fromkeys(images, 1))
    assert (loader.decoded, loader.reused) == (len(images), straddling)
    for batch in batches:
        check_pixels(many, batch)


def test_a_step_is_the_same_from_any_start(opened, many):
    order = EpochOrder(len(many), global_batch=8, group_size=4)
    with opened(many, order) as loader:
        whole = list(loader.batches(1))
        for first in range(order.steps + 1):
            rest = list(loader.batches(1, first))
            assert [b.step for b in rest] == list(range(first, order.steps))
            for batch, same in zip(rest, whole[first:], strict=True):
                np.testing.assert_array_equal(batch.index, same.index)
                for slot in range(len(batch.offset)):
                    np.testing.assert_array_equal(batch.image(slot), same.image(slot))


def test_last_step_of_an_evaluation_is_smaller(opened, many):
    with opened(many, EvalOrder(len(many), batch=16, rank=1, world=3)) as loader:
        index = [b.index.tolist() for b in loader.batches(0)]
    assert index == [list(range(1, 40, 3))]


def test_a_batch_stays_as_it_is_while_later_ones_are_decoded(opened, many):
    with opened(many) as loader, Prefetcher(loader.batches(0), 2) as batches:
        first = next(batches)
        before = first.pixels.copy()
        rest = list(batches)
        np.testing.assert_array_equal(first.pixels, before)
    assert len(rest) == 4


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("quality", FAST_DCT)
def test_photographs_differ_from_pil_within_the_bound(opened, tmp_path, quality, subsampling):
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    data = [jpeg(image, quality=quality, subsampling=subsampling) for image in photographs]
    dataset = write(tmp_path / "p.beton", [(d, i.size, JPEG) for d, i in zip(data, photographs, strict=True)])
    with opened(dataset) as loader:
        batch = next(iter(loader.batches(0)))
    most, mean = FAST_DCT[quality] if opened.name == "ffcv" else (0, 0)
    for slot, stored in enumerate(data):
        difference = np.abs(batch.image(slot).astype(int) - with_pil(stored))
        assert difference.max() <= most
        assert difference.mean() <= mean


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "L"},
        {"progressive": True},
        {"subsampling": "4:2:2"},
        {"exif": b"Exif\0\0" + bytes(300)},
        {"dpi": (9, 9)},
    ],
    ids=["gray", "progressive", "4:2:2", "exif", "dpi"],
)
def test_kinds_of_jpeg(opened, tmp_path, options):
    options = dict(options)
    image = picture(1, (61, 47)).convert(options.pop("mode", "RGB"))
    dataset = write(tmp_path / "k.beton", [(jpeg(image, **options), image.size, JPEG)])
    with opened(dataset) as loader:
        batch = next(iter(loader.batches(0)))
    check_pixels(dataset, batch)
    assert batch.fallbacks == []


def test_raw_pixels_are_copied(opened, tmp_path):
    images = [picture(i, (20 + i, 17)) for i in range(5)]
    dataset = write(tmp_path / "r.beton", [(i.tobytes(), i.size, RAW) for i in images])
    with opened(dataset) as loader:
        batch = next(iter(loader.batches(0)))
    for slot, image in enumerate(images):
        np.testing.assert_array_equal(batch.image(slot), np.asarray(image))


def test_what_the_decoder_refuses_is_read_by_pil_and_listed(opened, tmp_path):
    plain = jpeg(picture(2, (40, 30)))
    stored = [
        plain,
        jpeg(picture(1, (40, 30)).convert("CMYK")),
        plain[:20] + bytes(3) + plain[20:],  # stray bytes between the headers
        plain[:-200] + b"\xfe" * 100 + plain[-100:],  # no such Huffman codes: libjpeg warns, and reads on
    ]
    dataset = write(tmp_path / "c.beton", [(data, (40, 30), JPEG) for data in stored])
    with opened(dataset) as loader:
        batch = next(iter(loader.batches(0)))
    assert batch.fallbacks == ([1, 2, 3] if opened.name == "ffcv" else [])
    for slot in (1, 2, 3):
        np.testing.assert_array_equal(batch.image(slot), with_pil(stored[slot]))
    check_pixels(dataset, batch)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "no_end", "header_only"])
def test_a_damaged_image_is_named_after_the_batches_before_it(opened, tmp_path, damage):
    good = jpeg(picture(0, (90, 70)), quality=95)
    bad = {
        "truncated": good[: len(good) // 2],
        "garbage": bytes(range(256)) * 4,
        "no_end": good[:-60],
        "header_only": good[:150],
    }[damage]
    samples = [(good, (90, 70), JPEG)] * 12
    samples[10] = (bad, (90, 70), JPEG)
    dataset = write(tmp_path / "bad.beton", samples)
    with opened(dataset) as loader, Prefetcher(loader.batches(0), 2) as batches:
        assert next(batches).step == 0
        with pytest.raises(DecodeError, match=r"bad\.beton: image 10: PIL cannot read it .*; replace .* convert"):
            next(batches)


@pytest.mark.parametrize("stored", [(90, 70), (45, 35), (180, 140), (70, 90)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_wrong_size_in_the_data_set_is_never_scaled_to_fit(opened, tmp_path, stored, progressive):
    data = jpeg(picture(0, stored), progressive=progressive)
    dataset = write(tmp_path / "size.beton", [(data, (90, 71), JPEG)])
    with (
        opened(dataset) as loader,
        pytest.raises(DecodeError, match=rf"image 0: the JPEG is {stored[0]} x {stored[1]} "),
    ):
        next(iter(loader.batches(0)))


def test_a_worker_exception_stops_the_others_and_surfaces(opened, many, monkeypatch):
    with opened(many, EvalOrder(len(many), batch=40)) as loader:
        started = []

        def decode(index, out):
            started.append(index)
            if index == 3:
                raise MemoryError("no room")
            time.sleep(0.02)
            return True

        monkeypatch.setattr(loader, "decode", decode)
        with pytest.raises(MemoryError, match="no room"):
            next(iter(loader.batches(0)))
        count = len(started)
        assert count < 12
        time.sleep(0.05)
        assert len(started) == count


def test_the_loader_can_be_used_after_an_error(opened, many, monkeypatch):
    with opened(many) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(loader, "decode", lambda index, out: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                next(iter(loader.batches(0)))
        check_pixels(many, next(iter(loader.batches(0))))


def test_closing_stops_a_step_that_is_being_decoded(opened, many, monkeypatch):
    loader = opened(many, EvalOrder(len(many), batch=40))
    entered, seen = threading.Event(), []

    def decode(index, out):
        entered.set()
        seen.append(index)
        time.sleep(0.05)
        return True

    monkeypatch.setattr(loader, "decode", decode)
    with Prefetcher(loader.batches(0), 1) as batches:
        entered.wait(5)
        loader.close()
        with pytest.raises(RuntimeError, match="closed while it decoded"):
            next(batches)
    assert len(seen) < 12


def test_closing_early_leaves_no_thread(opened, many, pool):
    before = set(threading.enumerate())
    for _ in range(3):
        with opened(many) as loader, Prefetcher(loader.batches(0), 2) as batches:
            next(batches)
    left = set(threading.enumerate()) - before
    assert all(thread.name.startswith("fastdeit-worker") for thread in left)  # the pool's own, shared
    assert len(left) <= 3


SCRIPT = """
import sys, time
from fastdeit.pipelines.beton import BetonDataset
from fastdeit.pipelines.loading import open_loader
from fastdeit.pipelines.order import EpochOrder
from fastdeit.pipelines.pool import Prefetcher, make_pool

name, path = sys.argv[1:]
dataset = BetonDataset(path)
with make_pool(2) as pool:
    order = EpochOrder(len(dataset), global_batch=20, group_size=4)
    with open_loader(name, dataset, order, pool=pool, threads=2) as loader:
        epoch = 0
        while True:
            epoch += 1
            with Prefetcher(loader.batches(epoch), 2) as batches:
                for _ in batches:
                    if epoch == 2:
                        print("ready", flush=True)
"""


def test_ctrl_c_ends_the_program(opened, many):
    command = [sys.executable, "-c", SCRIPT, opened.name, str(many.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


@needs_ffcv
def test_auto_is_ffcv_and_says_why(many, pool):
    loader = open_loader("auto", many, EvalOrder(40, batch=8), pool=pool, threads=1)
    assert isinstance(loader, FfcvLoader)
    assert loader.name == "ffcv"
    assert "_libffcv" in loader.reason


@needs_ffcv
def test_ffcv_itself_is_not_imported(many):
    code = "import sys; from fastdeit.pipelines.loader_ffcv import find_libffcv; find_libffcv()"
    code += "; assert 'ffcv' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_ffcv_auto_is_torch_and_ffcv_says_what_to_install(many, pool, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    order = EvalOrder(40, batch=8)
    loader = open_loader("auto", many, order, pool=pool, threads=1)
    assert loader.name == "torch"
    assert "FFCV, which is not installed: install FFCV (pip install" in loader.reason
    with pytest.raises(ValueError, match=r"install FFCV \(pip install"):
        open_loader("ffcv", many, order, pool=pool, threads=1)


def test_a_broken_ffcv_library_is_reported(many, pool, tmp_path, monkeypatch):
    package = tmp_path / "ffcv"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_libffcv.so").write_bytes(b"no library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)  # a test before this one may have imported the real one
    loader = open_loader("auto", many, EvalOrder(40, batch=8), pool=pool, threads=1)
    assert loader.name == "torch"
    assert "cannot be loaded" in loader.reason


def test_an_unknown_loader_is_refused(many, pool):
    with pytest.raises(ValueError, match="'none' is not one of auto, turbo, ffcv, torch"):
        open_loader("none", many, EvalOrder(40, batch=8), pool=pool, threads=1)
