"""`python -m benchmarks convert`: images per second into both formats, beside those who write them otherwise.

FFCV's own DatasetWriter on the one hand; the webdataset package's writer and DALI's wds2idx on the other. Every side
writes all photographs to a new place and has them on disk; the sides take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder
from tqdm import tqdm

from benchmarks.loaders.main import prepare_photos
from benchmarks.photos import copy_photos
from benchmarks.record import PACKAGES, PEERS, RESULTS, Timing, append, environment
from fastdeit.cli import parse, run
from fastdeit.pipelines.conversion import convert as converting
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton import BetonDataset
from fastdeit.pipelines.formats.files import sync_folder
from fastdeit.pipelines.loaders.prefetch import usable_cores

QUALITY = 92
SHARD_SIZE = 1000
_SMART_THRESHOLD = 1 << 18  # bytes of pixels above which FFCV stores a JPEG
_FIRST = 64  # photographs of the untimed round


@dataclass(frozen=True, kw_only=True)
class Options:
    """Conversion of photographs, the peers' writers beside ours in the same run."""

    photos: Path = Path("runs/photos")  # JPEG files as an ImageFolder tree; cut from Debian's wallpapers if not there
    images: int = 4000  # copies of the photographs to so many files
    workers: int = 0  # processes of each side that can have several; 0: what it takes by default, all cores
    sides: tuple[str, ...] = ()  # whom to measure; default: all
    windows: int = 5  # conversions by each side
    quick: bool = False  # 3 conversions of 500 images: a look, not a figure to quote
    results: Path = RESULTS / "convert.jsonl"


def ours(tree: Path, dest: Path, workers: int, **options: Any) -> int:
    return converting.convert(tree, dest, workers=workers, quality=QUALITY, progress=False, **options).num_samples


