"""The prefetcher: order, bounds, errors in their place, and no thread left behind however it ends."""

import gc
import os
import signal
import threading
import time
from unittest.mock import Mock

import pytest

from fastdeit.pipelines.loaders import prefetch
from fastdeit.pipelines.loaders.prefetch import Prefetcher, make_pool, usable_cores
from refusals import refused
from system import end_when_ready, run_python, wait_for


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    wait_for(lambda: set(threading.enumerate()) <= before, seconds=5)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_whole_and_in_order(depth):
    with Prefetcher(range(50), depth) as items:
        assert list(items) == list(range(50))
        with pytest.raises(StopIteration):
            next(items)


def test_never_more_ahead_than_the_depth():
    made = 0

    def produce():
        nonlocal made
        while True:
            made += 1
            yield made

    with Prefetcher(produce(), 3) as items:
        for taken in range(1, 6):
            wait_for(lambda: made == taken + 2)  # noqa: B023
            time.sleep(0.02)
            assert made == taken + 2
            assert next(items) == taken


def test_the_producer_keeps_no_item_alive():
    class Item:
        alive = 0

        def __init__(self):
            Item.alive += 1

        def __del__(self):
            Item.alive -= 1

    with Prefetcher((Item() for _ in range(10)), 2) as items:
        for item in items:
            assert isinstance(item, Item)
            assert Item.alive <= 3  # the depth and the one in use
        del item
        assert Item.alive == 0


def test_error_comes_after_the_items_before_it():
    def produce():
        yield 1
        yield 2
        raise KeyError("third")

    with Prefetcher(produce(), 8) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(KeyError, match="third") as caught:
            next(items)
        assert caught.traceback[-1].name == "produce"
        with pytest.raises(StopIteration):
            next(items)


def test_close_while_the_queue_is_full_runs_the_generators_cleanup_in_its_thread():
    seen = []

    def produce():
        try:
            while True:
                yield threading.get_ident()
        finally:
            seen.append(threading.get_ident())

    items = Prefetcher(produce(), 2)
    worker = next(items)
    items.close()
    items.close()
    assert seen == [worker]
    assert worker != threading.get_ident()
    refused("after the prefetcher was closed", next, items, error=RuntimeError)


def test_close_in_the_middle_of_an_item_waits_for_that_item_only():
    entered, made = threading.Event(), []

    def produce():
        while True:
            entered.set()
            time.sleep(0.1)
            made.append(1)
            yield 1

    items = Prefetcher(produce(), 4)
    entered.wait()
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < 1
    assert len(made) == 1


def test_leaving_by_an_exception_ends_the_thread():
    with pytest.raises(ZeroDivisionError), Prefetcher(iter(int, 1), 2) as items:
        assert 1 / next(items)
    assert not items._thread.is_alive()


def test_a_dropped_prefetcher_ends_its_thread():
    items = Prefetcher(iter(int, 1), 2)
    next(items)
    thread = items._thread
    del items
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_wait_seconds_is_the_time_without_data():
    def slow():
        for item in range(3):
            time.sleep(0.1)
            yield item

    with Prefetcher(slow(), 1) as items:
        list(items)
        assert 0.2 < items.wait_seconds < 2
    with Prefetcher(iter(range(3)), 3) as items:
        wait_for(lambda: len(items._queue.ready) == 3)
        list(items)
        assert items.wait_seconds < 0.1


def test_depth_and_threads_are_checked():
    refused("at least 1 item", Prefetcher, [], 0)
    refused("at least 1 is needed", make_pool, 0)


def test_pool_has_the_threads_asked_for():
    with make_pool(3) as pool:
        together = threading.Barrier(3)
        waits = [pool.submit(together.wait, 5) for _ in range(3)]
        assert sorted(wait.result() for wait in waits) == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_usable_cores_heeds_affinity():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
    code += "from fastdeit.pipelines.loaders.prefetch import usable_cores; print(usable_cores())"
    out = run_python("-c", code, check=True, timeout=60)
    assert out.stdout.strip() == "1"
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


SCRIPT = """
import itertools, sys, time
from fastdeit.pipelines.loaders.prefetch import Prefetcher, make_pool

pool = make_pool(2)

def produce():
    for i in itertools.count():
        yield pool.submit(pow, i, 2).result()

items = Prefetcher(produce(), 2)
next(items)
print("ready", flush=True)
"""


def test_the_program_ends_though_nobody_closed():
    error, code = end_when_ready("-c", SCRIPT, interrupt=False)
    assert (error, code) == ("", 0)


@pytest.mark.parametrize(
    "tail",
    [
        "time.sleep(30)",
        "with items:\n    time.sleep(30)",
        "stuck = Prefetcher((time.sleep(0.2) for _ in itertools.count()), 1)\nfor _ in stuck: pass",
    ],
    ids=["open", "with", "waiting"],
)
def test_ctrl_c_ends_the_program(tail):
    error, code = end_when_ready("-c", SCRIPT + tail)
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert code == -signal.SIGINT


def test_ctrl_c_before_the_thread_starts_leaves_nothing_to_join(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Prefetcher(iter([]), 1)
    prefetch._end_all()
