"""How tests wait for other processes and threads: for an event, never for a time that a busy machine may exceed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 600.0  # seconds after which something hangs; nothing that works takes a tenth of it


def until(reached: Callable[[], Any], process: Any = None, why: Callable[[], str] = str, every: float = 0.01) -> None:
    """Return when `reached()` is true. Fail when `process` ends before that, or when nothing happens any more."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        if process is not None and process.poll() is not None:
            assert reached(), f"the process ended too early, with {process.returncode}. {why()}"
            return
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(f"waiting for {reached}. {why()}", PATIENCE)
        time.sleep(every)
