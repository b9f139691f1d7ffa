"""The scores of each class as a CSV file, for `fastdeit eval --per-class`."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdeit.pipelines.errors import UserError, printable
from fastdeit.pipelines.formats.files import TEMPORARY, atomic_write, beside


def check_new_file(path: Path) -> None:
    """Raise UserError unless a file can be made at `path`."""
    if not path.parent.is_dir():
        raise UserError(f"--per-class {path}: there is no folder {path.parent}: make it, or name another place")
    for taken in (path, beside(path, TEMPORARY)):
        if len(os.fsencode(taken.name)) > os.pathconf(path.parent, "PC_NAME_MAX"):
            raise UserError(f"--per-class {path}: its name is too long: name another file")
        if os.path.lexists(taken):
            raise UserError(f"--per-class {path}: {taken.name} exists already: name another file, or remove it")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--per-class {path}: its folder is not writable: name another place")


def write_classes(path: Path, classes: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write a line for each data set, kind of weights and class: its images, then top-1 and top-5 of each head.

    classes  by data set and kind of weights, what `evaluate` calls "classes", and the "names" of the classes or None

    Raises UserError if there is a file by now, and OSError naming the path.
    """
    from fastdeit.kernels.reference import HEADS  # here, since it needs PyTorch

    check_new_file(path)
    found = [each for kinds in classes.values() for each in kinds.values()]
    heads = [head for head in HEADS if any(head in each for each in found)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["data", "weights", "class", "images", *(f"{head} {kind}" for head in heads for kind in ("top-1", "top-5"))]
    )
    for data, kinds in classes.items():
        for weights, each in kinds.items():
            writer.writerows(_rows(printable(data), weights, each, heads))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _rows(data: str, weights: str, classes: dict[str, Any], heads: Sequence[str]) -> Iterator[list[Any]]:
    names = classes["names"]
    for label, images in enumerate(classes["images"]):
        scores = (classes[head][kind][label] for head in heads for kind in ("top1", "top5"))
        name = printable(names[label]) if names is not None else label
        yield [data, weights, name, images, *("" if score is None else f"{score:.2f}" for score in scores)]
