"""The images of a source as they are stored, made by several processes, in a fixed order."""

from __future__ import annotations

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

CHUNK = 16  # samples a worker is handed at once
SMALL = 2048  # samples that one process converts before others have started
LONGEST = 500  # characters of a reason


class ConvertError(UserError):
    """A conversion that cannot be done as asked; says which sample, why, and what to do."""


@dataclass(frozen=True)
class Encoded:
    """A sample of a source as it is stored, with the zlib.crc32 of its bytes."""

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

    workers  processes; 0: one for every usable core, one for a small data set

    Samples that a source holds in memory are encoded in this process; other processes are spawned. A label that names
    no class makes a Reject, as a damaged image does. Raises SourceError where the source is at fault, ConvertError
    where a process dies or memory runs out, MachineError where the machine reads no sample or starts no process.
    """
    if workers < 0:
        raise ConvertError(f"{workers} workers: give 0 for all cores, or how many")
    workers = workers or (1 if len(indices) < SMALL else len(os.sched_getaffinity(0)))
    if workers == 1 or source.in_memory:
        for index in indices:
            yield _encode_sample(source, index, encoding)
        return
    # Spawned, since a fork of a process with threads (torch's, a progress bar's) may hang.
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
        raise ConvertError("a worker process died, most likely for want of memory: give fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Have Ctrl-C wait until the block has ended, and never reach a process that it starts.

    One that is still importing would end in a traceback: it cannot ignore the signal before it runs.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
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
    # A damaged image makes PIL raise whatever its parsing trips over.
    except Exception as error:
        name = source.name(index)
        if isinstance(error, OSError) and error.errno in STATES:
            raise machine_error(error, f"{name}, sample {index}: cannot be read") from error
        return Reject(index, printable(name), reason(error, name))
    return Encoded(image, label, binascii.crc32(image.data))


def reason(error: Exception, name: str = "") -> str:
    """What an error says of the image `name`, the same in every run, as a sentence can go on with it."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that PIL knows"
    text = str(error).removeprefix(f"{name}: ") or type(error).__name__
    # Addresses differ from run to run.
    return printable(re.sub(r" at 0x[0-9a-f]+", "", text))[:LONGEST]


_worker: tuple[Source, Encoding]  # of a worker process, set once at its start


def _start_worker(source: Source, encoding: Encoding) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = source, encoding


def _end_with_parent() -> None:
    # A parent that is killed cannot end its workers, who would wait for more to do forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_chunk(indices: list[int]) -> list[Encoded | Reject]:
    source, encoding = _worker
    return [_encode_sample(source, index, encoding) for index in indices]
