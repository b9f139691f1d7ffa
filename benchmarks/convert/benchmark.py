"""`python -m benchmarks convert`: images per second converted into both formats, by us and by other writers.

The others are FFCV's DatasetWriter, and the webdataset package's writer with DALI's wds2idx. Every converter writes all
photographs to a new folder and syncs them to disk; the converters alternate.
"""

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

from benchmarks.convert.report import table
from benchmarks.photos import copy_photos, prepare_photos
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
_WARM_UP = 64  # photographs of the untimed round


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the conversion of photographs by our writers and the peers' in the same run."""

    photos: Path = Path("runs/photos")  # JPEG files as an ImageFolder tree; cut from Debian's wallpapers if not there
    images: int = 4000  # number of copies of the photographs
    workers: int = 0  # processes of each converter that can use several; 0: all cores
    sides: tuple[str, ...] = ()  # converters to measure; default: all
    windows: int = 5  # conversions by each converter
    quick: bool = False  # 3 conversions of 500 images: for a quick look, not for publication
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
    """In one process: the package has no parallel writer."""
    from wds2idx import IndexCreator
    from webdataset.writer import ShardWriter

    dest.mkdir()
    with (
        contextlib.redirect_stdout(io.StringIO()),  # one line per shard
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
class Converter:
    """`write` takes the photographs, the destination and the number of processes, and returns the number of images.

    work  what it does with an image
    """

    work: str
    write: Callable[..., int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CONVERTERS = {
    "fastdeit-beton": Converter("beton, files as they are, decoded to check them", ours),
    "fastdeit-beton-jpeg": Converter("beton, encoded anew", ours, {"mode": "jpeg"}),
    "ffcv-jpg": Converter("beton, encoded anew", ffcv, {"write_mode": "jpg"}),
    "ffcv-smart": Converter("beton, encoded anew", ffcv, {"write_mode": "smart", "smart_threshold": _SMART_THRESHOLD}),
    "fastdeit-webdataset": Converter(
        "tar and index, files as they are, decoded to check them",
        ours,
        {"format": "webdataset", "shard_size": SHARD_SIZE},
    ),
    "webdataset+wds2idx": Converter("tar and index, files as they are, unread", tar_writer),
}


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """The record of a run; `folder` is for data. A converter that fails or is not installed is skipped and named."""
    converters = {name: CONVERTERS[name] for name in options.sides or CONVERTERS if name in CONVERTERS}
    if unknown := set(options.sides) - CONVERTERS.keys():
        raise UserError(f"--sides {' '.join(sorted(unknown))}: there are only {', '.join(CONVERTERS)}")
    if options.windows < 1 or options.images < _WARM_UP:
        raise UserError(f"--windows {options.windows} --images {options.images}: give at least 1 and {_WARM_UP}")
    prepare_photos(options.photos)
    warm_up = copy_photos(options.photos, folder / "first", _WARM_UP)
    tree = copy_photos(options.photos, folder / "photos", options.images)
    sizes = [path.stat().st_size for path in tree.glob("*/*.jpg")]
    rates: dict[str, list[float]] = {name: [] for name in converters}
    size: dict[str, int] = {}
    failed: dict[str, str] = {}
    missing: dict[str, str] = {}
    with tqdm(total=len(converters) * (1 + options.windows), unit=" conversions", mininterval=1, disable=None) as bar:
        for window in range(-1, options.windows):
            # Every other round runs backwards, so no converter always follows the same one.
            for name in list(rates)[:: -1 if window % 2 else 1]:
                bar.set_postfix_str(name)
                place = folder / name
                place.mkdir()
                try:
                    seconds = _convert(converters[name], tree if window >= 0 else warm_up, place, options.workers)
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
            "work": converters[name].work,
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


def _convert(converter: Converter, tree: Path, place: Path, workers: int) -> float:
    """Seconds until all files are on disk. Raises RuntimeError if images are missing."""
    expected = sum(1 for _ in tree.glob("*/*.jpg"))
    start = time.perf_counter()
    written = converter.write(tree, place / "data", workers, **converter.options)
    for path in place.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(place)
    seconds = time.perf_counter() - start
    if written != expected:
        raise RuntimeError(f"{written} of {expected} images were written")
    return seconds


def run_benchmark(options: Options) -> bool:
    """Measure, print, and append to the results; return whether every installed converter could be timed."""
    if options.quick:
        options = dataclasses.replace(options, windows=3, images=500)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(options, Path(folder))
    append(options.results, record)
    print(table(record).text(), f"load {record['load_after']:.1f}", sep="\n")
    return not record["failed"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if a converter could not be timed."""
    if not run(lambda: run_benchmark(parse(Options, "python -m benchmarks convert", argv))):
        sys.exit(1)
