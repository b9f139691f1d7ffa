"""What the operating system refuses: a state of the machine, which says nothing about the data."""

from __future__ import annotations

import errno
import os
import resource

from fastdeit.pipelines.errors import UserError

_MOUNT = "the file system is gone or does not answer: mount it again, then run the same command again"
_REMEDIES = {
    errno.EMFILE: "this process has reached its limit of open files: raise the limit with ulimit -n 4096",
    errno.ENFILE: "the machine has reached its limit of open files: close other programs, or raise fs.file-max",
    errno.ENOMEM: "the machine is out of memory: close other programs, or use fewer threads",
    errno.EIO: "the disk or its connection failed: look at dmesg, and copy the data to a healthy disk",
    errno.ENOSPC: "the disk is full: free some space, then run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space, then run the same command again",
    errno.EFBIG: "File too large: name a place whose file system and ulimit -f allow larger files",
    errno.EROFS: "the file system is read-only: mount it writable, or write to another folder",
    errno.EACCES: "this user has no permission: change the file's mode or owner",
    errno.EPERM: "this user has no permission: change the file's mode or owner",
    errno.ENOENT: "the file was there and is gone: bring it back or mount its file system again, then run again",
    errno.ENOTDIR: "the folder was there and is gone: bring it back or mount its file system again, then run again",
} | dict.fromkeys(
    (
        errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
        errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO,
    ),
    _MOUNT,
)  # fmt: skip
_SHARED_MEMORY = "shared memory (/dev/shm) is full or missing: docker run --shm-size=8g, or remove what lies there"


class MachineError(UserError):
    """The machine refuses, whatever the data are: files, memory, disks, mounts.

    Never a reason to replace an image or to call a file damaged.
    """


# What says nothing of the one file that is read: others would fail as well. A file without permission is not among it.
STATES = frozenset(_REMEDIES) - {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}


def machine_error(error: OSError | MemoryError, what: str) -> MachineError:
    """The error for `what` could not be done, such as "FILE, sample 3: cannot be read"; with what to do about it."""
    if isinstance(error, MemoryError):
        return MachineError(f"{what}: {_REMEDIES[errno.ENOMEM]} ({str(error) or 'out of memory'})")
    remedy = _REMEDIES.get(error.errno or 0, "the operating system refused: mend that, then run the same command again")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return MachineError(f"{what}: {remedy} ({reason})")


def shared_memory_error(error: OSError, what: str) -> MachineError:
    """As `machine_error`, for what needs a semaphore or a segment in /dev/shm."""
    if error.errno in (errno.ENOSPC, errno.ENOENT, errno.ENOSYS, errno.EACCES):
        return MachineError(f"{what}: {_SHARED_MEMORY} ({os.strerror(error.errno)})")
    return machine_error(error, what)


def thread_error(error: RuntimeError, what: str) -> MachineError:
    """The error for a thread that the machine did not start."""
    remedy = "the machine starts no more threads: raise ulimit -u or the container's limit of processes, or set fewer"
    return MachineError(f"{what}: {remedy} with --data.threads ({error})")


def open_file_limit() -> int:
    """How many files this process may have open at once."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit
