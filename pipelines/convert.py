"""Conversion of a source of images into a beton file, on all cores, in a fixed order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import UnidentifiedImageError
from tqdm import tqdm

from fastdeit.pipelines.beton import BetonWriter
from fastdeit.pipelines.encode import CHANGES, Encoding, Mode, Stored, encode
from fastdeit.pipelines.sources import Source, SourceError, open_source

Sample = tuple[Stored, int]  # with its label

CHUNK = 16  # samples a worker is handed at once
SMALL = 2048  # samples that one process converts before others have started


class ConvertError(ValueError):
    """A conversion that cannot be done as asked; says which sample, why, and what to do."""


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    counts    images by what happened to them, see `encode.CHANGES`
    bytes     size of the file written
    seconds   wall clock
    sidecar   what was written beside the file
    """

    dest: Path
    num_samples: int
    num_classes: int
    counts: dict[str, int]
    bytes: int
    seconds: float
    sidecar: dict[str, Any]

    def __str__(self) -> str:
        facts = {k: len(v) if isinstance(v, list) else v for k, v in self.sidecar["source"].items()}
        source = ", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in facts.items() if fact)
        counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in self.counts.items() if n)
        return (
            f"{self.dest}: {self.num_samples} images in {self.num_classes} classes, {self.bytes / 1e6:.1f} MB\n"
            f"  source: {source}\n"
            f"  images: {counts}\n"
            f"  {self.seconds:.1f} s, {self.num_samples / self.seconds:.0f} images/s, "
            f"{self.bytes / 1e6 / self.seconds:.1f} MB/s written"
        )


def convert(
    source: str | os.PathLike[str] | Source,
    dest: str | os.PathLike[str],
    *,
    max_side: int | None = None,
    mode: Mode = "auto",
    quality: int = 92,
    workers: int = 0,
    shuffle_seed: int | None = None,
    limit: int | None = None,
    class_names: list[str] | None = None,
    progress: bool = True,
) -> Report:
    """Write the images of `source` to the beton file `dest` and its sidecar, whole or not at all.

    source        what `open_source` understands, or an open source
    max_side, mode, quality   how images are stored, see `Encoding`
    workers       processes; 0: one for every usable core, one for a small data set. Changes no byte of the file
    shuffle_seed  store the samples in a random order; None: in the source's
    limit         convert only the first so many of that order
    class_names   for `open_source`
    progress      show a progress bar and print the report

    Samples that a source holds in memory are converted in this process; other processes are spawned, so a script
    that calls this needs its `if __name__ == "__main__"`. An existing `dest` is replaced once the
    new file is complete. Raises SourceError, BetonError or ConvertError; an image that cannot be read ends the
    conversion with its name.
    """
    start = time.perf_counter()
    encoding = Encoding(mode=mode, quality=quality, max_side=max_side)
    if isinstance(source, (str, os.PathLike)):
        source = open_source(source, class_names=class_names)
    elif class_names is not None:
        raise ConvertError("class_names go to open_source where the source is opened already")
    dest = Path(dest)
    if not dest.parent.is_dir():
        raise ConvertError(f"{dest}: the folder {dest.parent} does not exist: create it first")
    if dest.is_dir():
        raise ConvertError(f"{dest}: is a folder: name a file, e.g. {dest / 'train.beton'}")
    order = sample_order(len(source), shuffle_seed, limit)
    counts: Counter[str] = Counter(dict.fromkeys(CHANGES, 0))
    last_label = 0
    with (
        BetonWriter(dest, len(order)) as writer,
        closing(_encoded(source, order, encoding, workers)) as samples,
        tqdm(total=len(order), unit=" images", disable=not progress) as bar,
    ):
        for image, label in samples:
            writer.add(image.data, height=image.height, width=image.width, label=label, mode=image.mode)
            counts.update(image.changes)
            last_label = max(last_label, label)
            bar.update()
        sidecar = writer.finish(
            class_names=source.class_names or [str(i) for i in range(last_label + 1)],
            source=source.describe(),
            options={
                "mode": mode,
                "quality": quality,
                "max_side": max_side,
                "shuffle_seed": shuffle_seed,
                "limit": limit,
                "pillow": PIL.__version__,
            },
            counts=dict(counts),
        )
    report = Report(
        dest=dest,
        num_samples=len(order),
        num_classes=len(sidecar["class_names"]),
        counts=dict(counts),
        bytes=dest.stat().st_size,
        seconds=time.perf_counter() - start,
        sidecar=sidecar,
    )
    if progress:
        print(report)
    return report


def sample_order(count: int, shuffle_seed: int | None, limit: int | None) -> np.ndarray:
    """Source indices in the order they are stored, (N,) int64. Raises ConvertError where none would be."""
    if count == 0:
        raise ConvertError("the source holds no images")
    if limit is not None and limit < 1:
        raise ConvertError(f"limit {limit}: at least one image must be converted")
    order = np.arange(count, dtype=np.int64)
    if shuffle_seed is not None:
        if shuffle_seed < 0:
            raise ConvertError(f"shuffle seed {shuffle_seed} is negative")
        # Sorted raw words, since numpy promises the bit stream for all versions but not its permutations.
        words = np.asarray(np.random.Philox(key=shuffle_seed).random_raw(count))
        order = np.argsort(words, kind="stable")
    return order[:limit]


def _encoded(source: Source, order: np.ndarray, encoding: Encoding, workers: int) -> Generator[Sample, None, None]:
    """The samples of `order`, in that order, with their labels."""
    if workers < 0:
        raise ConvertError(f"{workers} workers: give 0 for all cores, or how many")
    workers = workers or (1 if len(order) < SMALL else len(os.sched_getaffinity(0)))
    chunks = [order[i : i + CHUNK].tolist() for i in range(0, len(order), CHUNK)]
    if workers == 1 or source.in_memory:
        for chunk in chunks:
            for index in chunk:
                yield _encode_sample(source, index, encoding)
        return
    # Spawned, since a fork of a process with threads (torch's, a progress bar's) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (source, encoding))
    try:
        waiting: deque[Future[list[Sample]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) == 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ConvertError("a worker process died, most likely for want of memory: give fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_sample(source: Source, index: int, encoding: Encoding) -> Sample:
    name = "the source"
    try:
        item, label, name = source.read(index)
        if label < 0 or (source.class_names is not None and label >= len(source.class_names)):
            known = "" if source.class_names is None else f", there are {len(source.class_names)} class names"
            raise SourceError(f"{name}, sample {index}: label {label} names no class{known}. Give --class-names")
        return encode(item, encoding), label
    except SourceError:
        raise
    # A damaged image makes PIL raise whatever its parsing trips over.
    except Exception as error:
        reason = "not an image that PIL knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ConvertError(
            f"{name}, sample {index}: cannot be converted: {reason or type(error).__name__}. "
            f"Repair the image or remove it, then convert again"
        ) from error


_worker: tuple[Source, Encoding]  # of a worker process, set once at its start


def _start_worker(source: Source, encoding: Encoding) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = source, encoding


def _encode_chunk(indices: list[int]) -> list[Sample]:
    source, encoding = _worker
    return [_encode_sample(source, index, encoding) for index in indices]
