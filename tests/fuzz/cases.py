"""A case of the fuzz campaign: what is damaged, the commands it goes through, and the verdict."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdeit.commands import convert
from fastdeit.pipelines.conversion.job import rejects_path
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.beton_layout import sidecar_path
from fastdeit.pipelines.formats.dataset import Dataset, open_dataset
from tests.fuzz.containers import OUTPUTS, SOURCES, Container, damage
from tests.fuzz.images import KINDS, mutant
from tests.fuzz.judge import REENCODED_MEAN, Expected, check_loaders, check_stored, pillow, stored_pixels
from tests.fuzz.process import Ended, in_child
from tests.helpers.damage import same_json

_UNDAMAGED = 3  # the first so many images of a kind
_ITEM_SECONDS = 1.0  # beside what every command gets
_COUNT = 9  # images of a data set that is damaged


@dataclass
class Outcome:
    """What became of a case: counts by kind, and what was wrong, a sentence each."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def count(self, kind: str, what: str) -> None:
        self.counts.setdefault(kind, Counter())[what] += 1


def _command(folder: Path, *arguments: object, items: int = 1) -> Ended:
    """`fastdeit-convert` with these arguments, in a process of its own."""

    def work() -> None:
        sys.argv = ["fastdeit-convert", *map(str, arguments)]
        convert.main()

    return in_child(work, folder / "log.txt", seconds=120 + items * _ITEM_SECONDS)


def _judge(folder: Path, work: Callable[[], Iterator[Any]], items: int = 1) -> tuple[list[Any], str | None]:
    """What `work` finds, in a process of its own; and how that ended, if not well."""
    result = folder / "found.json"
    result.unlink(missing_ok=True)

    def write() -> None:
        result.write_text(json.dumps(list(work())))

    ended = in_child(write, folder / "log.txt", seconds=120 + 2 * items * _ITEM_SECONDS)
    if ended.broke or ended.status:
        return [], _how(ended)
    return json.loads(result.read_text()), None


def _how(ended: Ended) -> str:
    return f"{'hung' if ended.hung else f'exit status {ended.status}'}: {ended.output.strip()[-600:]}"


def _rejects(dest: Path) -> dict[int, str]:
    path = rejects_path(dest)
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["index"]: entry["name"] for entry in map(json.loads, lines)}


def image_batch(folder: Path, seed: int, cases: range, loaders: Sequence[str], number: int) -> Outcome:
    """The images `cases` in one folder of classes, into both formats, verified and loaded."""
    case = Outcome()
    kinds = list(KINDS)
    files: list[tuple[Path, str, Expected]] = []
    for i in cases:
        kind, which = kinds[i % len(kinds)], i // len(kinds)
        path = folder / "source" / kind.replace(" ", "-") / f"{which:06d}.{KINDS[kind][0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = mutant(kind, which, seed)
        path.write_bytes(data)
        files.append((path, kind, Expected(str(path), data, which < _UNDAMAGED)))
    # torchvision's ImageFolder: classes by name, files by name.
    files.sort(key=lambda file: (file[0].parent.name, file[0].name))
    for format, mode in (("beton", "auto" if number % 2 else "raw"), ("webdataset", "raw" if number % 2 else "auto")):
        _convert_images(folder, files, format, mode, loaders, case)
    return case


def _convert_images(
    folder: Path, files: list[tuple[Path, str, Expected]], format: str, mode: str, loaders: Sequence[str], case: Outcome
) -> None:
    dest, source = folder / format, folder / "source"
    where = f"{format} of {mode}, images {files[0][2].name} to {files[-1][2].name}"
    options = ("--format", format, "--mode", mode, "--quality", 100, "--on-error", "skip")
    ended = _command(folder, source, dest, *options, items=len(files))
    if ended.broke or ended.status not in (0, convert.BAD):
        case.problems.append(f"{where}: fastdeit-convert: {_how(ended)}")
        return
    rejected = _rejects(dest)
    for index, (_, kind, image) in enumerate(files):
        case.count(kind, f"{'rejected' if index in rejected else 'accepted'} as {mode}")
        if index in rejected and image.whole:
            case.problems.append(f"{where}: {image.name} is not damaged, and was rejected")
    for index, name in rejected.items():
        if name != files[index][2].name:
            case.problems.append(f"{where}: rejected sample {index} as {name}, and it is {files[index][2].name}")
    if (ended.status == convert.BAD) != bool(rejected):
        case.problems.append(f"{where}: exit status {ended.status} with {len(rejected)} rejected")
    ended = _command(folder, "--verify", dest, "--against", source, items=len(files))
    if ended.status:
        case.problems.append(f"{where}: --verify: {_how(ended)}")
    kept = [image for index, (_, _, image) in enumerate(files) if index not in rejected]

    def look() -> Iterator[str]:
        with closing(open_dataset(dest)) as dataset:
            yield from check_stored(dataset, kept)
            stored = [dataset.read(index).tobytes() for index in range(len(dataset))]
            photographs = [image.whole and data == image.file for image, data in zip(kept, stored, strict=False)]
            for finding in check_loaders(dataset, loaders, photographs):
                yield finding.text

    found, failed = _judge(folder, look, len(kept))
    case.problems += [f"{where}: {text}" for text in [*found, *([f"loading: {failed}"] if failed else [])]]


