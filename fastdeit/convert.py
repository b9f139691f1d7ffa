"""`fastdeit-convert`: an image folder, IDX files or a torchvision data set into one .beton file."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdeit.cli import run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Convert labelled images into one file that FFCV, too, can read, with a sidecar of its classes.

    JPEG files are stored as they are where they can be; nothing appears under DEST before it is complete.
    """

    source: Annotated[str, tyro.conf.Positional]
    """Image folder, IDX images file or its folder, or torchvision:NAME:ROOT[:SPLIT]."""
    dest: Annotated[Path, tyro.conf.Positional]
    """File to write, e.g. train.beton; its sidecar is DEST.json."""
    format: Literal["beton"] = "beton"
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
    """File with a class name a line, in the order of the labels."""
    limit: int | None = None
    """Convert only the first so many images."""


def convert_options(options: Options) -> None:
    """Convert as the command line says."""
    from fastdeit.pipelines.convert import convert
    from fastdeit.pipelines.sources import open_source, read_class_names

    names = None if options.class_names is None else read_class_names(options.class_names)
    convert(
        open_source(options.source, options.split, names),
        options.dest,
        max_side=options.max_side,
        mode=options.mode,
        quality=options.quality,
        workers=options.workers,
        shuffle_seed=options.shuffle_seed,
        limit=options.limit,
    )


def main() -> None:
    # A batch system's request to stop removes the unfinished file just as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run(lambda: convert_options(tyro.cli(Options, prog="fastdeit-convert")))


if __name__ == "__main__":
    main()
