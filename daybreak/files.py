"""Files that survive crashes: atomic replacement, flushing, locks, hashes, and leftovers of killed processes."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from daybreak.errors import Error

log = logging.getLogger("daybreak")
HOLDER = ".holder"

# Errors of file systems that cannot lock or flush: some network and FUSE mounts, 9p, overlays of old kernels.
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF)


@cache
def _warn_unable(device: int, what: str) -> None:
    """One warning for each file system (its device number) and ability."""
    log.warning("%s", what)


@contextmanager
def _unless_unable(fd: int, what: str) -> Iterator[None]:
    """A warning where the file system of `fd` cannot do at all what the block asks of it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        _warn_unable(os.fstat(fd).st_dev, f"This file system cannot {what} ({error.strerror}).")


def fsync(fd: int) -> None:
    """Flush an open file or folder to the disk, with a warning if its file system cannot do this."""
    with _unless_unable(fd, "flush files or folders, so a power cut may lose what was saved"):
        os.fsync(fd)


def flush(file: IO[bytes]) -> None:
    """All that was written to a file so far is on the disk: see `fsync`."""
    file.flush()
    fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def lock(fd: int, how: int) -> bool:
    """flock; False if another process holds it. A file system without locks gets a warning, and the answer is True."""
    try:
        with _unless_unable(fd, "lock, so never start two processes on one run or data set"):
            fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    return True


def no_follow(path: str, flags: int) -> int:
    """An opener for `open` that refuses symbolic links: a folder from somebody else may hold one that leads outside."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def alive(pid: int) -> bool:
    """Whether another live process has this id. Our own id on a leftover: a container that restarts reuses ids."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, never what the link leads to, as far as the disk allows."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def temporary_of(path: Path) -> Path:
    """A hidden name beside `path` that nobody uses. Leftovers of killed processes that wrote the same are removed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-*"):
        pid = leftover.name.rpartition("-")[2]
        if leftover.name == f".{path.name}-{pid}" and pid.isdecimal() and not alive(int(pid)):
            remove(leftover)
    return path.with_name(f".{path.name}-{os.getpid()}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends well, on the disk then: readers, and a crash at any
    moment, see the old one or the new, never a part. Symbolic links are replaced, not followed."""
    temporary = temporary_of(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            flush(file)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def locked(folder: Path, busy: Error, tries: int = 3) -> Iterator[int]:
    """Hold a folder for this process, until it ends however it ends; its descriptor. Raises `busy` if another does. It
    is tried again, because `watch` takes the lock of a run that was killed for a moment, to see that it was."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        while not lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if (tries := tries - 1) == 0:
                raise busy
            time.sleep(0.1)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def signed(folder: Callable[[], Path]) -> Iterator[None]:
    """While the block runs, HOLDER in the folder names this process, which holds it. It may move meanwhile."""
    here = f"{os.getpid()} {socket.gethostname()}\n"
    with suppress(OSError), open(folder() / HOLDER, "w", opener=no_follow) as file:
        file.write(here)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # it may be gone, and another process's be here
            if (folder() / HOLDER).read_text("ascii") == here:
                (folder() / HOLDER).unlink()


def holder_of(folder: Path) -> str:
    """The process that took the lock last, for people who look for it; it may be on another machine."""
    said, file = None, folder / HOLDER
    with suppress(OSError):
        text = file.read_text("ascii", "replace") if file.is_file() else ""
        said = re.fullmatch(r"([0-9]{1,10}) ([a-zA-Z0-9_.-]{1,253})\n", text)  # it may be somebody else's folder
    return f"process {said[1]} on {said[2]}" if said else "another process"


def free_bytes(folder: Path) -> int | None:
    """The bytes that the disk of a folder has free, without a look at quotas; None if its file system does not tell."""
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize if system.f_blocks else None


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
