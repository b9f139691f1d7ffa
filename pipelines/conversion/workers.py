"""Encodes the images of a source in several processes, in a fixed order."""

import binascii
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import UnidentifiedImageError

from fastdeit.pipelines.conversion.encode import Encoding, Stored, encode
from fastdeit.pipelines.errors import UserError, printable
from fastdeit.pipelines.formats.beton_layout import MAX_CLASSES
from fastdeit.pipelines.machine import STATES, machine_error, shared_memory_error
from fastdeit.pipelines.sources import SampleError, Source, SourceError
from fastdeit.pipelines.sources.base import shown
from fastdeit.pipelines.terminal import escape_streams

CHUNK = 16  # samples sent to a worker at once
SMALL = 2048  # samples: one process converts fewer before others have started
LONGEST = 500  # characters of a reason


class ConvertError(UserError):
    """A conversion that cannot run as requested; says which sample, why, and what to do."""


@dataclass(frozen=True)
class Encoded:
    """An encoded sample, with the zlib.crc32 of its bytes."""

    image: Stored
    label: int
    crc32: int


@dataclass(frozen=True)
class Reject:
    """A sample of a source that cannot be stored: its index there, its name, and why."""

    index: int
    name: str
    reason: str


def encoded(
    source: Source, indices: Sequence[int], encoding: Encoding, workers: int = 0
) -> Generator[Encoded | Reject, None, None]:
    """The samples `indices` of `source`, in that order.

    workers  processes; 0: one per usable core, one for a small data set

    This process encodes the samples of a source in memory; otherwise worker processes are spawned. A damaged image, or
    a label without a class, becomes a Reject. Raises SourceError for errors of the source, ConvertError if a worker
    dies or memory runs out, and MachineError if the machine cannot read a sample or start a process.
    """
    if workers < 0:
        raise ConvertError(f"{workers} workers: give 0 for all cores, or how many")
    workers = workers or (1 if len(indices) < SMALL else len(os.sched_getaffinity(0)))
    if workers == 1 or source.in_memory:
        for index in indices:
            yield _encode_sample(source, index, encoding)
        return
    # Spawned: a fork of a process with threads (torch's, a progress bar's) may hang.
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, context, _start_worker, (source, encoding))
    except OSError as error:
        raise shared_memory_error(error, f"{workers} workers cannot be started (--workers 1 needs none)") from error
    try:
        waiting: deque[Future[list[Encoded | Reject]]] = deque()
        for at in range(0, len(indices), CHUNK):
            with _uninterrupted():
                waiting.append(pool.submit(_encode_chunk, list(indices[at : at + CHUNK])))
            if len(waiting) == 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except OSError as error:
        raise shared_memory_error(error, f"{workers} workers cannot be started (--workers 1 needs none)") from error
    except BrokenProcessPool as error:
        raise ConvertError("a worker process died, most likely because memory ran out: give fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block ends, and block it in processes that the block starts.

    A worker that is still importing cannot ignore the signal yet and would print a traceback.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _encode_sample(source: Source, index: int, encoding: Encoding) -> Encoded | Reject:
    try:
        item, label, name = source.read(index)
        most = MAX_CLASSES if source.class_names is None else len(source.class_names)
        if not 0 <= label < most:
            known = f"labels go up to {most - 1}" if source.class_names is None else f"there are {most} class names"
            raise SampleError(f"{name}: label {shown(label)} names no class, {known}. Mend it, or give --class-names")
        image = encode(item, encoding)
    except SourceError:
        raise
    except MemoryError as error:
        raise ConvertError(
            f"{source.name(index)}, sample {index}: memory ran out. Give fewer --workers, or --max-side"
        ) from error
    # On a damaged image, PIL raises almost anything.
    except Exception as error:
        name = source.name(index)
        if isinstance(error, OSError) and error.errno in STATES:
            raise machine_error(error, f"{name}, sample {index}: cannot be read") from error
        return Reject(index, printable(name), reason(error, name))
    return Encoded(image, label, binascii.crc32(image.data))


def reason(error: Exception, name: str = "") -> str:
    """The text of an error about the image `name`, without its name and the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that PIL knows"
    text = str(error).removeprefix(f"{name}: ") or type(error).__name__
    # Addresses differ between runs.
    return printable(re.sub(r" at 0x[0-9a-f]+", "", text))[:LONGEST]


_worker: tuple[Source, Encoding]  # set once, when a worker process starts


def _start_worker(source: Source, encoding: Encoding) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    escape_streams()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = source, encoding


def _end_with_parent() -> None:
    # A killed parent cannot stop its workers; they would wait for work forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_chunk(indices: list[int]) -> list[Encoded | Reject]:
    source, encoding = _worker
    return [_encode_sample(source, index, encoding) for index in indices]
