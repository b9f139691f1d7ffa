"""What the machine refuses is named as that, and changes nothing of what is read. Judge: the operating system."""

import errno
import functools
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial

import numpy as np
import pytest
from PIL import Image

import refusals
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.conversion.encode import Encoding
from fastdeit.pipelines.conversion.workers import encoded
from fastdeit.pipelines.formats import open_file, sidecar
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.beton_layout import METADATA_START, RAW, sidecar_path
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.formats.files import NoRegularFileError, open_regular
from fastdeit.pipelines.formats.shard_layout import SAMPLE
from fastdeit.pipelines.formats.shards import ShardDataset
from fastdeit.pipelines.formats.sidecar import SidecarError
from fastdeit.pipelines.loaders.choose import choose_loader, open_loader
from fastdeit.pipelines.loaders.prefetch import Prefetcher, make_pool
from fastdeit.pipelines.machine import MachineError
from fastdeit.pipelines.plan.order import EvalOrder
from system import limited_files, make_odd, refusing, run_python
from tiny_datasets import Items, write

refused = partial(refusals.refused, error=MachineError)

COUNT = 120


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 8, 9, 3), np.uint8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, pixels):
    """120 raw images, one a shard."""
    path = tmp_path_factory.mktemp("shards") / "train"
    write(path, [(image.tobytes(), (9, 8), RAW) for image in pixels], shard_size=1).close()
    return path


@pytest.fixture
def beton(tmp_path, pixels):
    path = tmp_path / "x.beton"
    write(path, [(image.tobytes(), (9, 8), RAW) for image in pixels[:4]]).close()
    return path


def open_files():
    return len(os.listdir("/proc/self/fd"))


def open_all(held):
    """Open files until there is no more to be had."""
    with suppress(OSError):
        while True:
            held.callback(os.close, os.open("/dev/null", os.O_RDONLY))


FEW_FILES = """
import sys
from pathlib import Path
import numpy as np
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.loaders.choose import choose_loader, open_loader
from fastdeit.pipelines.plan.order import EvalOrder
from fastdeit.pipelines.loaders.prefetch import Prefetcher, make_pool
from fastdeit.pipelines.conversion.verify import verify

path, out = sys.argv[1:]
dataset = open_dataset(Path(path))
with make_pool(4) as pool, open_loader(
    "torch", dataset, pool=pool, threads=4, on_error="replace"
) as loader:
    order = EvalOrder(len(dataset), batch=40)
    batches = [loader.decode(order.step(0, step)) for step in range(order.steps)]
assert not any(batch.replaced for batch in batches)
images = {int(batch.index[k]): batch.image(slot) for batch in batches for k, slot in enumerate(batch.source)}
np.save(out, np.stack([images[i] for i in range(len(images))]))
assert verify(path, progress=False).ok
"""


@pytest.mark.slow
def test_few_open_files_are_enough_for_many_shards(shards, pixels, tmp_path):
    few_files = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    run_python("-c", FEW_FILES, shards, tmp_path / "seen.npy", preexec_fn=few_files, status=0)
    np.testing.assert_array_equal(np.load(tmp_path / "seen.npy"), pixels)


def test_open_files_are_bounded_and_no_read_meets_a_closed_one(shards, pixels, monkeypatch):
    before = open_files()
    monkeypatch.setattr("fastdeit.pipelines.formats.shards._OPEN_SHARDS", 3)
    most = 0
    with ShardDataset(shards) as dataset, ThreadPoolExecutor(8) as pool:

        def look(seed):
            nonlocal most
            for i in np.random.default_rng(seed).integers(0, COUNT, 400).tolist():
                assert dataset.read(i).tobytes() == pixels[i].tobytes()
                if i % 20 == 0:
                    most = max(most, open_files() - before)

        list(pool.map(look, range(8)))
    assert most <= 3 + 2 * 8 + 1  # kept, in use by a thread, and its look at /proc
    assert open_files() == before


def test_without_any_file_to_open_the_limit_is_named(shards):
    """Others may hold all files: then shards are let go first, and an error comes last."""
    with ShardDataset(shards) as dataset:
        with limited_files(open_files() + 8), ExitStack() as held:
            for i in range(5):
                dataset.read(i)
            open_all(held)
            for i in range(20):  # each in the place of another shard
                dataset.read(i)
            dataset._files.clear()
            open_all(held)
            message = refused(r"shard-000077\.tar, sample 77: .*ulimit -n 4096", dataset.read, 77)
            refused("ulimit -n 4096", ShardDataset, shards)
            refused("ulimit -n 4096", dataset.check)
        assert "onvert" not in message
        dataset.read(77)


def choose_and_decode(dataset, samples, **options):
    name, _ = choose_loader(dataset, samples, **options)
    return open_loader(name, dataset, **options).decode(samples)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENOMEM])
@pytest.mark.parametrize("kind", ["beton", "shards"])
def test_a_read_that_the_system_refuses(beton, shards, monkeypatch, number, kind):
    with open_dataset(beton if kind == "beton" else shards) as dataset:
        monkeypatch.setattr(open_file.os, "preadv", refusing(number))
        message = refused(r"(x\.beton|shard-000002\.tar), sample 2: cannot be read: ", dataset.read, 2)
        assert os.strerror(number) in message
        assert "onvert" not in message
        with pytest.raises(MachineError):
            dataset.check()
        with make_pool(1) as pool, pytest.raises(MachineError):  # nor is another loader taken for it
            choose_and_decode(dataset, EvalOrder(4, batch=4).step(0, 0), pool=pool, threads=1)


