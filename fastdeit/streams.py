"""Output that outlives its reader: a closed or full stdout must not end a run of days."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import Any

from fastdeit.pipelines.console import discard


class Steady:
    """A text stream whose failures to write are noted, not raised; all else is the stream's own.

    fault  why text was lost, or None
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name, self.fault = stream, name, None
        self._reported = False

    def write(self, text: str) -> int:
        with self._noted():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noted():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _noted(self):
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a closed file
            if self.fault is None:
                self.fault = f"{self._name} cannot be written ({error}): what the run prints from here on may be lost"
            if isinstance(error, BrokenPipeError):
                self.discard()

    def new_fault(self) -> str | None:
        """The fault, for whoever asks first."""
        fault = None if self._reported else self.fault
        self._reported = self._reported or fault is not None
        return fault

    def discard(self) -> None:
        """Send the stream to /dev/null from now on, with what it still holds."""
        discard(self._stream)


def keep_streams() -> None:
    """Make this process's stdout and stderr steady, and write their lines at once.

    A stream that was closed before the start becomes /dev/null; otherwise the next file that is opened would get its
    number, and with it what libraries print.
    """
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            if descriptor:
                setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Steady):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)
            steady = Steady(stream, name)
            setattr(sys, name, steady)
            atexit.register(lambda steady=steady: steady.fault and steady.discard())


def new_faults() -> list[str]:
    """Faults of stdout and stderr that were not asked for before."""
    steady = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Steady)]
    return [fault for fault in (stream.new_fault() for stream in steady) if fault is not None]
