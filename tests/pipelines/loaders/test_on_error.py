"""What becomes of an image that does not decode: fatal by name, or replaced by the next with its label. Judge: PIL."""

import errno
import io
import itertools
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest
from PIL import Image

import refusals
import tiny_datasets
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import JPEG, RAW, BetonError
from fastdeit.pipelines.loaders import base
from fastdeit.pipelines.loaders.base import DecodeError
from fastdeit.pipelines.loaders.choose import LOADERS
from fastdeit.pipelines.loaders.prefetch import make_pool
from fastdeit.pipelines.machine import MachineError
from fastdeit.pipelines.plan.order import EpochOrder, EvalOrder
from ordered import assert_images, first_batch
from pictures import jpeg, picture
from tiny_datasets import Hooked, stored

refused = partial(refusals.refused, error=DecodeError)

COUNT = 24
SIZES = [(40 + 3 * i, 60 - i) for i in range(COUNT)]
BAD = (3, 10, 11, 23)  # alone, two in a row, the last
USED = {3: 4, 10: 12, 11: 12, 23: 0}
RAW_AT = 4


def write(path, bad):
    """A beton file of JPEGs and one raw image; label 5 * index; the images of `bad` are damaged in several ways."""
    damages = [
        lambda data: data[: len(data) // 2],
        lambda data: bytes(range(256)) * 4,
        lambda data: data[:150],
        lambda data: jpeg(picture(0, (9, 9))),  # of another size than the data set says
    ]
    samples = []
    for i, size in enumerate(SIZES):
        data, _, mode = stored(picture(i, size), RAW if i == RAW_AT else JPEG)
        if i in bad:
            data, mode = damages[i % 4](jpeg(picture(i, size))), JPEG
        samples.append((data, size, mode))
    return tiny_datasets.write(path, samples, range(0, 5 * COUNT, 5))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return write(tmp_path_factory.mktemp("damaged") / "damaged.beton", BAD)


class Unreadable(Hooked):
    """A data set some of whose samples can no longer be read; counts what is read."""

    def __init__(self, dataset, bad, error=OSError):
        super().__init__(dataset, self.fail)
        self.bad, self.error, self.counts = bad, error, Counter()

    def fail(self, index):
        self.counts[index] += 1
        if index in self.bad:
            raise self.error("Input/output error")


def expected_image(dataset, index):
    """What PIL reads of the image used for `index`, at the size of `index`."""
    used = USED.get(index, index)
    if dataset.is_jpeg(used):
        image = Image.open(io.BytesIO(dataset.read(used).tobytes())).convert("RGB")
    else:
        image = Image.frombytes("RGB", SIZES[used], dataset.read(used).tobytes())
    return np.asarray(image if used == index else image.resize(SIZES[index], Image.Resampling.BICUBIC))


def check(dataset, batches, exact):
    for batch in batches:
        for slot in range(len(batch.offset)):
            index = int(batch.index[batch.source == slot][0])
            difference = np.abs(batch.image(slot).astype(int) - expected_image(dataset, index))
            assert difference.max() <= (0 if exact else 16)
        indices = batch.index.tolist()
        assert batch.label.tolist() == [5 * USED.get(i, i) for i in indices]
        assert batch.replaced == sorted((i, USED[i]) for i in set(indices) & set(USED))
        assert (batch.height[batch.source] == dataset.height[batch.index]).all()


def test_fail_names_the_image(opened, damaged):
    with opened(damaged, EvalOrder(COUNT, batch=8)) as loader:
        refused(r"damaged\.beton: image 3: .*; replace .* convert", next, loader.batches(0))
        refused("image 23: ", next, loader.batches(0, 2))


def test_replace_takes_the_next_that_decodes_and_its_label(opened, damaged):
    with opened(damaged, EvalOrder(COUNT, batch=7), on_error="replace") as loader:
        batches = list(loader.batches(0))
    check(damaged, batches, exact=opened.name != "ffcv")
    assert sorted(pair for batch in batches for pair in batch.replaced) == sorted(USED.items())


def test_replaced_is_the_same_for_any_threads_and_from_any_step(opened, damaged):
    order = EpochOrder(COUNT, global_batch=8, group_size=4, repeats=3, seed=1)  # 8 is no multiple of 3
    with opened(damaged, order, threads=1, on_error="replace") as loader:
        alone = list(loader.batches(2))
        decoded = loader.decoded, loader.reused
    check(damaged, alone, exact=opened.name != "ffcv")
    with opened(damaged, order, threads=4, on_error="replace") as loader:
        together = list(loader.batches(2))
        assert (loader.decoded, loader.reused) == decoded
        late = list(loader.batches(2, 1))
    for batches, others in ((alone, together), (alone[1:], late)):
        for one, other in zip(batches, others, strict=True):
            assert one.replaced == other.replaced
            np.testing.assert_array_equal(one.label, other.label)
            assert_images(one, map(other.image, range(len(one.offset))))


def test_an_image_replaced_is_so_once_for_all_its_copies(opened, damaged):
    order = EpochOrder(COUNT, global_batch=8, group_size=4, repeats=3, seed=1)
    dataset = Unreadable(damaged, bad=())

    def go_on(epoch):
        steps = [set(order.step(epoch, step).index.tolist()) for step in range(order.steps)]
        return set.union(*(a & b for a, b in itertools.pairwise(steps)))

    epoch = next(epoch for epoch in range(100) if go_on(epoch) & set(BAD))
    with opened(dataset, order, on_error="replace") as loader:
        batches = list(loader.batches(epoch))
    images = {i for batch in batches for i in batch.index.tolist()}
    bad = images & set(BAD)
    assert loader.decoded == len(images)
    attempts = Counter(images) + Counter(USED[i] for i in bad)
    for index in images - set(BAD):
        assert dataset.counts[index] == attempts[index]
    check(damaged, batches, exact=opened.name != "ffcv")


@pytest.mark.parametrize("number", ["EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "ENOENT"])
def test_what_the_machine_refuses_is_named_and_never_replaced(opened, damaged, number):
    def error(_):
        return OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    dataset = Unreadable(damaged, bad=(1,), error=error)
    for on_error in ("fail", "replace"):  # without image 3, which another thread may come to first
        loader = opened(dataset, EvalOrder(COUNT, batch=2), on_error=on_error)
        message = refused(r"damaged\.beton: image 1: cannot be read: ", first_batch, loader, error=MachineError)
        assert os.strerror(getattr(errno, number)) in message
        assert "onvert" not in message


def test_what_is_no_damage_is_never_replaced(opened, damaged):
    for error, raised in ((MemoryError, MachineError), (IndexError, IndexError), (BetonError, BetonError)):
        dataset = Unreadable(damaged, bad=(1,), error=error)
        with opened(dataset, EvalOrder(COUNT, batch=8), on_error="replace") as loader, pytest.raises(raised):
            next(loader.batches(0))


def test_many_in_a_row_are_fatal_all_the_same(opened, tmp_path, monkeypatch):
    damaged = write(tmp_path / "damaged.beton", range(5, COUNT))
    monkeypatch.setattr(base, "MOST_SKIPPED", 6)
    message = r"image \d: .* The next 6 images do not decode either.* fastdeit-convert --verify .*damaged\.beton"
    refused(message, first_batch, opened(damaged, EvalOrder(COUNT, batch=8), on_error="replace"))


def test_all_is_decoded_whole_where_images_are_replaced(opened, damaged):
    def regions(samples):
        return np.tile(np.array([0, 0, 5, 5], np.int32), (len(samples.index), 1))

    # The upper half of image 0 is there: whether it counts as damaged must not depend on what is needed of it.
    order = EvalOrder(COUNT, batch=4)
    batch = first_batch(opened(damaged, order, on_error="replace", regions=regions))
    assert batch.region is None
    assert batch.replaced == [(3, 4)]


def test_another_policy_is_refused(damaged):
    with make_pool(1) as pool, pytest.raises(UserError, match="on_error 'skip' is not one of fail, replace"):
        LOADERS["torch"](damaged, pool=pool, threads=1, on_error="skip")
