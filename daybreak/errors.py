"""Everything that can go wrong for a reason the user can act on, with its exit code.

A `daybreak.Error` carries one clear sentence (field, value, rule, fix) and the documented exit code; the command
line prints the sentence and exits, the Python API raises it. `assert` is kept for our own bugs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class Error(Exception):
    """A failure with a reason and a documented exit code (docs/files.md)."""

    exit_code: int = 1
    elsewhere: bool = False  # another rank's, which says it itself
    final: bool = False  # starting again would repeat it, whatever its exit code


class ConfigError(Error):
    """Configuration or usage: unknown key, value out of range, run name taken."""

    exit_code = 2


class TooManySkips(Error):
    """`guard.max_skips` updates in a row were skipped (non-finite or outlier)."""

    exit_code = 3


class DataError(Error):
    """Data that is missing, malformed, or not what the checkpoint was trained on."""

    exit_code = 4


class CheckpointError(Error):
    """A checkpoint that is corrupt, incomplete, foreign, or written by a newer version."""

    exit_code = 5


class OutOfMemory(Error):
    """The plan does not fit the device; the message holds the plan and the flag that helps."""

    exit_code = 6


class Hung(Error):
    """Nothing moves any more, or ranks did not meet: the message names who is waited for. Another start may help."""

    exit_code = 7


class Stopped(Error):
    """Stopped by a signal or by --max-hours, after a complete checkpoint was saved."""

    exit_code = 75


def by_exit_code(code: int) -> type[Error]:
    """The class of errors with this exit code; Error for an unknown one."""
    return next((kind for kind in Error.__subclasses__() if kind.exit_code == code), Error)


# Faults that another name or other permissions mend; the rest is the disk's.
_NAMES = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
          errno.ELOOP, errno.EEXIST, errno.EINVAL, errno.EILSEQ)  # fmt: skip


def os_error(error: OSError) -> Error:
    """An OSError as one sentence with the path and the reason."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    what, reason = " -> ".join(names) or "a file or the console", error.strerror or str(error)
    if error.errno == errno.EROFS:
        return ConfigError(f"{what} cannot be used ({reason}); mount its disk for writing, or use another disk.")
    if error.errno in _NAMES:
        return ConfigError(f"{what} cannot be used ({reason}); fix its name or permissions, or give another one.")
    return Error(f"{what} failed ({reason}); free space or repair the disk, then run the same command again.")


@contextmanager
def explained(kind: type[Error], said: str, fix: str = "") -> Iterator[None]:
    """Raise `kind` when the system refuses something in the block: what is said, the reason in brackets, the fix."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and os.sep not in said:  # which path, where the sentence names none
            reason += f": {error.filename}"
        raise kind(f"{said} ({reason}){fix and f'; {fix}'}.") from error
