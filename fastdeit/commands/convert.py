"""`fastdeit-convert`: write labelled images in a format that training reads by index, or verify such a data set."""

import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastdeit.cli import parse, program, run
from fastdeit.pipelines.console import settle
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import open_dataset

if TYPE_CHECKING:
    from fastdeit.pipelines.sources import Source

_SHARDS = ("shard_size", "nodes")
_SOURCE = ("split", "class_names")  # how to read SOURCE
BAD = 3  # exit status: images were left out, or the verification found damage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Convert labelled images to a file that FFCV reads too, or to shards for DALI and webdataset; or verify one.

    JPEG files are stored unchanged if possible; DEST appears only when it is complete. SOURCE is one of

        FOLDER                         class folders (in FOLDER/SPLIT with --split SPLIT), or MNIST-family IDX files
        imagenet:PATH[:SPLIT]          ILSVRC2012's tar files, or their folder
        imagenetv2:FILE                an archive of ImageNet-V2
        webdataset:PATTERN             tar shards: file, folder, glob or train-{000..127}.tar; #label=KEY
        parquet:PATTERN                parquet files: file, folder or glob; #image=COLUMN,label=COLUMN
        cifar:FILE[:SPLIT]             the archives of CIFAR-10 and CIFAR-100
        coco:FILE                      a JSON list in COCO format, such as iNaturalist's train2018.json
        torchvision:NAME:ROOT[:SPLIT]  a torchvision data set on disk

    The word before the colon is optional for files with their usual names, and for folders of such files.

    Exit status: 0 all images were converted or verified; 3 some were left out or damaged; 2 an error.
    """

    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = None
    """The images, see above."""
    dest: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")] = None
    """The output: train.beton, with DEST.json beside it, or for shards a folder. An existing DEST is replaced only
    if fastdeit-convert wrote it."""
    format: Literal["beton", "webdataset"] = "beton"
    split: str | None = None
    """Part of the source: a subfolder; "train" or "test" for IDX files; the split of a torchvision data set;
    "train+val" joins two splits."""
    max_side: int | None = None
    """Reduce longer sides to this many pixels (Lanczos); 500 suffices for training at 224."""
    quality: int = 92
    """Quality of re-encoded JPEGs, 1 to 100."""
    mode: Literal["auto", "jpeg", "raw"] = "auto"
    """auto: JPEG files unchanged; jpeg: re-encode all; raw: pixels."""
    workers: int = 0
    """Processes; 0: one for every core."""
    shuffle_seed: int | None = None
    """Store the samples in a random order."""
    class_names: Path | None = None
    """Classes in the order of their labels: a text file, one per line, or a converted data set."""
    limit: int | None = None
    """Convert only this many images, the first ones."""
    on_error: Literal["fail", "skip"] = "fail"
    """fail: a bad image ends the conversion; skip: it is left out and listed in DEST.rejects.jsonl."""
    resume: bool = False
    """Continue an interrupted conversion to DEST; the result has the same bytes as an uninterrupted one."""
    real_labels: Path | None = None
    """ImageNet-ReaL's real.json, for ILSVRC2012's val images; timm: the copy in timm."""
    shard_size: int = 10_000
    """Maximum number of images per shard."""
    nodes: int = 1
    """Divide the shards evenly among this many nodes, see DEST/nodes."""
    verify: Path | None = None
    """Convert nothing; check this data set: decode all of it and compare every checksum."""
    against: str | None = None
    """With --verify: also read this SOURCE again and compare sample by sample."""


def convert_options(options: Options) -> int:
    """Convert or verify; returns the exit status."""
    if options.verify is not None:
        return verify_options(options, options.verify)
    if options.source is None or options.dest is None or options.against is not None:
        raise UserError("give SOURCE and DEST, or --verify DEST [--against SOURCE]; see --help")
    if options.format == "beton":
        _refuse(options, _SHARDS, "without --format webdataset")
    from fastdeit.pipelines.conversion.convert import convert

    if options.dest.suffix in (".tar", ".parquet") and options.dest.is_file():
        raise UserError(
            f"{options.dest}: is an archive, which is never replaced. Put a pattern such as 'train-*.tar' in quotes, "
            f"or the shell passes its second match as DEST"
        )
    report = convert(
        _opened(options.source, options),
        options.dest,
        format=options.format,
        max_side=options.max_side,
        mode=options.mode,
        quality=options.quality,
        workers=options.workers,
        shuffle_seed=options.shuffle_seed,
        limit=options.limit,
        on_error=options.on_error,
        resume=options.resume,
        real_labels=options.real_labels,
        shard_size=options.shard_size,
        nodes=options.nodes,
    )
    return BAD if report.rejects else 0


def verify_options(options: Options, dest: Path) -> int:
    """Check the data set `dest`; the exit status."""
    from fastdeit.pipelines.conversion.verify import verify

    if options.source is not None:
        raise UserError("--verify takes only DEST; give the source to compare with as --against SOURCE")
    against = options.against
    of_conversions = {field.name for field in dataclasses.fields(options)} - {"verify", "against", "workers", *_SOURCE}
    _refuse(options, of_conversions, "with --verify, which converts nothing")
    if not against:
        _refuse(options, _SOURCE, "without --against")
    source = against and _opened(against, options)
    return 0 if verify(dest, source or None, workers=options.workers).ok else BAD


def _opened(source: str, options: Options) -> "Source":
    from fastdeit.pipelines.sources import UnlistedClassError, open_source

    try:
        return open_source(source, options.split, class_names(options.class_names))
    except UnlistedClassError as error:
        raise UnlistedClassError(f"{error}. The list is --class-names {options.class_names}") from error


def _refuse(options: Options, names: Collection[str], where: str) -> None:
    """Raise UserError if one of the fields `names` was given another value than its default."""
    for field in dataclasses.fields(options):
        if field.name in names and getattr(options, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} has no effect {where}: leave it out")


def class_names(path: Path | None) -> list[str] | None:
    """The class names in a text file, or of a converted data set."""
    from fastdeit.pipelines.sources import read_class_names

    if path is None:
        return None
    if not path.exists():
        raise UserError(f"--class-names {path}: there is no such file or folder: check the path")
    if not path.is_dir() and (path.suffix != ".beton" or not path.is_file()):
        return read_class_names(path)
    with_names = open_dataset(path)
    with_names.close()
    if with_names.class_names is None:
        raise UserError(f"--class-names {path}: has no sidecar with class names")
    return with_names.class_names


def main() -> None:
    try:
        status = run(lambda: convert_options(parse(Options, program("convert"))))
    finally:
        settle()
    sys.exit(status)


if __name__ == "__main__":
    main()