def damaged_source(folder: Path, seed: int, kind: str, number: int, loaders: Sequence[str]) -> Outcome:
    """An archive, the first of its kind undamaged, converted, verified and loaded."""
    case = Outcome()
    container = SOURCES[kind]()
    files = dict(container.files)
    if number:
        target = container.damage[number % len(container.damage)]
        files[target] = damage(files[target], np.random.default_rng([seed, list(SOURCES).index(kind), number]))
    source = folder / "source"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    format = "beton" if number % 2 else "webdataset"
    dest, where = folder / "dest", f"{kind}, number {number}"
    text = container.source.format(source)
    ended = _command(folder, text, dest, "--format", format, "--on-error", "skip", *container.options)
    if ended.broke or ended.status not in (0, convert.BAD, 2):
        case.problems.append(f"{where}: fastdeit-convert: {_how(ended)}")
    elif ended.status == 2:
        case.count(kind, "refused")
        if str(source) not in ended.output:
            case.problems.append(f"{where}: its error does not name it: {_how(ended)}")
        if dest.exists():
            case.problems.append(f"{where}: refused, and {dest} is there")
        if not number:
            case.problems.append(f"{where}: is not damaged, and was refused: {_how(ended)}")
    else:
        _check_source(case, folder, kind, where, container, files, text, dest, loaders)
    return case


def _check_source(
    case: Outcome,
    folder: Path,
    kind: str,
    where: str,
    container: Container,
    files: dict[str, bytes],
    text: str,
    dest: Path,
    loaders: Sequence[str],
) -> None:
    rejected = _rejects(dest)
    case.problems += [
        f"{where}: rejects {name}, which does not name its archive"
        for name in rejected.values()
        if not name.startswith(str(folder / "source"))
    ]
    ended = _command(folder, "--verify", dest, "--against", text, *container.options)
    if ended.status:
        case.problems.append(f"{where}: --verify: {_how(ended)}")

    def look() -> Iterator[Any]:
        held, others = list(container.read(container.files)), list(container.read(files))
        with closing(open_dataset(dest)) as dataset:
            yield len(dataset), len(held), len(others)
            yield from _strangers(dataset, set(held) | set(others))
            for finding in check_loaders(dataset, loaders):
                yield finding.text

    found, failed = _judge(folder, look)
    if failed:
        case.problems.append(f"{where}: loading: {failed}")
        return
    (accepted, held, others), *wrong = found
    case.problems += [f"{where}: {what}" for what in wrong]
    part = "in part, the rest rejected" if rejected else "all that is left of it"
    case.count(kind, "accepted whole" if accepted == held else f"accepted {part}")
    if accepted + len(rejected) < min(held, others):
        case.problems.append(f"{where}: {accepted} accepted and {len(rejected)} rejected, and it holds {others}")


def _strangers(dataset: Dataset, known: set[tuple[bytes, str]]) -> Iterator[str]:
    """Samples that are not among `known`, of (bytes, class)."""
    for index in range(len(dataset)):
        stored, label = dataset.read(index).tobytes(), int(dataset.label[index])
        named = str(label) if dataset.class_names is None else dataset.class_names[label]
        if (stored, named) in known:
            continue
        found = stored_pixels(dataset, index)
        for file, other in known:
            if other == named and _looks_like(found, file):
                break
        else:
            yield f"sample {index} of class {named} is nothing that its source holds"


