"""`python -m tests.fuzz`: damaged images and containers through convert, verify and load.

Every image of every kind is damaged in a way that its number decides, and goes through `fastdeit-convert --on-error
skip` into both formats, `--verify --against` its source, and an epoch of every loader there is. All is well if

- an image is listed in DEST.rejects.jsonl by its name, or what is stored and loaded are the pixels that Pillow makes of
  the damaged file;
- the conversion of a damaged archive ends with an error that names it, or every sample that comes out is one that the
  archive held, or that another reader finds in the damaged archive;
- what loads of a damaged data set is what was written, or `--verify` names it;
- no command crashes, hangs, prints a traceback or takes too much memory. Each runs in a process of its own.
"""

import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import PACKAGES, PEERS, RESULTS, append, environment
from fastdeit.cli import parse, run
from fastdeit.pipelines.errors import UserError
from tests.fuzz.cases import Outcome, damaged_output, damaged_source, image_batch, outputs_to_damage
from tests.fuzz.containers import OUTPUTS, SOURCES
from tests.fuzz.images import KINDS
from tests.fuzz.judge import loaders

_BATCH = 500  # images that one conversion takes


@dataclass(frozen=True, kw_only=True)
class Options:
    """Damaged images and containers through convert, verify and load; exit status 1 where one came out wrong."""

    images: int = 10_000
    containers: int = 1_000
    seed: int = 0
    loader: tuple[str, ...] = ()  # all that are installed, or these
    keep: Path | None = None  # a folder for what came out wrong; nothing is kept otherwise
    results: Path = RESULTS / "fuzz.jsonl"


@dataclass
class Campaign:
    """What became of the cases so far: counts by kind, and what was wrong, a sentence each."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, case: Outcome) -> None:
        for kind, counts in case.counts.items():
            self.counts.setdefault(kind, Counter()).update(counts)
        self.problems += case.problems


def campaign(options: Options) -> Campaign:
    """Run it. Raises UserError for a loader that is not there."""
    names = loaders()
    if missing := set(options.loader) - set(names):
        raise UserError(f"loaders {', '.join(sorted(missing))} cannot be used here, only {', '.join(names)}")
    names = [name for name in names if name in (options.loader or names)]
    found = Campaign()
    with tempfile.TemporaryDirectory(prefix="fastdeit-fuzz-") as folder:
        root = Path(folder)
        with tqdm(total=options.images, desc="images", unit="", disable=None) as bar:
            for number, first in enumerate(range(0, options.images, _BATCH)):
                cases = range(first, min(first + _BATCH, options.images))
                _one(found, image_batch, root / "batch", options, cases, names, number)
                bar.update(len(cases))
        kinds = [*SOURCES, *OUTPUTS]
        pristine = outputs_to_damage(root / "pristine") if options.containers else {}
        with tqdm(total=options.containers, desc="containers", unit="", disable=None) as bar:
            for case in range(options.containers):
                kind, number = kinds[case % len(kinds)], case // len(kinds)
                if kind in SOURCES:
                    _one(found, damaged_source, root / "case", options, kind, number, names)
                else:
                    _one(found, damaged_output, root / "case", options, kind, number, names, pristine)
                bar.update()
    return found


def _one(found: Campaign, run_case: Any, folder: Path, options: Options, *arguments: Any) -> None:
    folder.mkdir()
    case: Outcome = run_case(folder, options.seed, *arguments)
    found.add(case)
    if case.problems and options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, options.keep / f"{len(found.problems):04d}")
    shutil.rmtree(folder)


def measure(options: Options) -> bool:
    """Run, append to the results and print; whether nothing came out wrong."""
    started, start = environment((*PACKAGES, *PEERS)), time.monotonic()
    found = campaign(options)
    record = {
        "benchmark": "fuzz",
        "environment": started,
        "images": options.images,
        "containers": options.containers,
        "seed": options.seed,
        "loaders": list(options.loader) or loaders(),
        "seconds": round(time.monotonic() - start, 1),
        "counts": {kind: dict(counts) for kind, counts in found.counts.items()},
        "problems": found.problems[:100],
        "passed": not found.problems,
    }
    append(options.results, record)
    print(report(record), flush=True)
    return not found.problems


def report(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    lines = [f"{record['images']} images and {record['containers']} containers in {record['seconds']:.0f} s"]
    for kinds in (KINDS, SOURCES, OUTPUTS):
        total: Counter[str] = Counter()
        for kind in kinds:
            counts = record["counts"].get(kind, {})
            total.update(counts)
            lines.append(f"  {kind:22}" + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
        lines.append(f"  {'in all':22}" + ", ".join(f"{n} {what}" for what, n in sorted(total.items())))
    lines += [f"wrong: {problem}" for problem in record["problems"]]
    return "\n".join([*lines, "passed" if record["passed"] else "FAILED"])


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where something came out wrong."""
    if not run(lambda: measure(parse(Options, "python -m tests.fuzz", argv))):
        sys.exit(1)
