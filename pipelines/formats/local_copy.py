"""A machine's own copy of a data set, made once by whichever of its processes comes first, and checked."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from fastdeit.pipelines.errors import UserError, naming
from fastdeit.pipelines.formats.beton_layout import sidecar_path
from fastdeit.pipelines.formats.dataset import Dataset, open_dataset
from fastdeit.pipelines.formats.files import open_regular, sync_folder
from fastdeit.pipelines.formats.shard_layout import KNOWN, KNOWN_NODES, NODES
from fastdeit.pipelines.locks import lock
from fastdeit.pipelines.machine import check_space, machine_error

_PIECE = 8 << 20  # bytes copied at once
_THREADS, _CHUNK = 8, 1024  # threads that check the copy, and images that each checks at a time
_PARTIAL = ".partial-"


def local_copy(dataset: Dataset, cache: Path, say: Callable[[str], object], *, progress: bool = False) -> Dataset:
    """The copy of `dataset` in the folder `cache`, made now if it is not there yet; itself if it lies in that folder.

    Each copy has its own folder, named after the data set and its sidecar's seal, so a data set that is converted again
    is copied again, also if only its class names changed. Processes that want the same copy at the same time wait for
    the first. The folder gets its name only when the copy is complete and the checksum of each image is right.

    say       is called with a sentence when copying begins, and when this process waits for another
    progress  whether to show a bar

    Raises UserError for a data set without checksums, or one that changed while it was copied; MachineError if the disk
    is too small or fails; OSError if `cache` cannot be made.
    """
    if dataset.sidecar is None or dataset.checksums is None:
        raise UserError(
            f"{dataset.path} has no checksums, so a copy of it could not be checked: convert it with fastdeit-convert, "
            f"or leave out --data.cache_dir"
        )
    path = dataset.path.resolve()
    if str(path.parent) == os.path.realpath(cache):  # where it was converted to
        return dataset
    folder = cache / f"{path.name}-{dataset.sidecar['seal'][:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        if not folder.exists():  # a finished copy needs no lock, which a read-only or another user's folder refuses
            with one_at_a_time(folder, say) as held:
                if not folder.exists():
                    _make(dataset, folder, say, progress, locked=held is not None)
    except OSError as error:
        raise machine_error(error, f"{dataset.path}: cannot be copied to {folder}") from error
    return _open(folder / path.name, dataset)


@contextlib.contextmanager
def one_at_a_time(folder: Path, say: Callable[[str], object], verb: str = "copy") -> Iterator[IO[Any] | None]:
    """Hold the lock of a file or folder that is made. The lock's file stays: another process may be waiting for it.

    Yields that file, or None if the file system has no locks. A process that inherits its descriptor holds the lock
    too.
    """
    with open(folder.with_name(f"{folder.name}.lock"), "ab") as file:
        try:
            locked = lock(file)
        except BlockingIOError:
            say(f"waiting for another process to {verb} to {folder}")
            locked = lock(file, wait=True)
        yield file if locked else None


def _make(dataset: Dataset, folder: Path, say: Callable[[str], object], progress: bool, *, locked: bool) -> None:
    files = _files(dataset)
    size = sum(path.stat().st_size for path in files.values())
    # Without file locks, two processes may copy at once: each has its own folder, and the first to finish wins.
    partial = folder.with_name(f"{folder.name}{_PARTIAL}{socket.gethostname()}-{os.getpid()}")
    for other in folder.parent.glob(f"{glob.escape(folder.name)}{_PARTIAL}*"):
        if _was_left(other, locked):
            shutil.rmtree(other, ignore_errors=True)
    check_space(folder.parent, size, str(dataset.path), "--data.cache_dir")
    say(f"copying {dataset.path} ({size / 1e9:.1f} GB) to {folder}")
    try:
        bar = tqdm(total=size, unit="B", unit_scale=True, desc="copy", leave=False, disable=None if progress else True)
        with bar:
            for name, source in files.items():
                _copy(source, partial / name, bar)
        copy = _open(partial / dataset.path.resolve().name, dataset)
        _check(copy, dataset)
        copy.close()
        sync_folder(partial)
        with contextlib.suppress(FileExistsError):
            partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(dataset: Dataset) -> dict[Path, Path]:
    """The files of a data set, and where each lies in the folder of a copy."""
    path = dataset.path.resolve()
    if not path.is_dir():
        sidecar = sidecar_path(path)
        return {Path(path.name): path, Path(sidecar.name): sidecar}
    files = [each for each in path.iterdir() if KNOWN.fullmatch(each.name)]
    if (path / NODES).is_dir():
        files += [each for each in (path / NODES).iterdir() if KNOWN_NODES.fullmatch(each.name)]
    return {each.relative_to(path.parent): each for each in sorted(files)}


def _copy(source: Path, target: Path, bar: tqdm) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(open_regular(source), "rb", buffering=0) as old, naming(target), open(target, "wb", buffering=0) as new:
        while piece := old.read(_PIECE):
            view = memoryview(piece)
            while view:
                view = view[new.write(view) :]
            bar.update(len(piece))
        os.fsync(new.fileno())


def _open(copy: Path, original: Dataset) -> Dataset:
    """Open a copy. Raises UserError unless it holds what the original does."""
    try:
        dataset = open_dataset(copy)
    except FileNotFoundError as error:
        raise UserError(
            f"{copy} is missing: delete the folder {copy.parent}, and the next run copies it again"
        ) from error
    if (dataset.sidecar or {}).get("seal") != (original.sidecar or {}).get("seal"):
        raise UserError(
            f"{copy} is not a copy of {original.path}, which may have changed while it was copied: delete the folder "
            f"{copy.parent}, and run the same command again"
        )
    return dataset


def _check(copy: Dataset, original: Dataset) -> None:
    """Raise UserError, naming the image, if a checksum in a copy is wrong."""

    def wrong(start: int) -> int | None:
        assert copy.checksums is not None
        indices = range(start, min(start + _CHUNK, len(copy)))
        return next((index for index in indices if not copy.checksums.fits(index, copy.read(index))), None)

    with ThreadPoolExecutor(_THREADS) as pool:
        bad = [index for index in pool.map(wrong, range(0, len(copy), _CHUNK)) if index is not None]
    if bad:
        raise UserError(
            f"{copy.path}: the checksum of image {bad[0]} is wrong after copying: check {original.path} with "
            f"fastdeit-convert --verify, and the disk of {copy.path.parent}"
        )


def _was_left(partial: Path, locked: bool) -> bool:
    """Whether a process of this machine made `partial` and has ended.

    Whoever holds the lock is the only one who copies, and in a restarted container another process may have that id.
    """
    host, _, pid = partial.name.rpartition(_PARTIAL)[2].rpartition("-")
    return host == socket.gethostname() and pid.isdecimal() and (locked or not Path(f"/proc/{pid}").exists())