def _looks_like(pixels: np.ndarray, file: bytes) -> bool:
    """Whether `pixels` are a file that was encoded anew."""
    try:
        right = pillow(file)
    except Exception:
        return False
    return right.shape == pixels.shape and float(np.abs(pixels - right.astype(np.float64)).mean()) < REENCODED_MEAN


def outputs_to_damage(folder: Path) -> dict[tuple[str, str], Path]:
    """A small data set of each format and mode, by them; the folder that it lies in."""
    source = folder / "source"
    for i in range(_COUNT):
        path = source / str(i % 3) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(KINDS["jpeg"][1](i))
    out = {}
    for format, mode, _ in dict.fromkeys(OUTPUTS.values()):
        out[format, mode] = folder / f"{format}-{mode}"
        out[format, mode].mkdir(exist_ok=True)
        dest = out[format, mode] / ("x.beton" if format == "beton" else "x")
        shards = ("--shard-size", 4) if format == "webdataset" else ()
        ended = _command(folder, source, dest, "--format", format, "--mode", mode, *shards)
        if ended.status:
            raise RuntimeError(f"{dest}: {_how(ended)}")
    return out


def damaged_output(
    folder: Path, seed: int, kind: str, number: int, loaders: Sequence[str], pristine: dict[tuple[str, str], Path]
) -> Outcome:
    """A converted data set, the first of its kind undamaged, verified and loaded."""
    case = Outcome()
    format, mode, name = OUTPUTS[kind]
    where, right = f"{kind}, number {number}", pristine[format, mode]
    shutil.copytree(right, folder / "data")
    dest = folder / "data" / Path(name).parts[0].removesuffix(".json")
    sealed = "without" not in kind
    if not sealed:
        sidecar_path(dest).unlink()
    target = folder / "data" / name
    before = target.read_bytes()
    if number:
        rng = np.random.default_rng([seed, 99, list(OUTPUTS).index(kind), number])
        # Of a page's padding, zeros over zeros damage nothing.
        target.write_bytes(next(data for data in iter(lambda: damage(before, rng), None) if data != before))
    same = target.read_bytes() == before or (name.endswith("json") and same_json(before, target.read_bytes()))
    ended = _command(folder, "--verify", dest)
    if ended.broke or ended.status not in (0, convert.BAD, 2):
        case.problems.append(f"{where}: --verify: {_how(ended)}")
        return case
    case.count(kind, "named by --verify" if ended.status else "the same" if same else "not noticed")
    if ended.status and str(dest) not in ended.output:
        case.problems.append(f"{where}: --verify does not name it: {_how(ended)}")
    if same == bool(ended.status) and (sealed or same):
        case.problems.append(f"{where}: {'not damaged' if same else 'damaged'}, and --verify says: {_how(ended)}")

    def look() -> Iterator[Any]:
        try:
            dataset = open_dataset(dest)
        except (UserError, OSError) as error:
            yield "refused", str(error)
            return
        with closing(dataset), closing(open_dataset(right / dest.name)) as written:
            for index in range(len(dataset)):
                if not _is_written(dataset, written, index):
                    yield "other", index
            for finding in check_loaders(dataset, loaders, batch=1):
                yield ("refused" if finding.refused else "wrong"), finding.text

    found, failed = _judge(folder, look)
    if failed:
        case.problems.append(f"{where}: loading: {failed}")
    named = {int(index) for index in re.findall(r"\bsample (\d+)", ended.output)}
    for what, text in found:
        if what == "refused" and (str(dest) not in text or not ended.status):
            case.problems.append(f"{where}: refused in loading ({text}), and --verify says: {_how(ended)}")
        elif what == "wrong":
            case.problems.append(f"{where}: {text}")
        elif what == "other" and sealed and text not in named:
            case.problems.append(f"{where}: sample {text} is another, and --verify says: {_how(ended)}")
    return case


def _is_written(dataset: Dataset, written: Dataset, index: int) -> bool:
    """Whether a sample, if it can be read, is the one that was written."""
    try:
        found = stored_pixels(dataset, index)
    except Exception:
        return True  # refused, if it is loaded
    return (
        index < len(written)
        and int(dataset.label[index]) == int(written.label[index])
        and np.array_equal(found, stored_pixels(written, index))
    )
