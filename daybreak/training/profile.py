"""--profile A:B: a trace of steps A to B, written into the run's folder for chrome://tracing or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

log = logging.getLogger("daybreak")


class Profiler:
    """Off for an empty range; else records from before step A until before step B."""

    def __init__(self, steps: str, folder: Path) -> None:
        first, _, last = steps.partition(":")
        self.first, self.last = (int(first), int(last)) if steps else (-1, -1)
        self.path = folder / f"profile-{self.first}-{self.last}.json"
        self.active: torch.profiler.profile | None = None

    def due(self, step: int) -> bool:
        """Whether `before` does something at this step."""
        return step in (self.first, self.last)

    def before(self, step: int) -> None:
        """Call with the number of completed updates, before the next one."""
        if step == self.first:
            self.active = torch.profiler.profile()
            self.active.start()
        elif step == self.last:
            self.close()

    def close(self) -> None:
        """Stop and write the trace, if one is being recorded."""
        if self.active is not None:
            self.active.stop()
            self.active.export_chrome_trace(str(self.path))
            self.active = None
            log.info("profile of steps %d to %d: %s", self.first, self.last, self.path)
