"""Stopping safely. A signal or the clock only raises a flag; the loop looks at it where nothing can be lost.

SIGTERM and SIGINT: save the state after the last completed update and leave with 75; a second one leaves at once.
SIGUSR1: save after the current update and go on. Only the command line installs handlers, never a library call.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from daybreak.parallel import ALONE, Group


class Interrupted(Exception):
    """Raised by `Stop.check` between micro-steps, batches and sampled tokens. The loop turns it into exit 75."""


class Stop:
    """The flags of one run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.reason = ""
        self.save_requested = False
        self.group: Group = ALONE  # whose ranks stop and save together
        self._save_agreed = False
        self._handled: list[int] = []  # signals whose handlers are ours
        self.checks = 0  # how often `check` was called: as long as it grows, something is being done
        self._clock = clock
        self._deadline = float("inf")

    def limit_hours(self, max_hours: float) -> None:
        """Stop `max_hours` from now; 0 = never."""
        self._deadline = self._clock() + 3600 * max_hours if max_hours else float("inf")
        self._max_hours = max_hours

    def check(self) -> None:
        """Raise Interrupted if the run should stop, on every rank as soon as one was asked to. Collective."""
        self.checks += 1
        self._take_signals()  # again: a library may have put its own handlers in their place
        if not self.reason and self._clock() >= self._deadline:
            self.reason = f"--max-hours {self._max_hours:g} is over"
        asked, self.save_requested = self.save_requested, False  # before the exchange: one may come during it
        stop, save = self.group.numbers([bool(self.reason), asked], largest=True)
        if stop:
            self.reason = next(reason for reason in self.group.gather(self.reason) if reason)
            raise Interrupted(self.reason)
        self._save_agreed |= bool(save)
        # A signal that came during the exchange is for the next check: all ranks stop at the same one.

    def look(self) -> None:
        """Raise Interrupted without asking the other ranks, where only one of them is at work."""
        if self.reason:
            raise Interrupted(self.reason)

    def take_save_request(self) -> bool:
        """Whether a save was asked for since the last call (and all ranks know, since the last `check`)."""
        requested, self._save_agreed = self._save_agreed, False
        if self.group.world == 1:
            requested, self.save_requested = requested or self.save_requested, False
        return requested

    @contextmanager
    def handling_signals(self) -> Iterator[Stop]:
        """Install the handlers for the `with` block; main thread only."""
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = {number: signal.signal(number, self._handle) for number in signals}
        self._handled = list(previous)
        try:
            yield self
        finally:
            self._handled = []
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _take_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._handled:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_requested = True
        elif self.reason:
            os._exit(128 + number)  # asked twice: leave at once; checkpoints are atomic, so nothing breaks
        else:
            os.write(2, b"\ndaybreak: saving what the last completed step made; a second signal leaves at once\n")
            self.reason = f"stopped by {signal.Signals(number).name}"
