"""Result tables as Markdown and as aligned text for a terminal."""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from fastdeit.pipelines.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a title above it and notes below it.

    align  one letter per column: "l" or "r"
    rows   missing cells at the end of a row are empty
    """

    title: str
    columns: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        rule = "|".join("---:" if side == "r" else "---" for side in self.align)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, *self._padded())]
        lines.insert(1, f"|{rule}|")
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([*([self.title, ""] if self.title else []), *lines, *([""] if notes else []), *notes])

    def text(self) -> str:
        rows = self._padded()
        # The reason at the end of an incomplete row must not widen a column of figures.
        measured = [row if len(row) == len(self.columns) else row[:-1] for row in self.rows]
        widths = [max(map(len, cells)) for cells in zip_longest(self.columns, *measured, fillvalue="")]
        lines = []
        for row in (self.columns, *rows):
            cells = (
                cell.rjust(width) if side == "r" else cell.ljust(width)
                for cell, width, side in zip(row, widths, self.align, strict=True)
            )
            lines.append("  ".join(cells).rstrip())
        return "\n".join([self.title, *lines, *self.notes])

    def _padded(self) -> list[list[str]]:
        return [[*row, *[""] * (len(self.columns) - len(row))] for row in self.rows]


def fastest_first(contenders: dict[str, Record]) -> list[tuple[str, Record]]:
    """Names and figures, the most images per second first."""
    return sorted(contenders.items(), key=lambda contender: -contender[1]["images_per_second"])


def target_lines(targets: Iterable[dict[str, Any]]) -> list[str]:
    """The targets of a record for the terminal; a target has `text` and `reached`."""
    return [f"target {'reached' if target['reached'] else 'MISSED'}: {target['text']}" for target in targets]


def require_matplotlib(option: str) -> None:
    """Raise UserError naming the command-line option if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{option} needs matplotlib: pip install 'fastdeit[demo]'")
