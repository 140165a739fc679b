"""Locks on open files, by which processes tell each other what they use. They end with the process that holds them, however it ends.

``flock`` of the operating system: the file itself is what is locked, so that nothing can be left behind, and many may share it, which the
locks of the filelock package cannot. Windows needs none: there an open file can be neither removed nor replaced.
"""

from __future__ import annotations

import enum
import errno
import sys

_NOT_HERE = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What a file system says that knows no locks, as some network file systems do."""


class Lock(enum.Enum):
    """How an attempt to lock a file ended: HELD, BUSY (another holds it), NONE (there are no locks here)."""

    HELD = "held"
    BUSY = "busy"
    NONE = "none"


if sys.platform == "win32":

    def share(descriptor: int) -> Lock:
        """Say that a file is in use, without waiting. See the module for Windows."""
        return Lock.NONE

    def take(descriptor: int) -> Lock:
        """Have a file for oneself, without waiting. See the module for Windows."""
        return Lock.NONE

else:
    import fcntl

    def share(descriptor: int) -> Lock:
        """Say that a file is in use, without waiting: many may at once, none while somebody has taken it.

        Args:
            descriptor: of the file; the lock ends when it and its duplicates are closed.
        """
        return _lock(descriptor, fcntl.LOCK_SH)

    def take(descriptor: int) -> Lock:
        """Have a file for oneself, without waiting.

        Args:
            descriptor: of the file; the lock ends when it and its duplicates are closed.
        """
        return _lock(descriptor, fcntl.LOCK_EX)

    def _lock(descriptor: int, kind: int) -> Lock:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return Lock.BUSY
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            return Lock.NONE
        return Lock.HELD
