"""The paths that a conversion writes to, and checks of what it may replace."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fastdeit.pipelines.conversion.workers import ConvertError
from fastdeit.pipelines.formats.beton_layout import sidecar_path
from fastdeit.pipelines.formats.files import beside
from fastdeit.pipelines.parsing import parse_json
from fastdeit.pipelines.sources import Source


def rejects_path(dest: Path) -> Path:
    """The list of images that a conversion left out: one JSON object a line with index, name and reason."""
    return beside(dest, ".rejects.jsonl")


def journal_path(dest: Path) -> Path:
    return beside(dest, ".journal")


def temporary_paths(dest: Path) -> list[Path]:
    """The files that an unfinished conversion leaves beside its journal."""
    return [
        beside(dest, ".partial"),
        beside(sidecar_path(dest), ".partial"),
        beside(rejects_path(dest), ".partial"),
    ]


def check_apart(dest: Path, format: str, source: Source) -> None:
    """Raise ConvertError if writing to `dest` would change the source's files or a folder it reads."""
    inputs = source.inputs()
    described = source.describe()
    if format == "webdataset" and described["kind"] in ("webdataset", "parquet"):
        # A new folder among archives would turn them into a folder of classes, and `resume` would fail.
        inputs = [*inputs, Path(described["path"])]
    place = Path(os.path.realpath(dest.parent)) / dest.name
    taken = {_status(path) for path in _all_names(dest)} - {None}
    for path in inputs:
        real = Path(os.path.realpath(path))
        if os.path.isdir(real):
            if place == real or place.is_relative_to(real):
                raise ConvertError(f"{dest}: lies within the source {path}: name a place outside it")
        elif _status(path) in taken or real.is_relative_to(place) or real.is_relative_to(os.path.realpath(dest)):
            raise ConvertError(f"{dest}: is, or contains, the source {path}: name another place")


def _all_names(dest: Path) -> Iterator[Path]:
    yield from (dest, sidecar_path(dest), journal_path(dest), rejects_path(dest), *temporary_paths(dest))
    for folder in (dest, beside(dest, ".partial")):
        with suppress(OSError):  # not a folder, or unreadable: the writer reports it
            yield from (folder / name for name in os.listdir(folder))


def _status(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_rejects(path: Path) -> None:
    """Raise ConvertError unless `path` is free or a list of rejects that a conversion wrote."""
    if not os.path.lexists(path):
        return
    ours = False
    if stat.S_ISREG(os.lstat(path).st_mode):
        with open(path, "rb") as file:
            line = file.readline(1 << 20)
        try:
            ours = parse_json(line).keys() == {"index", "name", "reason"}
        except (ValueError, AttributeError):
            ours = False
    if not ours:
        raise ConvertError(
            f"{path}: is not a list of rejects that fastdeit-convert wrote: move it away, or name another place"
        )


def check_leftovers(dest: Path) -> None:
    """Raise ConvertError for a temporary file that no conversion to `dest` left."""
    for path in temporary_paths(dest):
        if os.path.lexists(path):
            raise ConvertError(
                f"{path}: is in the way, and no {journal_path(dest).name} beside it says that a conversion made it: "
                f"move it away, or name another place"
            )
