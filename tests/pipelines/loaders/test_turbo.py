"""The turbo loader against Pillow: every pixel of a region, what it refuses, and where it writes."""

import contextlib
import shutil
from importlib.machinery import EXTENSION_SUFFIXES

import numpy as np
import pytest
import torch

from fastdeit.pipelines.host.stage import HostStage
from fastdeit.pipelines.loaders import turbo
from fastdeit.pipelines.loaders.base import DecodeError, bounding_boxes
from fastdeit.pipelines.loaders.pillow import TorchLoader
from fastdeit.pipelines.loaders.turbo import TurboLoader, find_turbo
from fastdeit.pipelines.memory import Arenas
from fastdeit.pipelines.plan.draw import PlanDrawer
from fastdeit.pipelines.plan.order import EpochOrder, EvalOrder
from fastdeit.pipelines.plan.plan import evaluation_plan
from fastdeit.pipelines.plan.policy import Policy
from ordered import Ordered, first_batch, need_loader
from pictures import KINDS, SAMPLINGS, decoded, jpeg, picture, plain_file, random_jpegs, refused_jpegs
from refusals import refused
from tiny_datasets import write

need_loader("turbo")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def opened(pool):
    def open_one(dataset, order=None, regions=None, **options):
        loader = TurboLoader(dataset, pool=pool, threads=2, **options)
        return Ordered(loader, order or EvalOrder(len(dataset), batch=8), regions)

    return open_one


def boxes(rng, height, width, count):
    """`count` regions: anywhere, and along the edges."""
    for i in range(count):
        top, left = (int(rng.integers(0, n)) if i % 3 else 0 for n in (height, width))
        rows, columns = height - top, width - left
        if i % 4:
            rows, columns = int(rng.integers(1, rows + 1)), int(rng.integers(1, columns + 1))
        yield top, left, rows, columns


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_pixel_of_a_region_is_pillows(opened, tmp_path, sampled_jpeg, sampling):
    rng = np.random.default_rng(SAMPLINGS.index(sampling))
    images = random_jpegs(sampled_jpeg, rng, sampling, times=8, quality=(40, 99))
    dataset = write(tmp_path / "r.beton", images)
    loader = opened(dataset)
    for index, (data, (width, height)) in enumerate(images):
        expected = decoded(data)
        cases = [None, *boxes(rng, height, width, 12)]
        for region in cases:
            out = np.full((height, width, 3), 7, np.uint8)
            assert loader.decode_image(index, out, region)
            top, left, rows, columns = region or (0, 0, height, width)
            part = np.s_[top : top + rows, left : left + columns]
            np.testing.assert_array_equal(out[part], expected[part])
            assert (out[:top] == 7).all()
            assert (out[top + rows :] == 7).all()


@pytest.mark.parametrize("kind", ["keep_rgb", "exif", "mpo"])
def test_other_plain_files(opened, tmp_path, kind):
    data, size = plain_file(kind)
    out = np.empty((*size[::-1], 3), np.uint8)
    assert opened(write(tmp_path / "k.beton", [(data, size)])).decode_image(0, out)
    np.testing.assert_array_equal(out, decoded(data))


def test_what_is_refused_is_read_by_pil_whole_and_listed(opened, tmp_path):
    progressive = jpeg(picture(2, (40, 30)), progressive=True)
    unfinished = progressive[: progressive.rindex(b"\xff\xda")] + b"\xff\xd9"  # without its last scan, and no warning
    images = [*refused_jpegs(), unfinished]
    dataset = write(tmp_path / "c.beton", [(data, (40, 30)) for data in images])

    def regions(samples):
        return np.tile(np.array([25, 10, 5, 20], np.int32), (len(samples.index), 1))

    batch = first_batch(opened(dataset, regions=regions))
    assert batch.fallbacks == [1, 2, 3, 4]
    for slot, data in enumerate(images):
        part = np.s_[25:30, 10:30] if slot == 0 else np.s_[:]
        np.testing.assert_array_equal(batch.image(slot)[part], decoded(data)[part])


