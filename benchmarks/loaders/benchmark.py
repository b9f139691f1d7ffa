"""`python -m benchmarks loaders`: training batches per second of the complete recipe, from JPEG files.

Our loaders and the peers' run together: each contender is its own process group, their windows alternate, and a
contender is stopped between its windows, so it neither prefetches nor takes resources from the others.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image
from tqdm import tqdm

from benchmarks.loaders.contender_process import ContenderError, ContenderProcess
from benchmarks.loaders.contenders import CONTENDERS
from benchmarks.loaders.page_cache import evict, resident, warm
from benchmarks.loaders.peers.stream import Missing, Setting
from benchmarks.loaders.report import table, targets
from benchmarks.photos import copy_photos, prepare_photos, shrink_photos
from benchmarks.record import PACKAGES, PEERS, RESULTS, append, environment
from benchmarks.render import target_lines
from fastdeit.cli import parse, run
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import sidecar_path
from fastdeit.pipelines.loaders.prefetch import usable_cores

_START_SECONDS = 12.0  # of a contender on two cores of 2023, only for the estimate
_WARM_PASSES = 100
_NOT_EVICTED = 0.05  # a larger share of cached bytes means that the system ignores the advice to drop them

Cache = Literal["warm", "cold"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time loaders with the complete recipe, ours and the peers' in the same run.

    Several thread counts, photograph sizes or page cache states are measured one after another; each is a record with
    all contenders.
    """

    photos: Path = Path("runs/photos")  # JPEG files as an ImageFolder tree; cut from Debian's wallpapers if not there
    photo_side: tuple[int, ...] = (0,)  # reduce the photographs' longest side to this first; 0: unchanged
    threads: tuple[int, ...] = (0,)  # decoding threads or workers, and cores, of each contender; 0: all cores
    cache: tuple[Cache, ...] = ("warm",)  # cold: empty before each window, which then reads no image twice
    sides: tuple[str, ...] = tuple(CONTENDERS)  # contenders to measure; x3: with repeated augmentation
    repeats: tuple[int, ...] = (3, 1)  # keep only those of ours with so many copies of an image in a batch
    batch: int = 128
    windows: int = 5  # timed windows of each contender
    window_seconds: float = 3.0
    cold_images: int = 10_000  # number of copies of the photographs for the cold windows
    quick: bool = False  # 3 windows of 1 s: for a quick look, not for publication
    full: bool = False  # sides of 256, 400 and 500 pixels, 1 to all cores, warm and cold
    results: Path = RESULTS / "loaders.jsonl"


@dataclass(frozen=True)
class LoaderCase:
    """The configuration of a record."""

    photo_side: int
    cache: Cache
    threads: int


def cases(options: Options) -> list[LoaderCase]:
    """Every combination in the options; those with the same photographs are adjacent."""
    cores = usable_cores()
    if options.full:
        counts = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
        sides, caches, threads = (256, 400, 500), get_args(Cache), tuple(counts)
    else:
        sides, caches = options.photo_side, options.cache
        threads = tuple(count or cores for count in options.threads)
    todo = [LoaderCase(side, cache, count) for side, cache, count in itertools.product(sides, caches, threads)]
    if too_many := [case.threads for case in todo if not 1 <= case.threads <= cores]:
        raise UserError(f"--threads {too_many[0]}: this process may use {cores} cores, and a contender as many threads")
    return todo


def chosen_contenders(options: Options) -> list[str]:
    """The contenders to measure. Raises UserError for an unknown one, or if none is left."""
    if unknown := [name for name in options.sides if name not in CONTENDERS]:
        raise UserError(f"--sides {' '.join(unknown)}: there are only {', '.join(CONTENDERS)}")
    names = [name for name in options.sides if CONTENDERS[name].repeats in (None, *options.repeats)]
    if not names:
        raise UserError(f"--repeats {' '.join(map(str, options.repeats))}: no contender of --sides has as many")
    return names


