"""The display of a run for a person: one plain line a step, or a live panel on a terminal. Both go to stderr, and
neither ends a run when stderr breaks."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from daybreak.console import Console as Stream
from daybreak.formatting import format_duration
from daybreak.parallel import Check
from daybreak.state.metrics import step_line
from daybreak.training.stop import to_stderr

log = logging.getLogger("daybreak")
SPARK = "▁▂▃▄▅▆▇█"
Clock = Callable[[], float]
PATIENCE = 2.0  # seconds without a word


class Task:
    """Something that takes a while, and how much of it is done. total: parts, before each of which the task is called;
    0 = unknown. check: what a call calls."""

    def __init__(self, what: str, total: int, check: Check, clock: Clock = time.monotonic) -> None:
        self.what, self.total, self.check, self.clock, self.began, self.done = what, total, check, clock, clock(), -1

    def __call__(self) -> None:
        self.done += 1
        self.check()

    def __str__(self) -> str:
        seconds = self.clock() - self.began
        if self.total == 0 or self.done < 1:
            return f"{self.what} ({format_duration(seconds)})"
        left = seconds * (self.total - self.done) / self.done
        return f"{self.what}: {self.done / self.total:.0%}, {format_duration(left)} left"


def say(text: str) -> None:
    """Through the log; straight to stderr where nobody set one up, as in a notebook."""
    if log.hasHandlers():
        log.info("%s", text)
    else:
        print(text, file=Stream(sys.stderr), flush=True)


@contextmanager
def working(what: str, total: int = 0, check: Check = lambda: None) -> Iterator[Task]:
    """Say how far the `with` block is, if it lasts: after 2 seconds, 4 more, 8 more, and then every minute."""
    task, over = Task(what, total, check), threading.Event()

    def watch() -> None:
        wait = PATIENCE
        while not over.wait(wait):
            say(str(task))
            wait = min(2 * wait, 60.0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield task
    finally:
        over.set()
        thread.join()


class Display:
    """Receives what happened; `values`: what state.metrics.step_line takes, and step_tokens, the tokens of the step.
    This one shows nothing: of several ranks the first says it all."""

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        """A finished update; `step` counts from 1."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, just written."""

    def note(self, text: str) -> None:
        """Something worth a line: a validation loss, a checkpoint, a warning."""

    def sample(self, text: str) -> None:
        """A generated text."""

    def working(self, what: str, total: int = 0, check: Check = lambda: None) -> AbstractContextManager[Task]:
        """For the `with` block: something that may last (see Task)."""
        return nullcontext(Task(what, total, check))

    def announce(self, text: str) -> None:
        """Show `text` at once. Called from inside a signal handler."""
        to_stderr(text)

    def close(self) -> None:
        """The end, however it came."""


