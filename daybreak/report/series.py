"""The metrics of a run as columns, read while they grow. The run is daybreak's, or llm.c's `main.log`.

A million steps are read once, and kept as flat arrays of doubles. A page gets few points of them, but all peaks and
dips.
"""

from __future__ import annotations

import base64
import logging
import math
import re
import time
from array import array
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from daybreak.config import Config, run_config, run_hint
from daybreak.data.dataset import MANIFEST, Manifest
from daybreak.data.formats import first_bytes
from daybreak.errors import ConfigError, DataError, Error
from daybreak.files import locked, no_follow
from daybreak.manifest import is_run, newest_manifest
from daybreak.state.metrics import decode_record
from daybreak.state.run_folder import RunFolder

log = logging.getLogger("daybreak")
TRAIN = ("loss", "norm", "lr", "ms", "tok_s", "mfu", "mem_mib", "temp_c", "power_w", "loss_z", "skipped", "saturated")
MOST_POINTS = 4000  # of one curve on a page: more than a screen has pixels
OUTLIER_Z = 5.0
JUMP = 6 * 3600.0  # seconds between two lines of an attempt: more are a clock that was set
MOST_DRAWN, MOST_PNG = 50, 1 << 18  # steps whose pictures a page shows, and bytes of a picture
DRAWN_FILE = re.compile(r"images/step-\d{1,12}-\d{1,4}\.png")
QUIET = 60.0  # seconds without a line, after which the run's lock says whether a process still holds it
LOG_LINE = re.compile(rb"s:(\d+) (?:tel:(\S+)|eval:(\S+)|trl:(\S+)(?: lr:(\S+) norm:(\S+))?)\s*$")


