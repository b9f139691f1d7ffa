"""Errors that are the machine's fault and say nothing about the data."""

import errno
import os
import re
import resource
import shutil
from pathlib import Path

from fastdeit.pipelines.errors import MACHINE, UserError

_BACK = "it was there and is gone: bring it back or mount its file system again, then run the same command again"
_REMEDIES = MACHINE | {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ENXIO), _BACK),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or name another place"),
}
_REFUSED = "the operating system refuses: find out why, then run the same command again"
_SHARED_MEMORY = (
    "shared memory (/dev/shm) is full, missing or read-only: docker run --shm-size=8g, or remove files there"
)


class MachineError(UserError):
    """The machine refuses, whatever the data are: files, memory, disks, mounts.

    Never a reason to replace an image or to call a file damaged.
    """


def check_space(folder: Path, size: int, what: str, option: str) -> None:
    """Raise MachineError unless `folder` has room for `size` bytes of `what`; `option` names another folder."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise MachineError(
            f"{what} takes {size / 1e9:.1f} GB, but {folder} has only {free / 1e9:.1f} GB free: free space there, or "
            f"name another {option}"
        )


def file_system(path: Path) -> str | None:
    """Type and source of the file system that holds `path`, such as "nfs4 (server:/data)"; None if unknown."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    best, found, wanted = -1, None, path.resolve()
    for line in mounts:
        before, _, after = line.partition(" - ")
        point, kind = _unescaped(before.split()[4]), after.split()[:2]
        if len(point) >= best and wanted.is_relative_to(point):  # of mounts on one point, the last one counts
            best, found = len(point), f"{kind[0]} ({_unescaped(kind[1])})"
    return found


def _unescaped(text: str) -> str:
    """A field of mountinfo: space, tab, newline and backslash are octal there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


STATES = frozenset(MACHINE) | {errno.ENXIO}  # every other file would fail as well


def machine_error(error: OSError | MemoryError, what: str) -> MachineError:
    """The error for an action that failed, such as "FILE, sample 3: cannot be read", with reason and remedy."""
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return MachineError(f"{what}: out of memory{detail}: {MACHINE[errno.ENOMEM]}")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return MachineError(f"{what}: {reason}: {_REMEDIES.get(error.errno or 0, _REFUSED)}")


def shared_memory_error(error: OSError, what: str) -> MachineError:
    """Like `machine_error`, for an action that needs a semaphore or a segment in /dev/shm."""
    if error.errno in (errno.ENOSPC, errno.ENOENT, errno.ENOSYS, errno.EACCES, errno.EROFS):
        return MachineError(f"{what}: {_SHARED_MEMORY} ({os.strerror(error.errno)})")
    return machine_error(error, what)


def thread_error(error: RuntimeError, what: str) -> MachineError:
    """The error for a thread that did not start."""
    raised = "raise ulimit -u or the container's limit of processes, or set fewer with --data.threads"
    return MachineError(f"{what}: the machine cannot start more threads: {raised} ({error})")


def open_file_limit() -> int:
    """The number of files that this process may have open at once."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit
