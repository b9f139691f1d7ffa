"""Converts images on first use, so that commands and loaders also take a folder of images or an archive."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastdeit.config import Recipe
from fastdeit.pipelines.console import say
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import open_dataset
from fastdeit.pipelines.formats.local_copy import one_at_a_time
from fastdeit.pipelines.formats.shard_layout import SIDECAR

if TYPE_CHECKING:
    from fastdeit.pipelines.sources import Source

_BY_NAME = ("folder", "coco", "imagenet train", "imagenet val")  # kinds of sources that match classes by name
_ARCHIVES = (".tar", ".gz", ".tgz", ".parquet", ".zip", ".json")


def converted(path: Path, cache: Path | None = None, like: Path | None = None) -> Path:
    """`path` if fastdeit-convert wrote it, else the data set that its images become, made now if it is not there yet.

    path   a data set; or a folder, archive or COCO-format list that `open_source` can read
    cache  where the data set is kept; None: the user's cache folder
    like   data set whose class names set the label order; None, or a source that names its labels itself: its own names

    The data set is named after the files, their sizes and times, so changed images are converted anew. Processes that
    want the same one wait for the first; an interrupted conversion goes on. What it does is said on stderr. Raises
    UserError if the images cannot be converted or the user has no home folder, and OSError if `cache` cannot be made.
    """
    if not path.exists() or path.suffix == ".beton" or (path / SIDECAR).exists():
        return path
    if path.is_file() and (path.suffix not in _ARCHIVES or path.name.endswith(".beton.json")):
        return path  # its reader says what is wrong with it
    from fastdeit.pipelines.sources import open_source  # here: most runs need none of its libraries

    place, names = _place(path), _class_names(like)
    source = _opened(place, names, like)
    if names is not None and source.describe()["kind"] not in _BY_NAME:
        # For these sources `class_names` would rename the labels, not reorder them. If the source has class names, keep
        # them; a later check compares them with those of `like`.
        own = open_source(str(place))
        if own.class_names is not None:
            source, names = own, None
    cache = cache or _users_cache()
    cache.mkdir(parents=True, exist_ok=True)
    dest = cache / f"{path.resolve().stem}-{_fingerprint(source)[:16]}.beton"
    if dest.exists():  # needs no lock, which a read-only or another user's folder refuses
        return dest
    with one_at_a_time(dest, partial(say, name="stderr"), "convert") as held:
        if not dest.exists():
            say(f"{path} is converted to {dest}, this once ({len(source)} images)", "stderr")
            _convert(place, dest, None if names is None else like, held)
    return dest


def _opened(place: Path, names: list[str] | None, like: Path | None) -> Source:
    from fastdeit.pipelines.sources import SourceError, SplitNeededError, UnlistedClassError, open_source

    try:
        return open_source(str(place), class_names=names)
    except SplitNeededError as error:
        raise SourceError(f"{error}. Only fastdeit-convert has it: give the file that it writes instead") from error
    except UnlistedClassError as error:
        raise SourceError(
            f"{error}. The list holds the classes of {like}: to add one, convert both with a common --class-names"
        ) from error


def _place(path: Path) -> Path:
    """The resolved path; a JSON list keeps its own name, because its images lie next to the name the user gave."""
    return Path(os.path.abspath(path)) if path.suffix == ".json" else path.resolve()


def with_converted_data(recipe: Recipe) -> Recipe:
    """The recipe with data sets in the place of folders and archives of images; see `converted`."""
    data = recipe.data
    train = data.train and converted(data.train, data.cache_dir)
    val = data.val and converted(data.val, data.cache_dir, train)
    return replace(recipe, data=replace(data, train=train, val=val))


def _users_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdeit"
    except RuntimeError as error:  # a user without an entry, as in some containers
        raise UserError(
            "there is no home folder to keep converted images in: set XDG_CACHE_HOME, or run fastdeit-convert"
        ) from error


def _class_names(path: Path | None) -> list[str] | None:
    if path is None or not path.exists():
        return None
    dataset = open_dataset(path)
    dataset.close()
    return dataset.class_names


def _fingerprint(source: Source) -> str:
    """What the images are as far as their files tell: names of files and classes, sizes and times."""
    digest = hashlib.sha256(json.dumps([source.describe(), source.class_names], sort_keys=True).encode())
    for path in sorted(source.inputs()):
        files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        for file in files:
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _convert(path: Path, dest: Path, like: Path | None, held: IO[Any] | None) -> None:
    """Convert in a program of its own: its workers would import the caller's script anew.

    It inherits the lock, so if this process is killed and started again, it waits for that program's end.
    """
    from fastdeit.pipelines.conversion.destination import beside, journal_path

    package = str(Path(__file__).parents[1])  # in a checkout that is not installed
    places = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "fastdeit.commands.convert", str(path), str(dest)]
    journal = journal_path(dest)
    resumes = journal.exists()
    command += ["--resume"] if resumes else []
    command += ["--class-names", str(like)] if like is not None else []
    inherited = () if held is None else (held.fileno(),)
    environ = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run(command, env=environ, stdout=sys.stderr, check=False, pass_fds=inherited)
    if done.returncode != 0:
        afresh = f"delete {journal} and {beside(dest, '.partial')} to start again, " if resumes else ""
        raise UserError(
            f"{path} could not be converted, for the reason above: mend it, {afresh}or run fastdeit-convert with other "
            f"options"
        )
