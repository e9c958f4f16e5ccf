"""The command line: one small file per verb; main.py joins them and turns errors into exit codes. No torch here."""

import contextlib
import signal

with contextlib.suppress(ValueError):  # imported in a thread: not a command of its own
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # who asks for a save before there is a run must not end it
