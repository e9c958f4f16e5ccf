"""A run that does nothing any more, as in a dead collective or a hung driver, is ended so that it can be restarted."""

from __future__ import annotations

import math
import os
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from daybreak.errors import Hung
from daybreak.state.run_folder import RunFolder
from daybreak.training.stop import to_stderr

STEPS = 100  # the median is of this many
ARMED = 5  # steps to see first: the first ones compile
PATIENCE = 5.0  # seconds for each thing that is written at the end


def _try(what: Callable[[], None]) -> None:
    """Do what may fail or never return, as on a disk that hangs, in a thread of its own, and wait PATIENCE for it."""

    def attempt() -> None:
        with suppress(Exception):
            what()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)


class Watchdog:
    """Ends the process with exit code 7 when `progress` stays as it is for too long.

    Too long is `factor` times the median step, at least `seconds`; factor 0: never. `progress` counts what training
    does: see Stop.checks.
    """

    def __init__(self, folder: RunFolder, progress: Callable[[], int], factor: float, seconds: float) -> None:
        self.folder, self.progress, self.factor, self.seconds = folder, progress, factor, seconds
        self.limit = math.inf
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._paused, self._over = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.append(seconds)
        if self.factor and len(self._steps) >= ARMED:
            self.limit = max(self.seconds, self.factor * statistics.median(self._steps))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what may take as long as it takes: a disk."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _watch(self) -> None:
        # Time is counted in waits of our own: a process that was stopped or asleep has not been hung meanwhile.
        seen, quiet, tick = -1, 0.0, min(1.0, self.seconds / 10)
        while not self._over.wait(tick):
            now = self.progress()
            quiet = 0.0 if now != seen or self._paused else quiet + tick
            seen = now
            if quiet >= self.limit:
                self._end(quiet)

    def _end(self, quiet: float) -> None:
        median = statistics.median(self._steps)
        reason = (
            f"nothing happened for {quiet:.1f} s, {quiet / median:.0f} times the median step (guard.hang_factor, "
            f"guard.hang_seconds); where every thread was is in {self.folder.crash}"
        )
        _try(lambda: self.folder.append_stacks(reason))
        _try(lambda: self.folder.write_exit(Hung.exit_code, reason))
        _try(lambda: to_stderr(reason))
        os._exit(Hung.exit_code)  # the thread that hangs cannot be asked to

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
