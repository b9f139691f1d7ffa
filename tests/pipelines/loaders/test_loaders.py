"""Every loader against PIL and the order asked for, from both formats; one suite for all."""

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import tiny_datasets
from fastdeit.pipelines.formats.beton_layout import JPEG, RAW
from fastdeit.pipelines.loaders.prefetch import Prefetcher
from fastdeit.pipelines.plan.order import EpochOrder, EvalOrder
from ordered import assert_images, first_batch
from pictures import decoded, jpeg, picture, refused_jpegs
from tiny_datasets import Hooked

# What libjpeg-turbo's fast DCT may differ from PIL: most and mean absolute levels, by quality. See `FfcvLoader`. All
# other loaders are exact.
FAST_DCT = {75: (10, 1.2), 85: (10, 1.2), 92: (10, 1.2), 95: (20, 1.8)}
# Of the four files that the decoders may refuse, those that they do.
REFUSED = {"torch": [], "dali": [2], "ffcv": [1, 2, 3], "turbo": [1, 2, 3]}


def write(path, samples):
    """Labels count 0, 3, 6, ..., so that none is its index."""
    return tiny_datasets.write(path, samples, range(0, 3 * len(samples), 3))


def pil_pixels(dataset, index):
    return decoded(dataset.read(index).tobytes())


@pytest.fixture(scope="module", params=["beton", "shards"])
def many(request, many_jpegs, tmp_path_factory):
    """The JPEGs in each format."""
    return write(tmp_path_factory.mktemp("many") / ("many.beton" if request.param == "beton" else "many"), many_jpegs)


def check_pixels(dataset, batch, name, quality=92):
    most, mean = FAST_DCT[quality] if name == "ffcv" else (0, 0)
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
            check_pixels(many, batch, opened.name)


def test_images_do_not_overlap_and_are_aligned(opened, many):
    batch = first_batch(opened(many))
    assert ((batch.pixels.ctypes.data + batch.offset) % 64 == 0).all()
    end = batch.offset + batch.height.astype(np.int64) * batch.width * 3
    assert (end[:-1] <= batch.offset[1:]).all()
    assert end[-1] <= len(batch.pixels)


def test_each_image_is_decoded_once_for_all_its_copies(opened, many):
    order = EpochOrder(len(many), global_batch=20, group_size=4, repeats=3)  # 20 is no multiple of 3
    reads = Counter()
    with opened(Hooked(many, lambda index: reads.update([index])), order) as loader:
        batches = list(loader.batches(2))
    images = {i for b in batches for i in b.index.tolist()}
    straddling = sum(len(set(a.index.tolist()) & set(b.index.tolist())) for a, b in itertools.pairwise(batches))
    assert straddling > 0
    assert reads == Counter(dict.fromkeys(images, 1))
    assert (loader.decoded, loader.reused) == (len(images), straddling)
    for batch in batches:
        check_pixels(many, batch, opened.name)


def test_a_step_is_the_same_from_any_start(opened, many):
    order = EpochOrder(len(many), global_batch=8, group_size=4)
    with opened(many, order) as loader:
        whole = list(loader.batches(1))
        for first in range(order.steps + 1):
            rest = list(loader.batches(1, first))
            assert [b.step for b in rest] == list(range(first, order.steps))
            for batch, same in zip(rest, whole[first:], strict=True):
                np.testing.assert_array_equal(batch.index, same.index)
                assert_images(batch, map(same.image, range(len(batch.offset))))


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
    from sklearn.datasets import load_sample_images  # here: it takes two seconds

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    data = [jpeg(image, quality=quality, subsampling=subsampling) for image in photographs]
    dataset = write(tmp_path / "p", [(d, i.size, JPEG) for d, i in zip(data, photographs, strict=True)])
    batch = first_batch(opened(dataset))
    check_pixels(dataset, batch, opened.name, quality)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("L", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"exif": b"Exif\0\0" + bytes(300)}),
        ("RGB", {"dpi": (9, 9)}),
    ],
    ids=["gray", "progressive", "4:2:2", "exif", "dpi"],
)
def test_kinds_of_jpeg(opened, tmp_path, mode, options):
    image = picture(1, (61, 47)).convert(mode)
    dataset = write(tmp_path / "k.beton", [(jpeg(image, **options), image.size, JPEG)])
    batch = first_batch(opened(dataset))
    check_pixels(dataset, batch, opened.name)
    assert batch.fallbacks == []


def test_raw_pixels_are_copied(opened, tmp_path):
    images = [picture(i, (20 + i, 17)) for i in range(5)]
    dataset = write(tmp_path / "r.beton", [(i.tobytes(), i.size, RAW) for i in images])
    batch = first_batch(opened(dataset))
    assert_images(batch, images)


def test_what_the_decoder_refuses_is_read_by_pil_and_listed(opened, tmp_path):
    stored = refused_jpegs()
    dataset = write(tmp_path / "c.beton", [(data, (40, 30), JPEG) for data in stored])
    batch = first_batch(opened(dataset))
    assert batch.fallbacks == REFUSED[opened.name]
    for slot in (1, 2, 3):
        np.testing.assert_array_equal(batch.image(slot), decoded(stored[slot]))
    check_pixels(dataset, batch, opened.name)