def test_a_mount_that_vanishes(shards, tmp_path):
    moved = tmp_path / "moved"
    os.rename(shards, moved)
    try:
        with ShardDataset(moved) as dataset:
            dataset.read(0)
            os.rename(moved, shards)
            assert len(dataset.read(0))  # is open
            refused(r"shard-000001\.tar, sample 1: .* is gone", dataset.read, 1)
    finally:
        if moved.exists():
            os.rename(moved, shards)


def failing_source(number):
    """Three images, of which the second is on a disk that fails."""
    image = Image.new("RGB", (8, 8))
    return Items([image, OSError(number, os.strerror(number)), image], class_names=None)


def test_a_conversion_leaves_out_no_image_for_the_machine():
    for number in (errno.EMFILE, errno.EIO, errno.ESTALE):
        samples = encoded(failing_source(number), range(3), Encoding())
        next(samples)
        refused(r"item 1, sample 1: cannot be read: ", next, samples)
    assert type(list(encoded(failing_source(errno.EACCES), range(3), Encoding()))[1]).__name__ == "Reject"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_no_room_in_shared_memory(tmp_path, monkeypatch, number):
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refusing(number))
    source = failing_source(errno.EIO)
    source.in_memory = False
    refused(r"2 workers cannot be started .*/dev/shm", next, encoded(source, range(3), Encoding(), 2))


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_file_is_refused_at_once(beton, kind):
    results = []

    def attempt(opening, target):
        refused(f"Is a {kind}, not a file: name a regular file", opening, target, error=NoRegularFileError)
        results.append(target)

    odd = sidecar_path(beton)
    odd.unlink()
    make_odd(odd, kind)
    for one in ((open_regular, odd), (open_dataset, odd), (open_dataset, beton)):
        thread = threading.Thread(target=attempt, args=one, daemon=True)
        thread.start()
        thread.join(20)
    assert len(results) == 3


SPARSE = """
import resource, sys
from pathlib import Path
from fastdeit.pipelines.formats.dataset import open_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_dataset(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["beton", "shards", "sidecar"])
def test_a_file_of_holes_takes_no_memory(beton, shards, tmp_path, kind):
    """48 GB that take no room on the disk."""
    size, path = 48_000_000_000, beton
    if kind == "beton":
        count = (size - METADATA_START) // 48
        size = METADATA_START + 48 * count
        with open(beton, "r+b") as file:
            file.seek(8)
            file.write(np.array([count, METADATA_START + 24 * count], "<u8").tobytes())
    elif kind == "shards":
        path = tmp_path / "holes"
        path.mkdir()
        count = size // 37
        with open(path / "samples.npy", "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            size = file.tell() + count * SAMPLE.itemsize
    holes = {"beton": beton, "shards": path / "samples.npy", "sidecar": sidecar_path(beton)}[kind]
    os.truncate(holes, size)
    done = run_python("-c", SPARSE, path, check=True, timeout=60)
    message, grown = done.stdout.strip().splitlines()
    assert message.startswith({"beton": "BetonError", "shards": "ShardError", "sidecar": "SidecarError"}[kind])
    assert int(grown) < 200  # MiB


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[[]" + ",[]" * 20_000_000])
def test_a_sidecar_that_is_deep_or_long(beton, text):
    sidecar_path(beton).write_text(text)
    refused(r"x\.beton\.json: damaged", BetonDataset, beton, error=SidecarError)


@pytest.mark.slow
def test_as_many_class_names_as_labels_may_be(beton):
    described = sidecar.read(sidecar_path(beton), kind="fastdeit-beton", num_samples=4, num_classes=4,
                             metadata_hash=BetonDataset(beton)._metadata_hash)  # fmt: skip
    described["class_names"] = [""] * ((1 << 20) + 1)
    del described["seal"]
    sidecar.write(sidecar_path(beton), {**described, "seal": sidecar._seal(described)})
    refused("1048577 class names, but at most 1048576 are allowed", BetonDataset, beton, error=SidecarError)


def test_conversion_and_reading_under_a_user_of_another_limit(tmp_path):
    """A whole way with 40 files: convert, and read back."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for i in range(60):
        Image.new("RGB", (20, 20), (4 * i, 0, 0)).save(folder / f"{i:02d}.jpg")
    convert(str(folder.parent), tmp_path / "out", format="webdataset", shard_size=1, progress=False)
    with limited_files(open_files() + 12), ShardDataset(tmp_path / "out") as dataset:
        assert len({dataset.read(i).tobytes() for i in range(60)}) == 60
        assert dataset.check() == []


@pytest.mark.parametrize("started", [0, 2])
def test_threads_that_do_not_start(monkeypatch, started):
    before, real, count = threading.active_count(), threading.Thread.start, 0

    def start(thread):
        nonlocal count
        count += 1
        if count > started:
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as few:
        few.setattr(threading.Thread, "start", start)
        refused(r"4 worker threads cannot be started: .*ulimit -u", make_pool, 4)
    with monkeypatch.context() as few:
        few.setattr(threading.Thread, "start", lambda _: start(None))
        count = 9
        refused("the thread that prepares batches cannot be started", Prefetcher, iter(()), 1)
    assert threading.active_count() == before
    with make_pool(3) as pool:
        assert list(pool.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
