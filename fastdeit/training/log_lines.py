"""Reads `log.jsonl`, whose events `logs.py` lists. Imports no PyTorch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import open_regular
from fastdeit.pipelines.parsing import MAX_JSON, parse_json


def numbered_events(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The events of a log, each with the number of its line.

    Skips an unfinished last line: a kill cut it short, or the run is still writing it. Raises UserError for
    any other line that is not an event, and what `open_regular` raises.
    """
    with open(open_regular(path), "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON + 1), b""), 1):
            try:
                event = parse_json(line)
            except ValueError as error:
                if not line.endswith(b"\n") and len(line) <= MAX_JSON:
                    return
                raise UserError(f"{path}, line {number}: not JSON ({error}); restore or delete the line") from error
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise UserError(f"{path}, line {number}: not an event of a run; restore or delete the line")
            yield number, event


def read_log(path: Path) -> list[dict[str, Any]]:
    """All events of a log. Raises what `numbered_events` raises."""
    return [event for _, event in numbered_events(path)]


def without_repeats(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Events of one kind by step. If a resumed run repeated a step, only the later line counts."""
    by_key = {(e["global_step"], e.get("weights")): e for e in events if e["event"] == kind}
    return sorted(by_key.values(), key=lambda e: e["global_step"])
