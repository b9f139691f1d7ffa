"""Messages and progress bars that nobody may be reading: a terminal or pipe that fails ends no work."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, Literal

from tqdm import tqdm
from tqdm.utils import ObjectWrapper


def say(text: str, name: Literal["stdout", "stderr"] = "stdout") -> str | None:
    """Print `text`; why it could not be written, or None."""
    stream = getattr(sys, name)
    if stream is None:
        return "it is closed"
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def report(text: str, what: str) -> None:
    """Print `text` to standard output; where that fails say on standard error that `what` is done all the same."""
    if failure := say(text):
        say(f"note: standard output cannot be written ({failure}): {what}", "stderr")


def progress_bar(notes: list[str], shown: bool = True, **options: Any) -> tqdm:
    """A tqdm on standard error, if that is a terminal; where writing to it fails, `notes` say so."""
    options = {"unit": " images", **options}
    if sys.stderr is None:
        return tqdm(disable=True, **options)
    return tqdm(file=_Unfailing(sys.stderr, notes), disable=None if shown else True, **options)


class _Unfailing(ObjectWrapper):
    """A stream that drops what it cannot write, and notes it once."""

    def __init__(self, stream: Any, notes: list[str]) -> None:
        super().__init__(stream)
        self.wrapper_setattr("_notes", notes)
        self.wrapper_setattr("_failed", False)

    def __eq__(self, other: object) -> bool:
        # tqdm asks the terminal for its width where the file is a standard stream.
        return self.wrapper_getattr("_wrapped") == getattr(other, "_wrapped", other)

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> None:
        self._try(lambda: self.wrapper_getattr("_wrapped").write(text))

    def flush(self) -> None:
        self._try(self.wrapper_getattr("_wrapped").flush)

    def _try(self, call: Any) -> None:
        if self.wrapper_getattr("_failed"):
            return
        try:
            call()
        except (OSError, ValueError) as error:
            self.wrapper_setattr("_failed", True)
            reason = getattr(error, "strerror", None) or str(error)
            self.wrapper_getattr("_notes").append(f"the progress could not be shown any more ({reason})")


def settle() -> None:
    """Have both standard streams flushed, or give them up: Python would end with an error at what they still hold."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            discard(stream)


def discard(stream: Any) -> None:
    """Send a stream to /dev/null from now on, with what it still holds."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
