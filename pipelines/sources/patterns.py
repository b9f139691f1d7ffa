"""The files of a data set that lies in several: a folder, a glob, or numbers in braces."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from fastdeit.pipelines.regular import check_regular
from fastdeit.pipelines.sources.base import SPLITS, SourceError

MAX_FILES = 10**6
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def matching_files(pattern: str, suffix: str, split: str | None) -> list[Path]:
    """The files that `pattern` names, by name; of a folder those that end in `suffix` and belong to `split`.

    pattern  a file, a folder, a glob such as `train-*.tar`, or numbers such as `train-{0000..0127}.tar`. Of a
             folder, files in its folder `split` or `data` are found too
    split    a word of the names, as in train-00000-of-00014.parquet

    Raises SourceError where there are none, one is missing, or a folder holds several splits.
    """
    if Path(pattern).is_dir():
        return _of_split(Path(pattern), suffix, split)
    if split is not None:
        raise SourceError(f"{pattern}: names its files itself: leave out --split, or give the folder")
    if Path(pattern).is_file():
        return [Path(pattern)]
    if _RANGE.search(pattern):
        files = [Path(name) for name in _expand(pattern)]
        for file in files:
            if not file.is_file():
                raise SourceError(f"{file}: there is no such file, of the {len(files)} that {pattern} names")
        return files
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    if not files:
        raise SourceError(f"{pattern}: there is no such file or folder: check the path")
    for file in files:
        check_regular(file)
    return files


def _expand(pattern: str) -> list[str]:
    names = [pattern]
    while match := _RANGE.search(names[0]):
        first, last = int(match[1]), int(match[2])
        if last < first or (last - first + 1) * len(names) > MAX_FILES:
            raise SourceError(f"{pattern}: {match[0]} counts down, or over more than {MAX_FILES} files")
        numbers = [f"{number:0{len(match[1])}}" for number in range(first, last + 1)]
        names = [_RANGE.sub(number, name, count=1) for name in names for number in numbers]
    return names


def _of_split(folder: Path, suffix: str, split: str | None) -> list[Path]:
    if split is not None and (files := _with_suffix(folder / split, suffix)):
        return files
    files = _with_suffix(folder, suffix) or _with_suffix(folder / "data", suffix)
    words = {file: set(re.split(r"[^0-9A-Za-z]+", file.name.removesuffix(suffix))) for file in files}
    found = sorted(set().union(*words.values()) & SPLITS)
    if split is not None:
        files = [file for file in files if split in words[file]]
    elif len(found) > 1:
        raise SourceError(f"{folder}: holds the splits {', '.join(found)}: choose one with --split")
    if not files:
        of = "" if split is None else f" of the split '{split}'; found: {', '.join(found) or 'none'}"
        raise SourceError(f"{folder}: no *{suffix} files{of}: check the path")
    return files


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if file.name.endswith(suffix) and not file.name.startswith("."))
    return sorted(file for file in files if file.is_file())
