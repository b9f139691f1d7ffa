"""File locks between processes that write to the same path."""

import errno
import fcntl
from typing import IO, Any

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or its process ends.

    Returns False if the file system has no locks. Raises BlockingIOError if another open file holds the lock, unless
    `wait`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
