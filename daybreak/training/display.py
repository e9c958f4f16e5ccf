"""What a person sees during a run: one plain line a step, or a live panel on a terminal. Both go to stderr."""

from __future__ import annotations

import logging
import sys
from collections import deque
from itertools import pairwise
from typing import Any, Protocol

from daybreak.state.metrics import format_duration, step_line

log = logging.getLogger("daybreak")
SPARK = "▁▂▃▄▅▆▇█"


class Display(Protocol):
    """Receives what happened; `values` are the keyword arguments of state.metrics.step_line."""

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        """A finished update; `step` counts from 1."""

    def note(self, text: str) -> None:
        """Something worth a line: a validation loss, a checkpoint, a warning."""

    def sample(self, text: str) -> None:
        """A generated text."""

    def close(self) -> None:
        """The end, however it came."""


def _say(text: str) -> None:
    """Through the log; straight to stderr where nobody set one up, as in a notebook."""
    if log.hasHandlers():
        log.info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


class PlainDisplay:
    """llm.c's line every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        if step % self.every == 0 or step == steps:
            _say(step_line(step, steps, **values))

    def note(self, text: str) -> None:
        _say(text)

    def sample(self, text: str) -> None:
        _say(f"generating:\n---\n{text}\n---")

    def close(self) -> None:
        pass


class MuteDisplay(PlainDisplay):
    """Of all ranks but the first: what they have to say is said there."""

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def sample(self, text: str) -> None:
        pass


def sparkline(values: list[float], width: int) -> str:
    """`values` as `width` block characters, each the mean of its share, scaled between the smallest and largest."""
    if not values:
        return ""
    width = min(width, len(values))
    cuts = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARK[round((x - low) * scale)] for x in means)


class LiveDisplay:
    """A panel that redraws in place: progress, loss curve, speed, time left. Notes scroll above it."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self.title = title
        self.losses: deque[float] = deque(maxlen=10_000)
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=8, redirect_stdout=False)
        self.live.start()

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        if values["loss"] == values["loss"]:  # a skipped NaN has no place on the curve
            self.losses.append(values["loss"])
        self.live.update(self._panel(step, steps, values))

    def _panel(self, step: int, steps: int, v: dict[str, Any]) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        mfu = "n/a" if v["mfu"] is None else f"{100 * v['mfu']:.1f}%"
        grid.add_row("step", f"{step}/{steps}", ProgressBar(total=steps, completed=step, width=40))
        grid.add_row("loss", f"{v['loss']:.4f}", sparkline(list(self.losses), 40))
        grid.add_row("speed", f"{v['tok_s']:,.0f} tok/s", f"{v['ms']:.0f} ms a step, MFU {mfu}")
        grid.add_row("left", format_duration(v["eta_s"]), f"norm {v['norm']:.2f}  lr {v['lr']:.1e}  {v['mem_mib']} MiB")
        return Panel(grid, title=self.title, title_align="left", width=min(84, self.console.width))

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def sample(self, text: str) -> None:
        from rich.panel import Panel
        from rich.text import Text

        self.console.print(Panel(Text(text), title="sample", title_align="left", width=min(84, self.console.width)))

    def close(self) -> None:
        self.live.stop()


def make_display(kind: str, every: int, title: str) -> Display:
    """The display that log.display names; auto is live where stderr is a terminal."""
    if kind == "live" or (kind == "auto" and sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        return LiveDisplay(title)
    return PlainDisplay(every)