class Curve:
    """Columns of equal length: step, tokens, hours of running, and values. NaN stands for a missing value."""

    def __init__(self, *names: str) -> None:
        self.columns = {name: array("d") for name in ("step", "tokens", "hours", *names)}

    def append(self, values: dict[str, Any]) -> None:
        row = [math.nan if (value := values.get(name)) is None else float(value) for name in self.columns]
        for value, column in zip(row, self.columns.values(), strict=True):
            column.append(value)

    def cut(self, step: float) -> None:
        """Remove the rows after `step`, because a resumed run or a repeated line replaces them."""
        steps = self.columns["step"]
        keep = len(steps)
        while keep and steps[keep - 1] > step:
            keep -= 1
        for column in self.columns.values():
            del column[keep:]

    def thinned(self, by: str) -> dict[str, list[float | None]]:
        """At most MOST_POINTS rows: of each stretch the first one, and those with the least and the largest `by`."""
        n, values = len(self.columns["step"]), self.columns[by]
        rows = range(n)
        if n > MOST_POINTS:
            kept, parts = {n - 1}, MOST_POINTS // 3
            for i in range(parts):
                part = range(i * n // parts, (i + 1) * n // parts)
                real = [j for j in part if values[j] == values[j]] or [part[0]]
                kept |= {part[0], min(real, key=values.__getitem__), max(real, key=values.__getitem__)}
            rows = sorted(kept)  # type: ignore[assignment]
        return {k: [c[i] if math.isfinite(c[i]) else None for i in rows] for k, c in self.columns.items()}


def _is_log(path: Path) -> bool:
    """Whether a file may be llm.c's main.log: it has a line of one near its beginning, or is still empty."""
    if not path.is_file():
        return False
    head = first_bytes(path)
    return not head or any(map(LOG_LINE.match, head.splitlines()))


class Follower:
    """One run. `update` reads the lines that are new, and `payload` has all that a page shows."""

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        self.folder = path if path.is_dir() else path.parent
        ours = is_run(path)
        self.file = path / ("metrics.jsonl" if ours else "main.log") if path.is_dir() else path
        if not ours and not _is_log(self.file):
            fix = run_hint(path) or "; give a folder that daybreak train made, or llm.c's main.log."
            raise ConfigError(f"{path} is not a run{fix}")
        self.config: Config | None = run_config(path) if ours else None
        self.name, self.env = self.folder.resolve().name, dict[str, Any]()
        if ours:
            try:
                self.env = RunFolder(path).read_env()
            except Error as error:
                log.warning("%s", error)
        self.start: dict[str, Any] = {}  # the newest `run` record
        self.offset, self._rest = 0, b""
        self._clear()

    def _clear(self) -> None:
        self.train, self.val = Curve(*TRAIN), Curve("loss", "bpb", "text_loss", "image_loss")
        self.evals: dict[str, Curve] = {}
        self.notes: list[dict[str, Any]] = []  # samples, checkpoints, events, restarts
        self.hours, self._last_t = 0.0, math.nan
        self.eta: float | None = None

    def update(self) -> bool:
        """Read further, and return whether there was anything new. Half a line waits for its other half."""
        size = self.file.stat().st_size if self.file.is_file() else 0
        if size < self.offset:  # another file under this name
            self.offset, self._rest = 0, b""
            self._clear()
        if size == self.offset:
            return False
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            data = self._rest + file.read(size - self.offset)
        self.offset = size
        *lines, self._rest = data.split(b"\n")
        known = self.start
        take = self._metrics_line if self.config else self._log_line
        for line in lines:
            with suppress(ValueError, OverflowError):  # cut short, or not ours
                take(line)
        if self.config and self.start is not known:  # a new start may have other settings
            with suppress(Error):
                self.config = run_config(self.folder)
        return True

    def _metrics_line(self, line: bytes) -> None:
        r = decode_record(line)
        kind, step, t = r["kind"], r["step"], r["t"]
        if kind == "run":
            if self.start:
                for curve in (self.train, self.val, *self.evals.values()):
                    curve.cut(step)
                self.notes = [n for n in self.notes if n["step"] <= step]
                self.notes.append({"kind": "restart", "step": step})
            self.start, self._last_t = r, t  # the time between two attempts does not count
        passed, busy = t - self._last_t, r.get("ms", 0.0) / 1000
        self.hours += (passed if 0 <= passed <= JUMP + 10 * busy else busy) / 3600
        self._last_t, r["hours"] = t, self.hours
        if kind == "step":
            self.train.append(r | {"saturated": self._saturated(r.get("saturated"))})
            self.eta = r.get("eta_s")
        elif kind in ("val", "eval"):
            curve = self.val if kind == "val" else self.evals.setdefault(r["task"], Curve("accuracy"))
            curve.cut(step - 1)
            curve.append(r)
        elif kind in ("sample", "image", "checkpoint", "event") and r.get("what") != "norms":
            self.notes.append(r)

    def _saturated(self, now: int | None) -> float:
        """The steps until now in which a matrix saturated: a count that keeps its end however the curve is thinned."""
        before = next(reversed(self.train.columns["saturated"]), math.nan)
        return before if now is None else (now > 0) + (0.0 if math.isnan(before) else before)

    def _log_line(self, line: bytes) -> None:
        if not (match := LOG_LINE.match(line)):
            return
        step, val, score, loss, lr, norm = match.groups()
        at = int(step) + (loss is not None)  # llm.c numbers updates from 0
        curve = self.train if loss else self.val if val else self.evals.setdefault("hellaswag", Curve("accuracy"))
        curve.cut(at - 1)  # a resumed run repeats steps
        numbers = {"loss": loss or val, "accuracy": score, "lr": lr, "norm": norm}
        curve.append({"step": at, **{k: float(v) for k, v in numbers.items() if v}})

    def payload(self) -> dict[str, Any]:
        """Everything that a page shows, as values for JSON."""
        c, train = self.config, self.train.columns
        skipped = [n for n in self.notes if n.get("what") == "skip"]
        z = [s for s, z in zip(train["step"], train["loss_z"], strict=True) if abs(z) > OUTLIER_Z][-1000:]
        return {
            "name": self.name,
            "parameters": self.start.get("parameters"),
            "flops_per_token": self.start.get("flops_per_token"),
            "device": self.start.get("device", ""),
            "steps": c.run.steps if c else None,
            "price": c.cost.price if c else 0.0,
            **dict(zip(("state", "why"), self.state(), strict=True)),
            "eta": self.eta,
            "vocabulary": self._vocabulary(),
            "prompt": c.eval.prompt if c else "",
            "train": self.train.thinned("loss"),
            "val": self.val.thinned("loss"),
            "evals": {task: curve.thinned("accuracy") for task, curve in self.evals.items()},
            "outliers": z,
            "skipped": [{"step": n["step"], "detail": n["detail"]} for n in skipped][-1000:],
            "restarts": [n["step"] for n in self.notes if n["kind"] == "restart"],
            "samples": [{"step": n["step"], "text": n["text"]} for n in self.notes if n["kind"] == "sample"][-100:]
            or self._drawn(),
            "checkpoints": [n for n in self.notes if n["kind"] == "checkpoint"][-100:],
            "tok_s": quantiles(self._rates()),
            "config": dict(c.items()) if c else {},
            "env": self.env,
        }

    def _drawn(self) -> list[dict[str, Any]]:
        """The pictures of the newest steps that drew some, each beside its caption, as data in the page itself."""
        by_step = defaultdict[int, dict[str, dict[str, str]]](dict)
        for note in (note for note in self.notes if note["kind"] == "image"):
            by_step[note["step"]][note["path"]] = {"caption": note["caption"], "src": self._source(note["path"])}
        newest = sorted(by_step.items())[-MOST_DRAWN:]
        return [{"step": step, "text": "", "pictures": list(found.values())} for step, found in newest]

    def _source(self, name: str) -> str:
        """A picture of the run's folder, maybe somebody else's, as a data URI; "" for what is no PNG there."""
        if not DRAWN_FILE.fullmatch(name):
            return ""
        try:
            with open(self.folder / name, "rb", opener=no_follow) as file:
                data = file.read(MOST_PNG + 1)
        except OSError:
            return ""
        whole = data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) <= MOST_PNG
        return f"data:image/png;base64,{base64.b64encode(data).decode()}" if whole else ""

    def _rates(self) -> list[float]:
        """Tokens a second of each single step."""
        tokens, ms = self.train.columns["tokens"], self.train.columns["ms"]
        return [1000 * (b - a) / t for a, b, t in zip(tokens, tokens[1:], ms[1:], strict=False) if t > 0]

    def state(self) -> tuple[str, str]:
        """The state and its reason: running, finished, stopped, failed or killed, and "" for llm.c's logs."""
        if self.config is None:
            return "", "llm.c's main.log"
        try:
            if ended := RunFolder(self.folder).read_exit():
                word = {0: "finished", 75: "stopped"}.get(ended["code"], "failed")
                return word, ended["reason"] + (f" (exit {ended['code']})" if word == "failed" else "")
        except Error as error:
            return "failed", str(error)
        if self.file.is_file() and time.time() - self.file.stat().st_mtime < QUIET:
            return "running", ""
        try:
            with locked(self.folder, ConfigError(""), tries=1):
                return "killed", "It ended without a word, or runs on another machine."
        except (ConfigError, OSError):
            return "running", ""

    def _vocabulary(self) -> str:
        """The tokenizer's name, if the run's folder or its data set has it."""
        if self.config is None:
            return "gpt2"
        d = self.config.data
        if d.tokenizer:
            return d.tokenizer
        if newest := newest_manifest(self.folder):
            return str(newest[1]["tokenizer"]["name"])
        try:
            return Manifest.load(Path(d.dir) / d.name / MANIFEST).tokenizer
        except DataError:
            return ""


def quantiles(values: list[float]) -> dict[str, float]:
    """The 5, 25, 50, 75 and 95 % points (nearest rank) of the finite numbers among `values`."""
    real = sorted(v for v in values if math.isfinite(v))
    return {f"{q} %": real[max(0, math.ceil(q * len(real) / 100) - 1)] for q in (5, 25, 50, 75, 95) if real}
