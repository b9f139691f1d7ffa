"""`fastdeit-doctor`: what this machine can use for training, and what to do about the rest."""

import argparse
import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence

from fastdeit.cli import program, run
from fastdeit.commands.doctor_checks import CHECKS, Check, sentence
from fastdeit.pipelines.console import answer


def examine() -> list[Check]:
    """The results of all checks, in printing order. A check that breaks becomes a warning."""
    checks: list[Check] = []
    for check in CHECKS:
        try:
            result = check()
        except Exception as error:  # one broken check must not hide the others
            result = Check(check.__name__, "warn", f"the check itself failed: {sentence(error)}")
        checks += result if isinstance(result, list) else [result]
    return checks


def verdict(checks: Sequence[Check]) -> tuple[bool, str]:
    """Whether training is possible, and a sentence that says so."""
    broken = [check.name for check in checks if check.status == "fail"]
    if broken:
        return False, f"Training is not possible here: see {', '.join(broken)}."
    cards = sum(check.name.startswith("gpu ") and check.status != "absent" for check in checks)
    where = f"on {cards} GPU{'s' * (cards > 1)}" if cards else "on the CPU"
    return True, f"Training is possible here, {where}."


def render(checks: Sequence[Check], width: int) -> str:
    """A table for people: mark, name, detail, and the remedy on lines of its own; `width` in characters."""
    indent = 8 + max(len(check.name) for check in checks) + 2
    lines: list[str] = []
    for check in checks:
        head = f"{check.status:8}{check.name:{indent - 8}}"
        texts = [check.detail, *([f"-> {check.remedy}"] if check.remedy else [])]
        wrapped = [line for t in texts for line in textwrap.wrap(t, max(30, width - indent), break_on_hyphens=False)]
        lines += [(head if i == 0 else " " * indent) + line for i, line in enumerate(wrapped)]
    return "\n".join(lines)


def doctor(argv: Sequence[str] | None) -> bool:
    """Print the results; returns whether training is possible."""
    parser = argparse.ArgumentParser(prog=program("doctor"), description="What this machine can use for training.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    checks = examine()
    possible, conclusion = verdict(checks)
    if options.json:
        page = json.dumps({"can_train": possible, "checks": [dataclasses.asdict(c) for c in checks]}, indent=2)
    else:
        page = f"{render(checks, min(shutil.get_terminal_size().columns, 120))}\n\n{conclusion}"
    answer(page)
    return possible


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 0 if training is possible, else 1."""
    sys.exit(0 if run(lambda: doctor(argv)) else 1)


if __name__ == "__main__":
    main()
