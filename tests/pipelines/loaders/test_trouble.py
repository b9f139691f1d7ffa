"""Every loader in trouble: damage, early ends, exceptions, files that change; one suite for all."""

import os
import signal
import threading
import time
from functools import partial

import pytest
from PIL import EpsImagePlugin

import refusals
from fastdeit.pipelines.formats.beton_layout import JPEG, BetonError
from fastdeit.pipelines.formats.shard_layout import ShardError
from fastdeit.pipelines.loaders.base import DecodeError
from fastdeit.pipelines.loaders.prefetch import Prefetcher
from fastdeit.pipelines.machine import MachineError
from fastdeit.pipelines.plan.order import EvalOrder
from ordered import assert_images, first_batch
from pictures import encoded, jpeg, picture
from system import end_when_ready, wait_for
from tiny_datasets import Hooked, write

refused = partial(refusals.refused, error=DecodeError)


@pytest.fixture(scope="module")
def many(many_jpegs, tmp_path_factory):
    return write(tmp_path_factory.mktemp("many") / "many.beton", many_jpegs)


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
        refused(r"bad\.beton: image 10: PIL cannot read it .*; replace .* convert", next, batches)


@pytest.mark.parametrize("kind", ["EPS", "PNG"])
def test_what_is_no_jpeg_is_not_read_as_anything_else(opened, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("an image started a program"))
    dataset = write(tmp_path / "other.beton", [(encoded(picture(0, (90, 70)), kind), (90, 70), JPEG)])
    refused(r"other\.beton: image 0: PIL cannot read it", first_batch, opened(dataset))


@pytest.mark.parametrize("stored", [(90, 70), (45, 35), (180, 140), (70, 90)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_wrong_size_in_the_data_set_is_never_scaled_to_fit(opened, tmp_path, stored, progressive):
    data = jpeg(picture(0, stored), progressive=progressive)
    dataset = write(tmp_path / "size.beton", [(data, (90, 71), JPEG)])
    refused(rf"image 0: the JPEG is {stored[0]} x {stored[1]} ", first_batch, opened(dataset))


def test_a_file_cut_short_under_its_reader_is_an_error_not_a_crash(opened, tmp_path):
    samples = [(jpeg(picture(i, (90, 70))), (90, 70), JPEG) for i in range(24)]
    for path in (tmp_path / "cut.beton", tmp_path / "shards"):
        dataset = write(path, samples)
        file = path if path.is_file() else path / "shard-000000.tar"
        with opened(dataset) as loader, Prefetcher(loader.batches(0), 1) as batches:
            next(batches)
            os.truncate(file, int(dataset.offset[18]) + 5)
            message = r"(cut\.beton|shard-000000\.tar), sample \d+: .*cut short"
            refused(message, list, batches, error=(BetonError, ShardError))
        # What is replaced would depend on when it was cut.
        with opened(dataset, on_error="replace") as loader, pytest.raises((BetonError, ShardError), match="cut short"):
            list(loader.batches(0))


def test_a_worker_exception_stops_the_others_and_surfaces(opened, many):
    started = []

    def hook(index):
        started.append(index)
        if index == 3:
            raise MemoryError("no room")
        time.sleep(0.02)

    with opened(Hooked(many, hook), EvalOrder(len(many), batch=40)) as loader:
        with pytest.raises(MachineError, match=r"many\.beton: image 3: .*out of memory.*no room"):
            next(iter(loader.batches(0)))
        count = len(started)
        assert count < 20
        time.sleep(0.05)
        assert len(started) == count


def test_the_loader_can_be_used_after_an_error(opened, many):
    dataset = Hooked(many, lambda index: 1 / 0)
    with opened(dataset) as loader:
        with pytest.raises(ZeroDivisionError):
            next(iter(loader.batches(0)))
        dataset.hook = lambda index: None
        after = next(iter(loader.batches(0)))
    with opened(many) as loader:
        before = next(iter(loader.batches(0)))
    assert (after.offset == before.offset).all()
    assert_images(after, map(before.image, range(len(before.offset))))


def test_closing_stops_a_step_that_is_being_decoded(opened, many):
    entered, seen = threading.Event(), []

    def hook(index):
        entered.set()
        seen.append(index)
        time.sleep(0.05)

    loader = opened(Hooked(many, hook), EvalOrder(len(many), batch=40))
    with Prefetcher(loader.batches(0), 1) as batches:
        entered.wait(5)
        loader.close()
        with pytest.raises(RuntimeError, match="closed while it decoded"):
            next(batches)
    assert len(seen) < 12


def test_closing_early_leaves_no_thread(opened, many, pool):
    def threads():
        return len(os.listdir("/proc/self/task")) - len(pool._threads)  # which stay

    with opened(many) as loader:  # the first one loads libraries, which may keep threads
        next(loader.batches(0))
    before = threads()
    for _ in range(3):
        with opened(many) as loader, Prefetcher(loader.batches(0), 2) as batches:
            next(batches)
    wait_for(lambda: threads() <= before)  # the kernel lists a thread for a moment after it was joined


SCRIPT = """
import sys, time
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.loaders.choose import open_loader
from fastdeit.pipelines.plan.order import EpochOrder
from fastdeit.pipelines.loaders.prefetch import Prefetcher, make_pool

name, path = sys.argv[1:]
dataset = BetonDataset(path)
with make_pool(2) as pool:
    order = EpochOrder(len(dataset), global_batch=20, group_size=4)
    with open_loader(name, dataset, pool=pool, threads=2) as loader:
        epoch = 0
        while True:
            epoch += 1
            steps = (loader.decode(order.step(epoch, step)) for step in range(order.steps))
            with Prefetcher(steps, 2) as batches:
                for _ in batches:
                    if epoch == 2:
                        print("ready", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_program(opened, many):
    error, code = end_when_ready("-c", SCRIPT, opened.name, many.path)
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert code == -signal.SIGINT
