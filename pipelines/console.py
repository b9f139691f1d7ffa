"""Messages and progress bars: a terminal or pipe that fails never ends the work."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from tqdm import tqdm

from fastdeit.pipelines.errors import printable
from fastdeit.pipelines.machine import machine_error
from fastdeit.pipelines.terminal import Escaping


def say(sentence: str, name: Literal["stdout", "stderr"] = "stdout") -> str | None:
    """Print a sentence on one line, with unprintable characters escaped. Returns why that failed, or None."""
    return _print(printable(sentence), name)


def _print(text: str, name: Literal["stdout", "stderr"]) -> str | None:
    stream = getattr(sys, name)
    if stream is None:
        return "it is closed"
    try:
        print(text, file=Escaping(stream), flush=True)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def answer(text: str) -> None:
    """Print a command's results.

    Raises MachineError if they cannot be written, even if stdout is a `Steady`, which otherwise hides such failures,
    and BrokenPipeError if the reader has gone.
    """
    stream: Any = sys.stdout
    try:
        if isinstance(stream, Steady):
            if stream.failure is not None:
                raise stream.failure
            stream = stream.unwrapped
        print(text, file=Escaping(stream), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise machine_error(error, "standard output cannot be written") from error


def report(text: str, what: str) -> None:
    """Print the lines of `text`; if that fails, say on standard error that `what` is done all the same."""
    if failure := _print(text, "stdout"):
        say(f"note: standard output cannot be written ({failure}): {what}", "stderr")


def progress_bar(notes: list[str], shown: bool = True, **options: Any) -> tqdm:
    """A tqdm on standard error, if that is a terminal; a failure to write to it goes to `notes`."""
    options = {"unit": " images", **options}
    if sys.stderr is None:
        return tqdm(disable=True, **options)
    stream: Any = Steady(sys.stderr, "the progress can no longer be shown ({error})", notes)
    return tqdm(file=stream, disable=None if shown else True, **options)


class Steady(Escaping):
    """A text stream whose failed writes are noted, not raised, and that escapes unprintable characters.

    lost     the sentence to note, once, with {error} for the reason
    faults   where it is noted
    failure  the error of the first write that failed
    """

    def __init__(self, stream: Any, lost: str, faults: list[str]) -> None:
        super().__init__(stream)
        self._lost, self._faults = lost, faults
        self.failure: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: super(Steady, self).write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (OSError, ValueError) as error:  # ValueError: a closed file
            if self.failure is None:
                self.failure = error
                self._faults.append(self._lost.format(error=getattr(error, "strerror", None) or error))
            if isinstance(error, BrokenPipeError):
                discard(self._stream)


def settle() -> None:
    """Flush both standard streams, or discard their buffers: otherwise Python would exit with an error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            discard(stream)


def discard(stream: Any) -> None:
    """Send a stream, with its buffer, to /dev/null from now on."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
