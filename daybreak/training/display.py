"""What a person sees during a run: one plain line a step, or a live panel on a terminal. Both go to stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from daybreak.state.metrics import format_duration, step_line

log = logging.getLogger("daybreak")
SPARK = "▁▂▃▄▅▆▇█"


class Display:
    """Receives what happened; `values` are the keyword arguments of state.metrics.step_line. This one shows nothing: of
    several ranks the first says it all."""

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        """A finished update; `step` counts from 1."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, just written."""

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


class PlainDisplay(Display):
    """llm.c's line every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        if step % self.every == 0 or step == steps:
            _say(step_line(step, steps, values))

    def note(self, text: str) -> None:
        _say(text)

    def sample(self, text: str) -> None:
        _say(f"generating:\n---\n{text}\n---")


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


class LiveDisplay(Display):
    """A panel that redraws in place: progress, curve, scores, speed, card, time, money, the last sample. Notes scroll
    above it. price: dollars per hour, 0 = unknown; clock: seconds, for the money spent since the start."""

    def __init__(self, title: str, price: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.live import Live

        self.title, self.price, self.clock, self.began = title, price, clock, clock()
        self.losses: deque[float] = deque(maxlen=10_000)
        self.latest: dict[str, dict[str, Any]] = {}  # by kind, evaluations by their task
        self.skipped = 0
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=8, redirect_stdout=False)
        self.live.start()

    def record(self, record: dict[str, Any]) -> None:
        self.latest[record.get("task", record["kind"])] = record
        self.skipped += bool(record.get("skipped"))

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        if values["loss"] == values["loss"]:  # a skipped NaN has no place on the curve
            self.losses.append(values["loss"])
        self.live.update(self.panel(step, steps, values))

    def panel(self, step: int, steps: int, v: dict[str, Any]) -> Any:
        """What is shown after an update; `v` as of state.metrics.step_line."""
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid, latest = Table.grid(padding=(0, 2)), self.latest
        mfu = "n/a" if v["mfu"] is None else f"{100 * v['mfu']:.1f}%"
        grid.add_row("step", f"{step}/{steps}", ProgressBar(total=steps, completed=step, width=40))
        grid.add_row("loss", f"{v['loss']:.4f}", sparkline(list(self.losses), 40))
        if val := latest.get("val"):
            grid.add_row("val", f"{val['loss']:.4f}", f"at step {val['step']}{_bits(val['bpb'])}")
        if score := latest.get("hellaswag"):
            grid.add_row("HellaSwag", f"{score['accuracy']:.2%}", f"at step {score['step']}")
        grid.add_row("speed", f"{v['tok_s']:,.0f} tok/s", f"{v['ms']:.0f} ms a step, MFU {mfu}")
        grid.add_row("memory", f"{v['mem_mib']:,} MiB", _card(latest.get("step", {})))
        skipped = f"  {self.skipped} skipped" if self.skipped else ""
        grid.add_row("left", format_duration(v["eta_s"]), f"norm {v['norm']:.2f}  lr {v['lr']:.1e}{skipped}")
        if self.price:
            spent = self.price * (self.clock() - self.began) / 3600
            more = "" if v["eta_s"] is None else f"${spent + self.price * v['eta_s'] / 3600:,.2f} at the end"
            grid.add_row("cost", f"${spent:,.2f}", f"since this start; {more}")
        if sample := latest.get("sample"):
            words = " ".join("".join(c if c.isprintable() else " " for c in sample["text"]).split())
            text = Text(words, style="dim", no_wrap=True, overflow="ellipsis")
            grid.add_row("sample", f"step {sample['step']}", text)
        return Panel(grid, title=self.title, title_align="left", width=min(84, self.console.width))

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def sample(self, text: str) -> None:
        from rich.panel import Panel
        from rich.text import Text

        self.console.print(Panel(Text(text), title="sample", title_align="left", width=min(84, self.console.width)))

    def close(self) -> None:
        self.live.stop()


def _bits(bpb: float | None) -> str:
    return "" if bpb is None else f", {bpb:.4f} bits per byte"


def _card(step: dict[str, Any]) -> str:
    """Temperature and power, where a step's record has them."""
    parts = [f"{step[key]:.0f} {unit}" for key, unit in (("temp_c", "°C"), ("power_w", "W")) if step.get(key)]
    return ", ".join(parts)


def make_display(kind: str, every: int, title: str, price: float = 0.0) -> Display:
    """The display that log.display names; auto is live where stderr is a terminal."""
    if kind == "live" or (kind == "auto" and sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        return LiveDisplay(title, price)
    return PlainDisplay(every)
