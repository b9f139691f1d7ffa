"""`fastdeit report`: write a page with the curves, scores and pictures of one or more runs."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastdeit.cli import parse, program, run
from fastdeit.launch import announce_start
from fastdeit.pipelines.console import say
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import atomic_write, check_regular
from fastdeit.streams import keep_streams

if TYPE_CHECKING:
    from fastdeit.report.network import Findings
    from fastdeit.report.runs import Run

NAME = "report.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a page with the curves, scores, incidents and costs of one or more runs, and pictures of what each learned.

    The page is one file that works offline. Several runs share its curves. A run may still be training: the command
    changes nothing in its folder but the page. While a run does not change, its page has the same bytes.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of runs (--run.output of fastdeit train)
    # where to write the page; None: RUN/report.html for one run, ./report.html for several
    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    overwrite: bool = False  # replace a file that is not a report
    model: bool = True  # evaluate the run's best checkpoint (its newest if it keeps no best) on its data
    images: int | None = None  # validation images to evaluate; None: up to 1000, on a CPU for about a minute
    batch: int = 64
    device: Literal["auto", "cpu", "cuda"] = "auto"


def report(options: Options) -> Path:
    """Write the page, and return its path. Raises UserError if a folder is not a run, or a file is in the way."""
    for name in ("images", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give at least 1")
    if not options.runs:
        raise UserError("name the folder of at least one run")
    from fastdeit.report.figures import plotly_script
    from fastdeit.report.page import page
    from fastdeit.report.runs import read_runs

    runs = read_runs(options.runs)
    path = options.output or (options.runs[0] / NAME if len(options.runs) == 1 else Path(NAME))
    check_output(path, options.overwrite)
    script = plotly_script()
    findings: Sequence[Findings | None] = _look(runs, options) if options.model else [None] * len(runs)
    content = page(runs, findings, script).encode()
    with atomic_write(path) as file:
        file.write(content)
    say(f"{path}: {len(content) / 1e6:.1f} MB")
    return path


def check_output(path: Path, overwrite: bool) -> None:
    """Raise UserError if the page would replace a file that is not a report, or its folder is missing or read-only."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: make it, or name another place with --output")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: its folder is not writable: name another place with --output")
    if os.path.lexists(path) and not is_report(path) and not overwrite:
        raise UserError(
            f"{path}: exists, and fastdeit report did not write it: "
            f"name another file with --output, or give --overwrite"
        )


def is_report(path: Path) -> bool:
    """Whether a file is a page that this command wrote. Raises OSError if it is not a regular file."""
    from fastdeit.report.page import MARK

    check_regular(path)
    with open(path, "rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def _look(runs: "Sequence[Run]", options: Options) -> "list[Findings]":
    # Imported here: mistakes in the command are found without waiting for PyTorch.
    announce_start()
    from fastdeit.distributed import world
    from fastdeit.pipelines.host.stage import compile_sentence
    from fastdeit.report.network import look
    from fastdeit.report.pictures import Missing

    out = []
    if (sentence := compile_sentence()) is not None:
        say(sentence, "stderr")
    with world(options.device) as joined:
        for each in runs:
            found = look(each, joined, images=options.images, batch=options.batch)
            why = dict.fromkeys(part.why for part in (found.samples, found.judged) if isinstance(part, Missing))
            for reason in why:
                say(f"{each.folder}: the page lacks pictures: {reason}", "stderr")
            out.append(found)
    return out


def main() -> None:
    def go() -> None:
        options = parse(Options, program("report"))
        keep_streams()
        report(options)

    run(go)


if __name__ == "__main__":
    main()
