"""Pools of worker threads, and an iterator that prepares items ahead in a background thread."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from fastdeit.pipelines.closing import Closing
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.machine import thread_error

T = TypeVar("T")


def usable_cores() -> int:
    """Number of cores that this process may run on: its affinity mask if the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_pool(threads: int) -> ThreadPoolExecutor:
    """A pool of `threads` worker threads, all of them started.

    Raises UserError for fewer than 1, MachineError if the machine cannot start that many.
    """
    if threads < 1:
        raise UserError(f"{threads} worker threads: at least 1 is needed")
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastdeit-worker")
    running = threading.Barrier(threads + 1)
    try:
        # Start all now. If one failed to start during the first batch, the others would go on working.
        for _ in range(threads):
            pool.submit(running.wait)
        running.wait()
    except BaseException as error:
        running.abort()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, RuntimeError) and not isinstance(error, threading.BrokenBarrierError):
            raise thread_error(error, f"{threads} worker threads cannot be started") from error
        raise
    return pool


class _Queue(Generic[T]):
    """State shared by producer and consumer. The producer holds only this, so a dropped consumer can be collected."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.ready: deque[T] = deque()
        self.error: BaseException | None = None
        self.finished = False
        self.stopped = False
        # Reentrant, since a garbage collection may call `stop` in a thread that holds the lock.
        self.changed = threading.Condition(threading.RLock())

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.ready.clear()
            self.changed.notify_all()

    def fill(self, items: Iterator[T]) -> None:
        """Runs in the producer: keep up to `depth` items ready until they run out or `stop` is called."""
        try:
            while self._wait_for_room():
                try:
                    item = next(items)
                except StopIteration:
                    break
                with self.changed:
                    if not self.stopped:
                        self.ready.append(item)
                        self.changed.notify_all()
                del item
        except BaseException as error:
            self.error = error
        finally:
            self._finish(items)

    def _wait_for_room(self) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or len(self.ready) < self.depth)
            return not self.stopped

    def _finish(self, items: Iterator[T]) -> None:
        """Close a generator in the thread that ran it, then wake the consumer."""
        try:
            if isinstance(items, Generator):
                items.close()
        except BaseException as error:
            self.error = self.error or error
        finally:
            with self.changed:
                self.finished = True
                self.changed.notify_all()


class Prefetcher(Closing, Generic[T]):
    """Iterator over `items` that prepares up to `depth` of them ahead, in one background thread.

    items  any iterable; only the background thread iterates it and, if it is a generator, closes it
    depth  most items that are ready or in preparation at once, besides the one in use

    An exception in `items` is raised here, after the items before it. `close`, or leaving the `with` block, ends the
    thread and returns once the item in preparation is done. Dropping the prefetcher also ends its thread.

    wait_seconds  time that the consumer has spent waiting for items

    Raises UserError for a depth below 1, MachineError if the machine cannot start the thread, and RuntimeError when an
    item is requested after `close`.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        if depth < 1:
            raise UserError(f"a prefetch depth of {depth}: at least 1 item must be prepared ahead")
        self.wait_seconds = 0.0
        self._queue: _Queue[T] = _Queue(depth)
        # A daemon: the interpreter joins other threads before anything could stop this one.
        self._thread = threading.Thread(
            target=self._queue.fill, args=(iter(items),), name="fastdeit-prefetch", daemon=True
        )
        # No join here: the garbage collector may run in a worker thread that the producer waits for.
        weakref.finalize(self, self._queue.stop).atexit = False
        _running[self._thread] = self._queue
        try:
            self._thread.start()
        except RuntimeError as error:
            raise thread_error(error, "the thread that prepares batches cannot be started") from error

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        queue = self._queue
        with queue.changed:
            if queue.stopped:
                raise RuntimeError("an item was requested after the prefetcher was closed: open a new one")
            if not queue.ready and not queue.finished:
                start = time.perf_counter()
                try:
                    queue.changed.wait_for(lambda: queue.ready or queue.finished)
                finally:
                    self.wait_seconds += time.perf_counter() - start
            if queue.ready:
                item = queue.ready.popleft()
                queue.changed.notify_all()
                return item
            if queue.error is not None:
                error, queue.error = queue.error, None
                raise error
            raise StopIteration

    def close(self) -> None:
        """End the thread and drop the items that are ready; may be called twice."""
        self._queue.stop()
        self._thread.join()


_running: weakref.WeakKeyDictionary[threading.Thread, _Queue] = weakref.WeakKeyDictionary()


@atexit.register
def _end_all() -> None:
    """End the threads of open prefetchers before the interpreter tears down the modules that they use."""
    for thread, queue in list(_running.items()):
        queue.stop()
        if thread.is_alive():  # after Ctrl-C it may not have started yet; it then ends by itself
            thread.join()
