"""`python -m benchmarks loaders`: training batches per second of the complete recipe, from JPEG files.

Ours and the peers' side by side in one run: every side is a process group of its own, the windows alternate between
them, and a side whose turn it is not is stopped, so that it neither works ahead nor takes anything from the others.
"""

from __future__ import annotations

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

from benchmarks.loaders.contender_process import Side, SideError
from benchmarks.loaders.contenders import SIDES
from benchmarks.loaders.page_cache import evict, resident, warm
from benchmarks.loaders.peers.stream import Missing, Setting
from benchmarks.loaders.tables import report, verdicts
from benchmarks.photos import copy_photos, make_photos, shrink_photos
from benchmarks.record import PACKAGES, PEERS, RESULTS, append, environment
from fastdeit.cli import parse, run
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import sidecar_path
from fastdeit.pipelines.loaders.prefetch import usable_cores

_START_SECONDS = 12.0  # of a side on two cores of 2023, for the estimate only
_WARM_PASSES = 100
_NOT_EVICTED = 0.05  # share of the bytes that stays cached where the system does not do what it was advised

Cache = Literal["warm", "cold"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Loaders with the complete recipe, the peers' beside ours in the same run.

    Several thread counts, sizes of photograph or states of the page cache are measured one after another, each a
    record with all sides.
    """

    photos: Path = Path("runs/photos")  # JPEG files as an ImageFolder tree; cut from Debian's wallpapers if not there
    photo_side: tuple[int, ...] = (0,)  # longest side that the photographs are reduced to first; 0: as they are
    threads: tuple[int, ...] = (0,)  # decoding threads or worker processes, and cores, of each side; 0: all cores
    cache: tuple[Cache, ...] = ("warm",)  # cold: emptied before each window, which then reads no image twice
    sides: tuple[str, ...] = tuple(SIDES)  # whom to measure; x3: with repeated augmentation
    repeats: tuple[int, ...] = (3, 1)  # those of our sides that have as many copies of an image in a batch
    batch: int = 128
    windows: int = 5  # timed windows of each side
    window_seconds: float = 3.0
    cold_images: int = 10_000  # copies of the photographs to so many files for the cold windows
    quick: bool = False  # 3 windows of 1 s: a look, not a figure to quote
    full: bool = False  # sides of 256, 400 and 500 pixels, 1 to all cores, warm and cold
    results: Path = RESULTS / "loaders.jsonl"


@dataclass(frozen=True)
class Case:
    """What a record is about."""

    photo_side: int
    cache: Cache
    threads: int


def cases(options: Options) -> list[Case]:
    """Every combination that the options name, those on the same photographs one behind another."""
    cores = usable_cores()
    if options.full:
        counts = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
        sides, caches, threads = (256, 400, 500), get_args(Cache), tuple(counts)
    else:
        sides, caches = options.photo_side, options.cache
        threads = tuple(count or cores for count in options.threads)
    found = [Case(side, cache, count) for side, cache, count in itertools.product(sides, caches, threads)]
    if too_many := [case.threads for case in found if not 1 <= case.threads <= cores]:
        raise UserError(f"--threads {too_many[0]}: this process may use {cores} cores, and a side as many threads")
    return found


def chosen_sides(options: Options) -> list[str]:
    """The sides to measure. Raises UserError for one that does not exist, or where none is left."""
    if unknown := [name for name in options.sides if name not in SIDES]:
        raise UserError(f"--sides {' '.join(unknown)}: there are only {', '.join(SIDES)}")
    found = [name for name in options.sides if SIDES[name].repeats in (None, *options.repeats)]
    if not found:
        raise UserError(f"--repeats {' '.join(map(str, options.repeats))}: no side of --sides has as many")
    return found


def measure(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run, a case each: rates, CPU time and peak memory of every side.

    A side that fails, or is not installed, is left out and named with the reason. `folder` is for data. Raises
    UserError for a side that does not exist, a folder without photographs, and a page cache that cannot be emptied.
    """
    names, todo = chosen_sides(options), cases(options)
    photos = prepare_photos(options.photos)
    seconds = len(todo) * len(names) * (_START_SECONDS + 1.7 * options.windows * options.window_seconds)
    print(
        f"{len(todo)} cases of {len(names)} sides, {options.windows} windows of {options.window_seconds:g} s: "
        f"about {seconds / 60:.0f} minutes",
        flush=True,
    )
    with tqdm(
        total=len(todo) * len(names) * (1 + options.windows), unit=" windows", mininterval=1, disable=None
    ) as bar:
        for (side, cache), group in itertools.groupby(todo, lambda case: (case.photo_side, case.cache)):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                data = _prepare(options, photos, side, cache, Path(place))
                for case in group:
                    yield _measure_case(options, case, names, data, bar)


@dataclass(frozen=True)
class _Data:
    """What the sides of a case read, and where they may write."""

    photos: Path
    beton: Path
    folder: Path
    facts: dict[str, Any]


def _prepare(options: Options, photos: list[Path], side: int, cache: Cache, folder: Path) -> _Data:
    tree, facts = options.photos, {"photos_not_reduced": 0}
    if side:
        tree = folder / "reduced"
        facts["photos_not_reduced"] = shrink_photos(options.photos, tree, side)
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
        os.sync()  # a page that is not written yet cannot be dropped
        evict(files)
        if (left := resident(files)) > _NOT_EVICTED:
            raise UserError(
                f"--cache cold: {left:.0%} of {folder} stays in the page cache, as on a file system in memory: "
                "set TMPDIR to a folder on a disk"
            )
    else:
        warm(files)
    return _Data(tree, beton, folder, facts)


def _measure_case(options: Options, case: Case, names: Sequence[str], data: _Data, bar: tqdm) -> dict[str, Any]:
    record: dict[str, Any] = {
        "benchmark": "loaders",
        "environment": environment((*PACKAGES, *PEERS)),
        "load_before": os.getloadavg()[0],
        "batch": options.batch,
        "cache": case.cache,
        "threads": case.threads,
        "memory": "largest sum over a side's processes of the proportional set size, looked at twice a second",
        **data.facts,
    }
    failed: dict[str, str] = {}
    missing: dict[str, str] = {}
    with _started(options, case, names, data, failed, missing, bar) as sides:
        for window in range(options.windows):
            # Every other round runs backwards, so that no side always follows the same one.
            for side in list(sides.values())[:: -1 if window % 2 else 1]:
                name = side.setting.name
                bar.set_postfix_str(name, refresh=False)
                try:
                    side.run_window(options.window_seconds, cold=case.cache == "cold")
                except SideError as error:
                    failed[name] = str(error)
                    sides.pop(name).kill()
                bar.update()
        figures = {name: {"work": SIDES[name].work, **side.figures()} for name, side in sides.items()}
    return {**record, "failed": failed, "missing": missing, "sides": figures}


@contextlib.contextmanager
def _started(
    options: Options,
    case: Case,
    names: Sequence[str],
    data: _Data,
    failed: dict[str, str],
    missing: dict[str, str],
    bar: tqdm,
) -> Iterator[dict[str, Side]]:
    """The sides, warm and stopped; killed in the end. One that does not start is named with the reason."""
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory(dir=data.folder) as scratch:
        try:
            for name in names:
                bar.set_postfix_str(f"{name} starts")
                own = Path(scratch) / name
                own.mkdir()
                beton = data.beton
                if case.cache == "cold" and SIDES[name].reads == "beton":
                    # What a process maps, no other can drop.
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
                    sides[name] = Side.start(setting, own)
                except SideError as error:
                    failed[name] = str(error)
                except Missing as error:
                    missing[name] = str(error)
                bar.update(1 if name in sides else 1 + options.windows)
            yield sides
        finally:
            for side in sides.values():
                side.kill()


def prepare_photos(folder: Path) -> list[Path]:
    """The JPEG files in `folder`, cut first where it does not exist. Raises UserError where it holds none."""
    if not folder.exists():
        print(f"{folder}: cutting photographs, once, for some minutes", flush=True)
        make_photos(folder)
    photos = sorted(folder.glob("*/*.jpg"))
    if not photos:
        raise UserError(f"--photos {folder}: no JPEG files in its class folders; name another, or one to be made")
    return photos


def loaders(options: Options) -> bool:
    """Measure, print, and append to the results; whether every side that is installed could be timed."""
    if options.quick:
        options = dataclasses.replace(options, windows=3, window_seconds=1.0)
    timed = True
    with tempfile.TemporaryDirectory() as folder:
        for record in measure(options, Path(folder)):
            append(options.results, {**record, "targets": verdicts(record)})
            tqdm.write(report(record))
            timed = timed and not record["failed"]
    return timed


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where a side could not be timed."""
    if not run(lambda: loaders(parse(Options, "python -m benchmarks loaders", argv))):
        sys.exit(1)