def ffcv(tree: Path, dest: Path, workers: int, **options: Any) -> int:
    """As FFCV's own scripts for ImageNet do."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(jpeg_quality=QUALITY, **options), "label": IntField()}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        DatasetWriter(str(dest), fields, num_workers=workers or usable_cores()).from_indexed_dataset(
            ImageFolder(str(tree))
        )
    with BetonDataset(dest) as dataset:
        return len(dataset)


def tar_writer(tree: Path, dest: Path, workers: int) -> int:
    """In one process, which is all that the package has."""
    from wds2idx import IndexCreator
    from webdataset.writer import ShardWriter

    dest.mkdir()
    with (
        contextlib.redirect_stdout(io.StringIO()),  # a line a shard
        ShardWriter(str(dest / "shard-%06d.tar"), maxcount=SHARD_SIZE, maxsize=1e12) as writer,
    ):
        for number, (path, label) in enumerate(ImageFolder(str(tree)).samples):
            writer.write({"__key__": f"{number:09d}", "jpg": Path(path).read_bytes(), "cls": label})
    samples = 0
    for shard in sorted(dest.glob("*.tar")):
        with IndexCreator(str(shard), str(shard.with_suffix(".idx")), verbose=False) as index:
            index.create_index()
        with open(shard.with_suffix(".idx"), encoding="utf-8") as file:
            samples += int(file.readline().split()[1])
    return samples


@dataclass(frozen=True)
class Side:
    """A way to convert: `write` is given the photographs, where to, and how many processes; it says how many it wrote.

    work  what becomes of an image
    """

    work: str
    write: Callable[..., int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


SIDES = {
    "fastdeit-beton": Side("beton, files as they are, decoded to check them", ours),
    "fastdeit-beton-jpeg": Side("beton, encoded anew", ours, {"mode": "jpeg"}),
    "ffcv-jpg": Side("beton, encoded anew", ffcv, {"write_mode": "jpg"}),
    "ffcv-smart": Side("beton, encoded anew", ffcv, {"write_mode": "smart", "smart_threshold": _SMART_THRESHOLD}),
    "fastdeit-webdataset": Side(
        "tar and index, files as they are, decoded to check them",
        ours,
        {"format": "webdataset", "shard_size": SHARD_SIZE},
    ),
    "webdataset+wds2idx": Side("tar and index, files as they are, unread", tar_writer),
}


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """The record of a run; `folder` is for data. A side that fails, or is not installed, is left out and named."""
    sides = {name: SIDES[name] for name in options.sides or SIDES if name in SIDES}
    if unknown := set(options.sides) - SIDES.keys():
        raise UserError(f"--sides {' '.join(sorted(unknown))}: there are only {', '.join(SIDES)}")
    if options.windows < 1 or options.images < _FIRST:
        raise UserError(f"--windows {options.windows} --images {options.images}: give at least 1 and {_FIRST}")
    prepare_photos(options.photos)
    first = copy_photos(options.photos, folder / "first", _FIRST)
    tree = copy_photos(options.photos, folder / "photos", options.images)
    sizes = [path.stat().st_size for path in tree.glob("*/*.jpg")]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    size: dict[str, int] = {}
    failed: dict[str, str] = {}
    missing: dict[str, str] = {}
    with tqdm(total=len(sides) * (1 + options.windows), unit=" conversions", mininterval=1, disable=None) as bar:
        for window in range(-1, options.windows):
            # Every other round runs backwards, so that no side always follows the same one.
            for name in list(rates)[:: -1 if window % 2 else 1]:
                bar.set_postfix_str(name)
                place = folder / name
                place.mkdir()
                try:
                    seconds = _convert(sides[name], tree if window >= 0 else first, place, options.workers)
                except ImportError as error:
                    missing[name] = f"{error}: pip install 'fastdeit[ffcv,dali,peers]'"
                except Exception as error:  # a peer's failure is its own
                    failed[name] = f"{type(error).__name__}: {error}"
                else:
                    if window >= 0:
                        rates[name].append(len(sizes) / seconds)
                        size[name] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
                if name in failed or name in missing:
                    del rates[name]
                shutil.rmtree(place)
                bar.update()
    figures = {}
    for name, each in rates.items():
        timing = Timing(tuple(each))
        figures[name] = {
            "work": sides[name].work,
            "images_per_second": round(timing.median, 1),
            "spread": round(timing.spread, 3),
            "windows": [round(rate, 1) for rate in each],
            "megabytes": round(size[name] / 1e6, 1),
        }
    return {
        "benchmark": "convert",
        "environment": environment((*PACKAGES, *PEERS)),
        "load_after": os.getloadavg()[0],
        "images": len(sizes),
        "mean_bytes": round(statistics.mean(sizes)),
        "workers": options.workers or usable_cores(),
        "failed": failed,
        "missing": missing,
        "sides": figures,
    }


def _convert(side: Side, tree: Path, place: Path, workers: int) -> float:
    """Seconds until all is on disk. Raises RuntimeError where images are missing."""
    expected = sum(1 for _ in tree.glob("*/*.jpg"))
    start = time.perf_counter()
    written = side.write(tree, place / "data", workers, **side.options)
    for path in place.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(place)
    seconds = time.perf_counter() - start
    if written != expected:
        raise RuntimeError(f"{written} of {expected} images were written")
    return seconds


def report(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    lines = [
        f"{record['images']} JPEGs of {record['mean_bytes'] / 1000:.0f} kB, {record['workers']} processes, "
        f"load {record['load_after']:.1f}",
        f"{'':22}{'im/s':>8}{'spread':>8}{'MB':>8}  work",
    ]
    for name, figures in record["sides"].items():
        lines.append(
            f"{name:22}{figures['images_per_second']:8.0f}{figures['spread']:8.0%}{figures['megabytes']:8.0f}"
            f"  {figures['work']}"
        )
    for name, reason in {**record["missing"], **record["failed"]}.items():
        lines.append(f"{name}: not measured: {reason}")
    return "\n".join(lines)


def conversions(options: Options) -> bool:
    """Measure, print, and append to the results; whether every side that is installed could be timed."""
    if options.quick:
        options = dataclasses.replace(options, windows=3, images=500)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(options, Path(folder))
    append(options.results, record)
    print(report(record))
    return not record["failed"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where a side could not be timed."""
    if not run(lambda: conversions(parse(Options, "python -m benchmarks convert", argv))):
        sys.exit(1)