def one_scan_a_component(repeats):
    """A baseline file whose three components have scans of their own, each `repeats` times."""
    gray = jpeg(picture(5, (32, 24)).convert("L"))
    frame, scan = gray.index(b"\xff\xc0"), gray.index(b"\xff\xda")
    end_of_frame = frame + 2 + int.from_bytes(gray[frame + 2 : frame + 4], "big")
    sides = gray[frame + 5 : frame + 9]
    header = b"\xff\xc0\0\x11\x08" + sides + b"\x03" + b"".join(bytes([i, 0x11, 0]) for i in (1, 2, 3))
    scans = b"".join(b"\xff\xda\0\x08\x01" + bytes([i, 0, 0, 63, 0]) + gray[scan + 10 : -2] for i in (1, 2, 3))
    return gray[:frame] + header + gray[end_of_frame:scan] + scans * repeats + b"\xff\xd9"


def test_more_than_64_scans_are_refused_by_name(opened, tmp_path):
    few, many = one_scan_a_component(1), one_scan_a_component(22)
    loader = opened(write(tmp_path / "scans.beton", [(few, (32, 24)), (many, (32, 24))]))
    out = np.empty((24, 32, 3), np.uint8)
    assert loader.decode_image(0, out)
    np.testing.assert_array_equal(out, decoded(few))
    np.testing.assert_array_equal(out, decoded(many))  # nothing else is wrong with it
    refused(r"scans\.beton: image 1: a JPEG of more than 64 scans", loader.decode_image, 1, out, error=DecodeError)


def test_arithmetic_coding_is_not_decoded(opened, tmp_path):
    data = bytearray(jpeg(picture(0, (40, 30))))
    data[data.index(b"\xff\xc0") + 1] = 0xC9
    loader = opened(write(tmp_path / "a.beton", [(bytes(data), (40, 30))]))
    with contextlib.suppress(DecodeError):  # PIL may not read it either
        assert not loader.decode_image(0, np.empty((30, 40, 3), np.uint8))


@pytest.mark.parametrize("stored", [(40, 31), (20, 15), (80, 60), (30, 40)])
def test_another_size_than_the_data_set_says_is_named(opened, tmp_path, stored):
    loader = opened(write(tmp_path / "s.beton", [(jpeg(picture(0, stored)), (40, 30))]))
    out = np.full((30, 40, 3), 7, np.uint8)
    with pytest.raises(DecodeError, match=rf"image 0: the JPEG is {stored[0]} x {stored[1]} "):
        loader.decode_image(0, out, (0, 0, 10, 10))
    assert (out == 7).all()