class PlainDisplay(Display):
    """llm.c's line every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        if step % self.every == 0 or step == steps:
            say(step_line(step, steps, values))

    def note(self, text: str) -> None:
        say(text)

    def sample(self, text: str) -> None:
        say(f"generating:\n---\n{text}\n---")

    working = staticmethod(working)


def sparkline(values: list[float], width: int) -> tuple[str, float, float]:
    """`values` as `width` block characters, each the mean of its share, scaled between the smallest and largest of
    these, which come back too."""
    if not values:
        return "", 0.0, 0.0
    width = min(width, len(values))
    cuts = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARK[round((x - low) * scale)] for x in means), low, high


class LiveDisplay(Display):
    """A panel that redraws in place: progress, curve, scores, speed, GPU, time, money, the last sample. Notes scroll
    above it. Only the panel's own thread draws, from what the methods leave behind. price: dollars per hour, 0 =
    unknown; clock: seconds, for the money spent since the start."""

    def __init__(self, title: str, price: float = 0.0, clock: Clock = time.monotonic) -> None:
        self.title, self.price, self.clock, self.began = title, price, clock, clock()
        self.losses: deque[float] = deque(maxlen=10_000)
        self.latest: dict[str, dict[str, Any]] = {}  # by kind, evaluations by their task
        self.skipped = 0
        self.now: tuple[int, int, dict[str, Any]] | None = None  # the last update
        self.task: Task | None = None
        self.stopping = ""
        self.console = Console(file=Stream(sys.stderr), highlight=False)  # type: ignore[arg-type]
        self.live = Live(console=self.console, refresh_per_second=8, redirect_stdout=False, get_renderable=self.panel)
        self.live.start()
        self.console.show_cursor()  # a process that is killed leaves the terminal as it was

    def record(self, record: dict[str, Any]) -> None:
        self.latest[record.get("task", record["kind"])] = record
        self.skipped += bool(record.get("skipped"))

    def step(self, step: int, steps: int, values: dict[str, Any]) -> None:
        if math.isfinite(values["loss"]):  # of a skipped update it may not be, and has no place on the curve
            self.losses.append(values["loss"])
        self.now = step, steps, values

    @contextmanager
    def working(self, what: str, total: int = 0, check: Check = lambda: None) -> Iterator[Task]:
        before, self.task = self.task, Task(what, total, check, self.clock)
        try:
            yield self.task
        finally:
            self.task = before

    def announce(self, text: str) -> None:
        self.stopping = text

    def panel(self) -> Group:
        """The panel now, at most as wide as the terminal. An unknown value has no place in it. The empty line below is
        where the terminal shows ^C, and where the shell continues after a second one."""
        width = min(84, self.console.width)
        grid, task = Table.grid(padding=(0, 2), expand=True), self.task
        for ratio in (None, None, 1):
            grid.add_column(ratio=ratio, no_wrap=ratio is None)
        for row in self._rows(width) if self.now else ():
            grid.add_row(*row)
        lines = [Text(self.stopping, style="bold") if self.stopping else Text("Ctrl-C saves and stops", style="dim")]
        if task is not None and (task.clock() - task.began >= PATIENCE or not self.now):
            lines.insert(0, Text(str(task)))
        return Group(Panel(Group(grid, *lines), title=Text(self.title), title_align="left", width=width), "")

    def _rows(self, width: int) -> Iterator[tuple[Any, ...]]:
        assert self.now is not None
        (step, steps, v), latest = self.now, self.latest
        # The terminal's own 16 colours, which its theme makes readable on light and on dark.
        bar = ProgressBar(steps, step, style="bright_black", complete_style="green", finished_style="green")
        whole = Table.grid(padding=(0, 1), expand=True)
        whole.add_column(ratio=1)
        left = "" if v["eta_s"] is None else f", {format_duration(v['eta_s'])} left"
        whole.add_row(bar, f"{100 * step // steps}%{left}")
        yield "step", f"{step}/{steps}", whole
        curve, low, high = sparkline(list(self.losses), max(8, width - 48))
        yield "loss", f"{v['loss']:.4f}", f"{curve}  {low:.2f} to {high:.2f}" if low < high else ""
        if val := latest.get("val"):
            yield "val", f"{val['loss']:.4f}", f"at step {val['step']}{_bits(val['bpb'])}"
        if score := latest.get("hellaswag"):
            yield "HellaSwag", f"{score['accuracy']:.2%}", f"at step {score['step']}"
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        yield "update", f"norm {v['norm']:.2f}", f"learning rate {v['lr']:.1e}{skipped}"
        ms = 1000 * v["step_tokens"] / v["tok_s"]  # all three are averages over the same steps
        mfu = "" if v["mfu"] is None else f", {100 * v['mfu'] * v['ms'] / ms:.1f}% MFU"
        yield "speed", f"{v['tok_s']:,.0f} tok/s", f"{ms:.0f} ms a step{mfu}"
        gpu = latest.get("step", {})  # temperature and power, where the record has them
        sensors = [f"{gpu[key]:.0f} {unit}" for key, unit in (("temp_c", "°C"), ("power_w", "W")) if gpu.get(key)]
        yield "memory", f"{v['mem_mib']:,} MiB", ", ".join(sensors)
        if self.price:
            spent = self.price * (self.clock() - self.began) / 3600
            more = "" if v["eta_s"] is None else f", ${spent + self.price * v['eta_s'] / 3600:,.2f} at the end"
            yield "cost", f"${spent:,.2f}", f"since this start{more}"
        if sample := latest.get("sample"):
            words = " ".join("".join(c if c.isprintable() else " " for c in sample["text"]).split())
            yield "sample", f"step {sample['step']}", Text(words, style="dim", no_wrap=True, overflow="ellipsis")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def sample(self, text: str) -> None:
        self.console.print(Panel(Text(text), title="sample", title_align="left", width=min(84, self.console.width)))

    def close(self) -> None:
        self.live.stop()


def _bits(bpb: float | None) -> str:
    return "" if bpb is None or bpb != bpb else f", {bpb:.4f} bits per byte"


def make_display(kind: str, every: int, title: str, price: float = 0.0) -> Display:
    """The display that log.display names; auto is live where stderr is a terminal."""
    if kind == "live" or (kind == "auto" and sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        return LiveDisplay(title, price)
    return PlainDisplay(every)