def measure(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a record per case: rates, CPU time and peak memory of every contender.

    A contender that fails or is not installed is skipped and named with the reason. `folder` is for data. Raises
    UserError for an unknown contender, a folder without photographs, and a page cache that cannot be emptied.
    """
    names, todo = chosen_contenders(options), cases(options)
    photos = prepare_photos(options.photos)
    seconds = len(todo) * len(names) * (_START_SECONDS + 1.7 * options.windows * options.window_seconds)
    print(
        f"{len(todo)} cases of {len(names)} contenders, {options.windows} windows of {options.window_seconds:g} s: "
        f"about {seconds / 60:.0f} minutes",
        flush=True,
    )
    with tqdm(
        total=len(todo) * len(names) * (1 + options.windows), unit=" windows", mininterval=1, disable=None
    ) as bar:
        for (photo_side, cache), group in itertools.groupby(todo, lambda case: (case.photo_side, case.cache)):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                data = _prepare(options, photos, photo_side, cache, Path(place))
                for case in group:
                    yield _measure_case(options, case, names, data, bar)


@dataclass(frozen=True)
class _Data:
    """The files that the contenders of a case read, and a folder where they may write."""

    photos: Path
    beton: Path
    folder: Path
    facts: dict[str, Any]


def _prepare(options: Options, photos: list[Path], photo_side: int, cache: Cache, folder: Path) -> _Data:
    tree, facts = options.photos, {"photos_not_reduced": 0}
    if photo_side:
        tree = folder / "reduced"
        facts["photos_not_reduced"] = shrink_photos(options.photos, tree, photo_side)
        photos = sorted(tree.glob("*/*.jpg"))
    sizes = [path.stat().st_size for path in photos]
    longest = []
    for path in photos:
        with Image.open(path) as image:
            longest.append(max(image.size))
    facts |= {"images": len(photos), "mean_bytes": round(statistics.mean(sizes)), "photo_side": max(longest)}
    if cache == "cold":
        tree = copy_photos(tree, folder / "copies", options.cold_images)
    beton = folder / "photos.beton"
    convert(str(tree), beton, progress=False)
    files = [beton, *tree.glob("*/*.jpg")]
    if cache == "cold":
        os.sync()  # the system cannot drop a page that is not written yet
        evict(files)
        if (cached := resident(files)) > _NOT_EVICTED:
            raise UserError(
                f"--cache cold: {cached:.0%} of {folder} stays in the page cache, as on a file system in memory: "
                "set TMPDIR to a folder on a disk"
            )
    else:
        warm(files)
    return _Data(tree, beton, folder, facts)


def _measure_case(options: Options, case: LoaderCase, names: Sequence[str], data: _Data, bar: tqdm) -> dict[str, Any]:
    record: dict[str, Any] = {
        "benchmark": "loaders",
        "environment": environment((*PACKAGES, *PEERS)),
        "load_before": os.getloadavg()[0],
        "batch": options.batch,
        "cache": case.cache,
        "threads": case.threads,
        "memory": "largest sum of the proportional set sizes of a contender's processes, sampled twice a second",
        **data.facts,
    }
    failed: dict[str, str] = {}
    missing: dict[str, str] = {}
    with _started(options, case, names, data, failed, missing, bar) as running:
        for window in range(options.windows):
            # Every other round runs backwards, so no contender always follows the same one.
            for name, process in list(running.items())[:: -1 if window % 2 else 1]:
                bar.set_postfix_str(name, refresh=False)
                try:
                    process.run_window(options.window_seconds, cold=case.cache == "cold")
                except ContenderError as error:
                    failed[name] = str(error)
                    running.pop(name).kill()
                bar.update()
        figures = {name: {"work": CONTENDERS[name].work, **process.figures()} for name, process in running.items()}
    return {**record, "failed": failed, "missing": missing, "sides": figures}


@contextlib.contextmanager
def _started(
    options: Options,
    case: LoaderCase,
    names: Sequence[str],
    data: _Data,
    failed: dict[str, str],
    missing: dict[str, str],
    bar: tqdm,
) -> Iterator[dict[str, ContenderProcess]]:
    """The contenders, warm and stopped; kill them at the end. One that does not start is named with the reason."""
    running: dict[str, ContenderProcess] = {}
    with tempfile.TemporaryDirectory(dir=data.folder) as scratch:
        try:
            for name in names:
                bar.set_postfix_str(f"{name} starts")
                own = Path(scratch) / name
                own.mkdir()
                beton = data.beton
                if case.cache == "cold" and CONTENDERS[name].reads == "beton":
                    # No process can drop pages that another process maps.
                    beton = Path(shutil.copyfile(beton, own / "photos.beton"))
                    shutil.copyfile(sidecar_path(data.beton), sidecar_path(beton))
                    os.sync()
                setting = Setting(
                    name=name,
                    photos=str(data.photos.resolve()),
                    beton=str(beton),
                    scratch=str(own),
                    batch=options.batch,
                    threads=case.threads,
                    passes=1 if case.cache == "cold" else _WARM_PASSES,
                )
                try:
                    running[name] = ContenderProcess.start(setting, own)
                except ContenderError as error:
                    failed[name] = str(error)
                except Missing as error:
                    missing[name] = str(error)
                bar.update(1 if name in running else 1 + options.windows)
            yield running
        finally:
            for process in running.values():
                process.kill()


def run_benchmark(options: Options) -> bool:
    """Measure, print, and append to the results; return whether every installed contender could be timed."""
    if options.quick:
        options = dataclasses.replace(options, windows=3, window_seconds=1.0)
    timed = True
    with tempfile.TemporaryDirectory() as folder:
        for record in measure(options, Path(folder)):
            record["targets"] = targets(record)
            append(options.results, record)
            tqdm.write("\n".join([table(record).text(), *target_lines(record["targets"])]))
            timed = timed and not record["failed"]
    return timed


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if a contender could not be timed."""
    if not run(lambda: run_benchmark(parse(Options, "python -m benchmarks loaders", argv))):
        sys.exit(1)
