"""A function in a process of its own, which may take so much time and memory and then ends."""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEMORY = 3 << 30  # bytes that a child may take beside what it begins with
SECONDS = 120.0
_CRASHED = 70  # exit status of an exception that nothing caught


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, negative for a signal; what it printed; whether its time was over."""

    status: int
    output: str
    hung: bool
    seconds: float

    @property
    def broke(self) -> bool:
        """Whether it ended in a way that no command may: by a signal, an uncaught exception, or never."""
        return self.hung or self.status < 0 or self.status == _CRASHED or "Traceback (most recent" in self.output


def in_child(
    work: Callable[[], int | None], log: Path, *, seconds: float = SECONDS, memory: int | None = MEMORY
) -> Ended:
    """Run `work` in a fork of this process, with all that it prints in `log`.

    It is forked rather than started, so that a thousand of them do not import everything a thousand times; this
    process must not have threads that hold locks. SystemExit is taken as an entry point's. `memory` is a limit on
    address space beyond this process's own; None: none.
    """
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(work, log, memory)
    status, hung = _wait(child, start + seconds)
    return Ended(status, log.read_text(errors="replace"), hung, time.monotonic() - start)


def _become(work: Callable[[], int | None], log: Path, memory: int | None) -> None:
    status = _CRASHED
    try:
        os.setsid()  # so that its own children end with it
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = sys.stderr = os.fdopen(target, "w", 1, "utf-8", "backslashreplace")
        if memory is not None:
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (own + memory, own + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = work() or 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without what the parent registered to be done at its end


def _wait(child: int, deadline: float) -> tuple[int, bool]:
    pause = 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), False
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, True
        time.sleep(pause)
        pause = min(0.05, pause * 1.2)
