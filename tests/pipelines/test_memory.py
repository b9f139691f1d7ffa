"""Memory comes back when nobody holds any part of it, and never before."""

import errno
import gc
import mmap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastdeit.pipelines import memory
from fastdeit.pipelines.memory import Arenas, place


@pytest.mark.slow
@pytest.mark.parametrize(
    "keep",
    [
        lambda a: a,
        lambda a: a[10:20],
        lambda a: a[10:20][2:4].reshape(1, 2).T,
        lambda a: a[8:24].view(np.int64),
        lambda a: memoryview(a),
        lambda a: torch.from_numpy(a)[4:6],
        lambda a: np.lib.stride_tricks.as_strided(a, (3,), (2,)),
    ],
    ids=["itself", "slice", "slice of slice", "other dtype", "memoryview", "tensor", "strided"],
)
def test_memory_is_not_reused_while_any_part_is_held(keep):
    arenas = Arenas()
    array = arenas.take(100)
    address = array.ctypes.data
    part = keep(array)
    del array
    gc.collect()
    assert arenas.take(100).ctypes.data != address
    del part
    gc.collect()
    held = [arenas.take(100) for _ in range(2)]
    assert address in [a.ctypes.data for a in held]


def test_memory_is_bounded_by_what_was_held_at_once():
    arenas, rng = Arenas(), np.random.default_rng(0)
    addresses, held = set(), []
    for size in rng.integers(5000, 5500, 200):
        held = [*held[-2:], arenas.take(int(size))]
        held[-1][:] = 7
        addresses.add(held[-1].ctypes.data)
    assert len(addresses) <= 4
    assert len(arenas._free) + len(held) <= 4


def test_memory_that_is_too_small_is_let_go():
    arenas = Arenas()
    arenas.take(1000)
    assert len(arenas.take(10_000)) == 10_000
    gc.collect()
    assert [len(memory) >= 10_000 for memory in arenas._free] == [True]


def test_arrays_are_aligned_writable_and_apart():
    arenas = Arenas()
    held = [arenas.take(size) for size in (1, 63, 64, 1000)]
    for number, array in enumerate(held):
        assert array.ctypes.data % 64 == 0
        array[:] = number
    assert all((array == number).all() for number, array in enumerate(held))


def test_a_kernel_without_large_pages_will_do(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    array = Arenas().take(5000)
    array[:] = 7
    assert array.sum() == 35_000


def test_many_threads_never_share_memory():
    arenas = Arenas()

    def work(number):
        for _ in range(200):
            array = arenas.take(256)
            array[:] = number
            time.sleep(0)
            assert (array == number).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_place_leaves_room_for_every_image():
    height, width = np.array([1, 375, 2], np.int32), np.array([1, 500, 40000], np.int32)
    start, end = place(height, width)
    assert start.tolist() == [0, 64, 64 + 562_560]
    assert end == 64 + 562_560 + 240_000
    assert place(height[:0], width[:0])[1] == 0


@pytest.mark.gpu
def test_pinned_memory_is_pinned_and_used_again():
    arenas = Arenas(pinned=True)
    array = arenas.take(5000)
    address = array.ctypes.data
    assert torch.from_numpy(array).is_pinned()
    assert torch.from_numpy(array[100:200]).is_pinned()
    del array
    gc.collect()
    assert arenas.take(5000).ctypes.data == address
