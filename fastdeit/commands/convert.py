"""`fastdeit-convert`: labelled images into one of two formats that training reads by index, and a check of them."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdeit.cli import parse, run
from fastdeit.pipelines.console import settle
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import open_dataset

BAD = 3  # exit status: images were left out, or a check found something


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Convert labelled images into a file that FFCV can read, too, or shards for DALI and webdataset; or check one.

    JPEG files are stored as they are where they can be; nothing appears under DEST before it is complete. SOURCE is one
    of

        FOLDER                         class folders, or with --split FOLDER/split; IDX files of the MNIST family
        imagenet:PATH[:SPLIT]          ILSVRC2012's tar files, or their folder
        imagenetv2:FILE                an archive of ImageNet-V2
        webdataset:PATTERN             tar shards: file, folder, glob or train-{000..127}.tar; #label=KEY
        parquet:PATTERN                parquet files, likewise; #image=COLUMN,label=COLUMN
        cifar:FILE[:SPLIT]             CIFAR-10's and CIFAR-100's own archives
        torchvision:NAME:ROOT[:SPLIT]  a data set of torchvision's that lies on disk

    where the word before the colon may be left out for files of their usual names, and folders of such files.

    Exit status: 0 all images were converted, or all is well; 3 some were left out, or something was found; 2 an error.
    """

    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = None
    """Where the images are, see above."""
    dest: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")] = None
    """What to write: train.beton, with DEST.json beside it, or for shards a folder. Of what exists, only a data
    set that fastdeit-convert wrote is replaced."""
    format: Literal["beton", "webdataset"] = "beton"
    split: str | None = None
    """Part of the source: a subfolder such as train, train or test of IDX files, torchvision's split."""
    max_side: int | None = None
    """Reduce longer sides to this many pixels (Lanczos); 500 keeps what training at 224 can use."""
    quality: int = 92
    """Of JPEGs that are encoded anew, 1 to 100."""
    mode: Literal["auto", "jpeg", "raw"] = "auto"
    """auto: JPEG files as they are; jpeg: all encoded anew; raw: pixels."""
    workers: int = 0
    """Processes; 0: one for every core."""
    shuffle_seed: int | None = None
    """Store the samples in a random order."""
    class_names: Path | None = None
    """Classes in the order of their labels: a text file, one a line, or a data set that was converted."""
    limit: int | None = None
    """Convert only the first so many images."""
    on_error: Literal["fail", "skip"] = "fail"
    """A bad image ends the conversion, or is left out and listed in DEST.rejects.jsonl."""
    resume: bool = False
    """Go on where an interrupted conversion to DEST stopped; the bytes are those of an unbroken one."""
    real_labels: Path | None = None
    """ImageNet-ReaL's real.json, for ILSVRC2012's val images; timm: the copy that timm has."""
    shard_size: int = 10_000
    """Images of a shard at most."""
    nodes: int = 1
    """Shards are dealt out to so many nodes evenly, see DEST/nodes."""
    verify: Path | None = None
    """Check this data set instead: decode all of it and compare every checksum."""
    against: str | None = None
    """With --verify: read this SOURCE again, too, and compare sample by sample."""


def convert_options(options: Options) -> int:
    """Convert, or check, as the command line says; the exit status."""
    if options.verify is not None:
        return verify_options(options, options.verify)
    if options.source is None or options.dest is None or options.against is not None:
        raise UserError("give SOURCE and DEST, or --verify DEST [--against SOURCE]; --help says more")
    from fastdeit.pipelines.conversion.convert import convert
    from fastdeit.pipelines.sources import open_source

    if options.dest.suffix in (".tar", ".parquet") and options.dest.is_file():
        raise UserError(
            f"{options.dest}: is an archive, which is never replaced. Put a pattern such as 'train-*.tar' in quotes, "
            f"or the shell hands on its second match as DEST"
        )
    report = convert(
        open_source(options.source, options.split, class_names(options.class_names)),
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
    from fastdeit.pipelines.sources import open_source

    if options.source is not None:
        raise UserError("--verify DEST is all there is to check; the source to compare with goes to --against")
    against = options.against
    source = against and open_source(against, options.split, class_names(options.class_names))
    return 0 if verify(dest, source or None, workers=options.workers).ok else BAD


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
        raise UserError(f"--class-names {path}: has no sidecar that would name its classes")
    return with_names.class_names


def main() -> None:
    # A batch system's request to stop is as good as Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        status = run(lambda: convert_options(parse(Options, "fastdeit-convert")))
    finally:
        settle()
    sys.exit(status)


if __name__ == "__main__":
    main()
