"""Saving beside training: a thread writes a snapshot that nothing else touches, one save at a time.

With one process, the loop copies the engine's state to host memory (`Staging.take`) and continues. A thread writes
the copy. The loop asks for the result once an iteration, without waiting:

    loop     | step | copy, start() | step | step | result() -> None | step | result() -> Saved | ...
    thread                 | before() write, publish, prune old ones ------->|

`start` is never called while a save runs: the loop waits for the result first. Among several ranks there is no thread.
All ranks write their parts at the same time inside `start`, because collectives have one order.

People rename and remove folders while a run is in progress. So before each save `_find` asks where the folder is now:

    still there       the save goes there
    renamed           the save follows it, and once more if the folder is renamed during the save
    removed           `RunFolder.remake` makes a new one; this save goes there, and then the run ends with an Error
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from daybreak.config import Config
from daybreak.errors import Error, explained
from daybreak.parallel import ALONE, Group
from daybreak.state.checkpoint import Snapshot, prune_checkpoints, save_checkpoint
from daybreak.state.run_folder import RunFolder

log = logging.getLogger("daybreak")


@dataclass(frozen=True)
class Saved:
    """A finished save: where, the tokens trained on, how long training waited and how long it took in all."""

    path: Path
    step: int
    tokens: int
    stall: float  # seconds
    seconds: float
    nbytes: int


def _give_way() -> None:
    """Less priority for this thread: on a CPU it competes with those that train, which wait for the slowest one."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Saver:
    """Writes checkpoints of the run in `folder`, and removes old ones (`keep`, `major`: see prune_checkpoints).

    before: called before a checkpoint is written, for what must be on the disk before it. lost: the folder was removed,
    and the last save is in a new one.
    """

    def __init__(
        self, folder: RunFolder, keep: int, major: int, before: Callable[[], None] = lambda: None, group: Group = ALONE
    ) -> None:
        self.folder, self.keep, self.major, self.before, self.group = folder, keep, major, before, group
        self.lost = False
        self._pool = ThreadPoolExecutor(1, "save", initializer=_give_way)
        self._future: Future[Saved] | None = None

    def start(self, snap: Snapshot, tokens: int, began: float) -> None:
        """Begin to write `snap`, whose tensors must not change until `result` returns. `began`: perf_counter then."""
        assert self._future is None, "one save at a time"
        stall = time.perf_counter() - began
        if self.group.world == 1:
            self._future = self._pool.submit(self._write, snap, tokens, began, stall)
            return
        self._future = Future()  # collectives have one order: what ranks write together is no thread's
        try:
            self._future.set_result(self._write(snap, tokens, began, stall))
        except Exception as error:  # of any kind, as when a rank dies: the exit waits until this is over
            self._future.set_exception(error)

    def _write(self, snap: Snapshot, tokens: int, began: float, stall: float) -> Saved:
        with explained(Error, f"the save of step {snap.step} could not begin", "free space or repair the disk"):
            self.group.first(self.before)
        path, nbytes = self._save(snap), 0
        try:
            nbytes = sum(file.stat().st_size for file in path.iterdir())
            if self.group.rank == 0:
                prune_checkpoints(path.parent, self.keep, self.major, "size", self.folder.id)
        except OSError as error:  # the new one is safe
            log.warning("Old checkpoints below %s could not be removed (%s).", path.parent, error.strerror)
        if self.lost:
            saved = f"the state after step {snap.step} is saved in a new one"
            again = self.group.again(self.folder.path)
            raise Error(f"the run's folder was removed, or another one took its place; {saved}; resume with: {again}")
        return Saved(path, snap.step, tokens, stall, time.perf_counter() - began, nbytes)

    def _save(self, snap: Snapshot) -> Path:
        """Save where the run's folder is now, and once more if it is renamed meanwhile."""
        tried = self._find(snap)
        try:
            return save_checkpoint(tried, snap, self.group)
        except Error:
            if self.group.world > 1 or self._find(snap) == tried:
                raise
        return self._save(snap)

    def _find(self, snap: Snapshot) -> Path:
        """The folder of the run's checkpoints, now. Collective."""

        def look() -> tuple[Path, bool]:
            try:
                return self.folder.locate(), self.lost
            except Error:
                self.folder.remake(Config().override(snap.manifest["config"]).to_toml())
                return self.folder.path, True

        path, self.lost = self.group.first(look)
        self.folder.move(path)
        return self.folder.checkpoints

    def result(self, wait: bool) -> Saved | None:
        """The save under way, once it is over (`wait` for that); None while it is not, or where there is none.

        Raises what went wrong with it. Every save is reported once.
        """
        if self._future is None or not (wait or self._future.done()):
            return None
        try:
            return self._future.result()
        finally:
            if self._future.done():  # else it was Ctrl-C in a notebook, which asks again
                self._future = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        """A save under way is finished, however training ended."""
        self._pool.shutdown()
        if self._future is not None and (failed := self._future.exception()) is not None:
            log.warning("%s", failed)
