"""Stopping safely: a signal or the clock only sets a flag, and the loop acts on it where nothing can be lost.

A signal handler may run between any two instructions of Python. So it does nothing but set a flag and show one line.
The loop calls `check` between micro-steps, batches of validation and sampled tokens. Only there the flags count:

    event                     flag              check(), on every rank           the loop
    SIGTERM, SIGINT ...       reason            raises Interrupted               saves the last update, exit code 75
    --max-hours is over       reason            raises Interrupted               the same
    SIGUSR1                   save_requested    notes it for take_save_request   saves after the update, and continues

Ranks compare their flags in one collective, so all of them stop before the same micro-step, whichever got the signal.
A signal that comes during the collective counts at the next check.

A second signal ends the process at once, with exit code 128 + its number: checkpoints are atomic, so nothing breaks.
Signals of several kinds within SAME_CAUSE seconds count as one, because a launcher sends SIGTERM after a terminal's
SIGHUP. Under torchrun so do signals of one kind. SIGHUP itself never counts as the second one.

A library may install handlers of its own, so `check` installs ours again. A signal that is ignored already, as SIGHUP
under nohup, stays ignored. Only the command line installs handlers, never a library call.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from daybreak.parallel import ALONE, Group

# Signals from outside that end a process by default. Those that report a fault of its own (SIGSEGV ...) are not here.
TIMERS = ("SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO")  # a library that starts to use one may keep it
ENDING = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGXCPU", "SIGUSR2", "SIGPWR", *TIMERS)
SAME_CAUSE = 5.0  # seconds in which signals of other kinds come from the same cause as the first


class Interrupted(Exception):
    """Raised by `Stop.check` between micro-steps, batches and sampled tokens. The loop turns it into exit 75."""


class Stop:
    """The flags of one run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.reason = ""
        self.step = 0  # the last completed update: what a stop saves
        self.announce = to_stderr  # shows a text at once, from inside a signal handler
        self.save_requested = False
        self.group: Group = ALONE  # whose ranks stop and save together
        self._save_agreed = False
        self._handled: list[int] = []  # signals whose handlers are ours
        self.checks = 0  # how often `check` was called: as long as it grows, something is being done
        self._clock = clock
        self._deadline, self._max_hours = float("inf"), 0.0
        self._seen: set[int] = set()  # kinds of signals that came
        self._first = 0.0  # when the first of them came

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
        asked, self.save_requested = self.save_requested, False  # before the collective: one may come during it
        stop, save = self.group.numbers([bool(self.reason), asked], largest=True)
        if stop:
            self.reason = next(reason for reason in self.group.gather(self.reason) if reason)
            raise Interrupted(self.reason)
        self._save_agreed |= bool(save)

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
        numbers = [getattr(signal, name) for name in (*ENDING, "SIGUSR1") if hasattr(signal, name)]
        # torchrun passes SIGHUP on when it ends itself, also under nohup. Elsewhere what is ignored stays ignored;
        # SIGUSR1 is ignored only because daybreak.cli has said so. None is a handler that is not Python's.
        heard = {signal.SIGUSR1, *([signal.SIGHUP] if by_torchrun() else [])}
        mine = [n for n in numbers if n in heard or signal.getsignal(n) not in (signal.SIG_IGN, None)]
        previous = {number: signal.signal(number, self._handle) for number in mine}
        self._handled = [number for number in previous if signal.Signals(number).name not in TIMERS]
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
            return
        first, again, now = not self._seen, number in self._seen, self._clock()
        if first:
            self._first = now  # before _seen: the next signal may interrupt this very line
        self._seen.add(number)
        if first:  # --max-hours may have begun the stop already
            self.reason = self.reason or f"stopped by {signal.Signals(number).name}"
            what = f"saving step {self.step}" if self.step else "no step is complete yet"
            if self.group.world > 1:
                what += ", if every rank still runs"
            way = "Ctrl-C again" if number == signal.SIGINT else "The same signal again"
            self.announce(f"Stopping: {what}. {way} quits without saving.")
        elif number != signal.SIGHUP and (now - self._first > SAME_CAUSE or (again and not by_torchrun())):
            # Asked twice: leave at once. Checkpoints are atomic, so nothing breaks. A terminal that closes sends
            # SIGHUP twice, and launchers send SIGTERM after it. Slurm signals every process of a job, and torchrun
            # passes the signal on to workers that have it already. None of these is a second request.
            os._exit(128 + number)


def by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def to_stderr(text: str) -> None:
    """A line on stderr, past Python's own streams; none where nobody is there to read it."""
    with suppress(OSError):
        os.write(2, f"\ndaybreak: {text}\n".encode())
