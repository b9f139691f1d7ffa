"""Worker threads, and items prepared ahead of their use by a thread of their own."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.machine import thread_error

T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may run on: its affinity mask where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_pool(threads: int) -> ThreadPoolExecutor:
    """A pool of `threads` worker threads, all of them running.

    Raises UserError for fewer than 1, MachineError where the machine starts no more.
    """
    if threads < 1:
        raise UserError(f"{threads} worker threads: at least 1 is needed")
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastdeit-worker")
    running = threading.Barrier(threads + 1)
    try:
        # Here rather than with the first images, where a thread that does not start would leave others at work.
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
    """What producer and consumer share. The producer knows nothing else, so that a forgotten consumer can end."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.ready: deque[T] = deque()
        self.error: BaseException | None = None
        self.ended = False
        self.stopped = False
        # Reentrant, since a garbage collection may call `stop` in a thread that is inside.
        self.changed = threading.Condition(threading.RLock())

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.ready.clear()
            self.changed.notify_all()

    def fill(self, items: Iterator[T]) -> None:
        """Run in the producer: keep up to `depth` items ready until there are no more, or until stopped."""
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
            self._end(items)

    def _wait_for_room(self) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or len(self.ready) < self.depth)
            return not self.stopped

    def _end(self, items: Iterator[T]) -> None:
        """Let a generator clean up in the thread that it ran in, then tell the consumer."""
        try:
            if isinstance(items, Generator):
                items.close()
        except BaseException as error:
            self.error = self.error or error
        finally:
            with self.changed:
                self.ended = True
                self.changed.notify_all()


class Prefetcher(Generic[T]):
    """Iterator over `items` that prepares up to `depth` of them ahead, in one background thread.

    items  any iterable; it is iterated, and closed if it is a generator, in the background thread only
    depth  items that may be ready or in the making at any time, beside the one in use

    An exception of `items` is raised here after the items before it. `close`, or leaving the `with` block for any
    reason, ends the thread: it returns once the item in the making is done. A prefetcher that is dropped without
    that ends its thread as well.

    wait_seconds  time the consumer has spent waiting for items

    Raises UserError for a depth below 1, RuntimeError for an item asked for after `close`, MachineError where the
    machine starts no more threads.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        if depth < 1:
            raise UserError(f"a prefetch depth of {depth}: at least 1 item must be prepared ahead")
        self.wait_seconds = 0.0
        self._queue: _Queue[T] = _Queue(depth)
        # A daemon, since the interpreter joins all others before anything could tell this one to stop.
        self._thread = threading.Thread(
            target=self._queue.fill, args=(iter(items),), name="fastdeit-prefetch", daemon=True
        )
        # No join here: the collector may run in a worker thread that the producer waits for.
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
                raise RuntimeError("an item was asked for after the prefetcher was closed: open a new one")
            if not queue.ready and not queue.ended:
                start = time.perf_counter()
                try:
                    queue.changed.wait_for(lambda: queue.ready or queue.ended)
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
        """End the thread and drop what is ready; may be called twice."""
        self._queue.stop()
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_running: weakref.WeakKeyDictionary[threading.Thread, _Queue] = weakref.WeakKeyDictionary()


@atexit.register
def _end_all() -> None:
    """End the threads of prefetchers still open, before what they use is torn down with the interpreter."""
    for thread, queue in list(_running.items()):
        queue.stop()
        if thread.is_alive():  # Ctrl-C may have come before it started: it then ends by itself
            thread.join()
