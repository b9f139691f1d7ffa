"""Standard streams that survive a closed or full stdout, which must not end a run of days."""

import atexit
import os
import sys

from fastdeit.pipelines.console import Steady, discard

_LOST = "cannot be written ({error}): the run goes on, but its later output may be lost"
_OUTPUTS = ((1, "stdout"), (2, "stderr"))
_faults: list[str] = []


def hold_descriptors() -> None:
    """Open /dev/null in the place of each standard stream that is closed, also for the processes that this one starts.

    Otherwise the next file to be opened would get its descriptor, and libraries would print into that file, or fail
    because Python has no stream.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    for descriptor, name in _OUTPUTS:
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115


def keep_streams() -> None:
    """Make this process's stdout and stderr fault-tolerant (`Steady`) and line-buffered.

    A stream that is already closed becomes /dev/null.
    """
    hold_descriptors()
    for _, name in _OUTPUTS:
        stream = getattr(sys, name)
        if not isinstance(stream, Steady):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)
            steady = Steady(stream, f"{name} {_LOST}", _faults)
            setattr(sys, name, steady)
            atexit.register(lambda steady=steady: steady.failure is not None and discard(steady))


def new_faults() -> list[str]:
    """Messages about failed writes to stdout or stderr since the last call."""
    faults = _faults.copy()
    _faults.clear()
    return faults
