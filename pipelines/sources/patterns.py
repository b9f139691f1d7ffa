"""The files of a data set that lies in several: a folder, a glob, or numbers in braces."""

import fnmatch
import glob
import os
import re
from pathlib import Path

from fastdeit.pipelines.sources.base import SPLITS, SourceError, SplitNeededError
from fastdeit.pipelines.sources.files import is_folder, listing

MAX_FILES = 10**6
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def matching_files(pattern: str, suffix: str, split: str | None) -> tuple[list[Path], int]:
    """The files that `pattern` names, by name; of a folder those that end in `suffix` and belong to `split`.

    pattern  a file, a folder, a glob such as `train-*.tar`, or numbers such as `train-{0000..0127}.tar`. Of a
             folder, files in its folder `split` or `data` are found too
    split    a word of the names, as in train-00000-of-00014.parquet

    Also returns how many files `files.is_left_out` kept from them. Raises SourceError where there are none, one is
    missing, a folder cannot be listed or holds several splits.
    """
    if is_folder(pattern):
        return _of_split(Path(pattern), suffix, split)
    if split is not None:
        raise SourceError(f"{pattern}: names its files itself: leave out --split, or give the folder")
    if os.path.lexists(pattern):
        return [Path(pattern)], 0
    if _RANGE.search(pattern):
        files = [Path(name) for name in _expand(pattern)]
        for file in files:
            if not file.is_file():
                raise SourceError(f"{file}: there is no such file, of the {len(files)} that {pattern} names")
        return files, 0
    files, left_out = _glob(pattern)
    if not files:
        raise SourceError(f"{pattern}: there is no such file or folder: check the path")
    return files, left_out


def _glob(pattern: str) -> tuple[list[Path], int]:
    """The files that match `pattern`, as `glob.glob` finds them, but for folders that cannot be listed.

    It passes over those, and their shards would be missing without a word.
    """
    path = Path(pattern)
    found, left_out = [Path(path.anchor)], 0
    parts = path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts, 1):
        if part == "**":
            found = _folders_below(found)
        elif not glob.has_magic(part):
            found = [folder / part for folder in found if os.path.lexists(folder / part)]
        else:
            matching: list[Path] = []
            last = number == len(parts)
            for folder in filter(is_folder, found):
                inside = listing(folder, lambda name, part=part: fnmatch.fnmatchcase(name, part))
                names = inside.files if last else inside.folders
                if part.startswith("."):  # hidden names that are asked for
                    names = [n for n in glob.glob(part, root_dir=folder) if is_folder(folder / n) != last]
                else:
                    left_out += inside.left_out * last
                matching += [folder / name for name in names]
            found = matching
    return sorted(set(found)), left_out


def _folders_below(folders: list[Path]) -> list[Path]:
    """These folders and all below them, each once, however many links lead to it."""
    found: list[Path] = []
    seen: set[str] = set()
    waiting = list(folders)
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real not in seen:
            seen.add(real)
            found.append(folder)
            # Other files may be links to anywhere.
            waiting += [folder / name for name in listing(folder, lambda name, at=folder: is_folder(at / name)).folders]
    return found


def _expand(pattern: str) -> list[str]:
    names = [pattern]
    while match := _RANGE.search(names[0]):
        first, last = int(match[1]), int(match[2])
        if last < first or (last - first + 1) * len(names) > MAX_FILES:
            raise SourceError(f"{pattern}: {match[0]} counts down, or over more than {MAX_FILES} files")
        numbers = [f"{number:0{len(match[1])}}" for number in range(first, last + 1)]
        names = [_RANGE.sub(number, name, count=1) for name in names for number in numbers]
    return names


def _of_split(folder: Path, suffix: str, split: str | None) -> tuple[list[Path], int]:
    if split is not None:
        files, left_out = _with_suffix(folder / split, suffix)
        if files:
            return files, left_out
    files, left_out = _with_suffix(folder, suffix)
    if not files:
        files, left_out = _with_suffix(folder / "data", suffix)
    words = {file: set(re.split(r"[^0-9A-Za-z]+", file.name.removesuffix(suffix))) for file in files}
    found = sorted(set().union(*words.values()) & SPLITS)
    if split is not None:
        files = [file for file in files if split in words[file]]
    elif len(found) > 1:
        raise SplitNeededError(f"{folder}: holds the splits {', '.join(found)}: choose one with --split")
    if not files:
        of = "" if split is None else f" of the split '{split}'; found: {', '.join(found) or 'none'}"
        raise SourceError(f"{folder}: no *{suffix} files{of}: check the path")
    return files, left_out


def _with_suffix(folder: Path, suffix: str) -> tuple[list[Path], int]:
    if not is_folder(folder):
        return [], 0
    found = listing(folder, lambda name: name.endswith(suffix))
    return [folder / name for name in found.files], found.left_out
