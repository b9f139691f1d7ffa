"""Messages and progress bars: a terminal or pipe that fails never ends the work."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from tqdm import tqdm


def say(text: str, name: Literal["stdout", "stderr"] = "stdout") -> str | None:
    """Print `text`. Returns the reason if that fails, else None."""
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
    """Print `text` to standard output; if that fails, say on standard error that `what` is done all the same."""
    if failure := say(text):
        say(f"note: standard output cannot be written ({failure}): {what}", "stderr")


def progress_bar(notes: list[str], shown: bool = True, **options: Any) -> tqdm:
    """A tqdm on standard error, if that is a terminal; a failure to write to it goes to `notes`."""
    options = {"unit": " images", **options}
    if sys.stderr is None:
        return tqdm(disable=True, **options)
    stream: Any = Steady(sys.stderr, "the progress can no longer be shown ({error})", notes)
    return tqdm(file=stream, disable=None if shown else True, **options)


class Steady:
    """A text stream whose failed writes are noted, not raised; it forwards everything else to the stream.

    lost    the sentence to note, once, with {error} for the reason
    faults  where it is noted
    failed  whether any write has failed
    """

    def __init__(self, stream: Any, lost: str, faults: list[str]) -> None:
        self._stream, self._lost, self._faults, self.failed = stream, lost, faults, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (OSError, ValueError) as error:  # ValueError: a closed file
            if not self.failed:
                self.failed = True
                self._faults.append(self._lost.format(error=getattr(error, "strerror", None) or error))
            if isinstance(error, BrokenPipeError):
                discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        # tqdm takes its width from the terminal only for a file that equals a standard stream.
        return self is other or self._stream == other

    def __hash__(self) -> int:
        return hash(self._stream)


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