def test_a_file_cut_off_is_refused_within_its_region_and_not_looked_at_below(opened, tmp_path):
    good = jpeg(picture(0, (64, 256), blur=2), quality=95)
    loader = opened(write(tmp_path / "cut.beton", [(good[: len(good) // 2], (64, 256))]))
    out = np.empty((256, 64, 3), np.uint8)
    for region in (None, (0, 0, 200, 64), (150, 3, 20, 5), (255, 0, 1, 1)):
        refused(r"image 0: PIL cannot read it", loader.decode_image, 0, out, region, error=DecodeError)
    assert loader.decode_image(0, out, (0, 0, 64, 64))
    np.testing.assert_array_equal(out[:64], decoded(good)[:64])


def test_a_missing_end_is_refused(opened, tmp_path):
    good = jpeg(picture(0, (64, 48)))
    refused("truncated", decoded, good[:-2], error=OSError)
    loader = opened(write(tmp_path / "end.beton", [(good[:-2], (64, 48))]))
    refused("image 0: PIL cannot read it", loader.decode_image, 0, np.empty((48, 64, 3), np.uint8), error=DecodeError)


@pytest.fixture(scope="module")
def many(tmp_path_factory, sampled_jpeg):
    """30 JPEGs of different sizes, kinds and samplings."""
    images = []
    for i in range(30):
        size = 60 + 11 * (i % 7), 50 + 9 * (i % 5)
        images.append(sampled_jpeg(i, size, SAMPLINGS[i % 6], **KINDS[i % 5]))
    return write(tmp_path_factory.mktemp("many") / "many.beton", images)


@pytest.fixture(params=[0, 255])
def poisoned(request, monkeypatch):
    """What is not decoded has one value, then another."""
    take = Arenas.take

    def filled(self, size):
        array = take(self, size)
        array[:] = request.param
        return array

    monkeypatch.setattr(Arenas, "take", filled)


def test_training_batches_are_those_of_whole_images(opened, pool, many, poisoned):
    order = EpochOrder(len(many), global_batch=8, group_size=4, repeats=3, seed=2)  # 8 is no multiple of 3
    drawer = PlanDrawer(Policy(), 2, many.height, many.width, img_size=32)
    stage = HostStage(32, MEAN, STD, pool=pool, threads=2)

    def regions(samples):
        return drawer.draw(samples).regions()

    loader = opened(many, order, regions=regions)
    reference = Ordered(TorchLoader(many, pool=pool, threads=2), order, regions)
    parts = 0
    for epoch in range(4):
        for part, whole in zip(loader.batches(epoch), reference.batches(epoch), strict=True):
            assert whole.region is None
            parts += int((part.region[:, 2] * part.region[:, 3] < part.height * part.width).sum())
            plan = drawer.draw(order.step(epoch, part.step))
            assert torch.equal(stage(part, plan).images, stage(whole, plan).images)
    assert parts > 20
    assert (loader.decoded, loader.reused) == (reference.decoded, reference.reused)
    assert loader.reused > 0


def test_evaluation_batches_are_those_of_whole_images(opened, pool, tmp_path, poisoned):
    # Scaled down and up, not at all, on one axis only, and much longer than wide.
    sizes = [(90, 61), (61, 90), (20, 25), (36, 36), (36, 50), (50, 36), (300, 40), (40, 300), (3, 70), (32, 32)]
    dataset = write(tmp_path / "e.beton", [(jpeg(picture(i, size)), size) for i, size in enumerate(sizes)])
    for eval_crop in (0.875, 1.0):
        samples = EvalOrder(len(dataset), batch=10).step(0, 0)
        plan = evaluation_plan(samples.index, dataset.height, dataset.width, 32, eval_crop)
        part = opened(dataset).decode(samples, plan.regions())
        whole = TorchLoader(dataset, pool=pool, threads=1).decode(samples, plan.regions())
        stage = HostStage(32, MEAN, STD, pool=pool, threads=2)
        assert torch.equal(stage(part, plan).images, stage(whole, plan).images)
        assert (part.region[:, 2:].prod(1) < part.height * part.width).sum() >= 5


def test_a_plan_that_needs_more_than_was_decoded_is_rejected(opened, pool, many):
    order = EpochOrder(len(many), global_batch=16, group_size=8, seed=2)
    drawer, other = (PlanDrawer(Policy(), seed, many.height, many.width, img_size=32) for seed in (2, 3))
    stage = HostStage(32, MEAN, STD, pool=pool, threads=2)
    samples = order.step(0, 0)
    batch = opened(many).decode(samples, drawer.draw(samples).regions())
    with pytest.raises(ValueError, match=r"dataset index \d+ .* needs more of its image than was decoded"):
        stage(batch, other.draw(samples))
    index = samples.index
    evaluation = evaluation_plan(index, many.height[index], many.width[index], 32, 1.0)
    refused("needs more of its image than was decoded", stage, batch, evaluation, error=ValueError)


def test_bounding_boxes():
    boxes = np.array([[5, 6, 7, 8], [1, 20, 2, 2], [0, 0, 3, 4]], np.int32)
    assert bounding_boxes(boxes, np.array([1, 1, 0]), 2).tolist() == [[0, 0, 3, 4], [1, 6, 11, 16]]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that the library is looked for in."""
    monkeypatch.setattr(turbo, "__file__", str(tmp_path / "loader_turbo.py"))
    find_turbo.cache_clear()
    yield tmp_path
    find_turbo.cache_clear()


def test_without_the_library_it_says_what_to_install(opened, many, elsewhere):
    refused(r"was not built when fastdeit was installed: install libjpeg-turbo 2\.1", opened, many)


@pytest.mark.parametrize("broken", ["no library", "another library"])
def test_a_library_that_cannot_be_used_is_reported(opened, many, elsewhere, broken):
    library = elsewhere / ("_jpeg" + EXTENSION_SUFFIXES[0])
    if broken == "no library":
        library.write_bytes(b"no library")
    else:
        import _ctypes

        shutil.copy(_ctypes.__file__, library)
    refused(r"cannot be loaded \(.*install libjpeg-turbo", opened, many)
