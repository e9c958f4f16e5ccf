"""The records of a run: metrics.jsonl for programs, main.log in llm.c's format, the console's line for people."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from daybreak.checked import FLAG, LIMIT, TEXT, WHOLE, Rule, misfit, or_null
from daybreak.errors import Error
from daybreak.files import fsync, no_follow
from daybreak.formatting import format_duration

log = logging.getLogger("daybreak")

VERSION = 1
NAMED = 3  # lines of a file that are no records, each with a warning of its own; the others are counted
COMMON: dict[str, Any] = {"v": int, "kind": str, "step": int, "tokens": int, "t": float}
# kind -> its own fields, a contract with other programs. step: updates done; tokens: trained on; t: unix seconds.
FIELDS: dict[str, dict[str, Any]] = {
    "run": {"name": str, "config_hash": str, "device": str, "parameters": int, "flops_per_token": float},
    "step": {
        "loss": float,
        "norm": float,
        "lr": float,
        "ms": float,
        "tok_s": float,  # smoothed
        "mfu": float | None,  # 0 to 1; null: the GPU's peak is unknown
        "loss_z": float | None,  # null until the window is full
        "norm_z": float | None,
        "skipped": bool,
        "mem_mib": int,
        "eta_s": float | None,
        "epoch": int,
        "temp_c": float | None,  # of the GPU; null: unknown
        "power_w": float | None,
        "saturated": int | None,  # matrices with a value that fp8 could not hold; null: the step was not in fp8
    },
    "val": {
        "loss": float,
        "tokens_evaluated": int,
        "bpb": float | None,  # bits per byte; null: bytes unknown
        "text_loss": float | None,  # nats per token of text, and per token of pictures; null: the model has none
        "image_loss": float | None,
    },
    "eval": {"task": str, "accuracy": float, "examples": int},
    "sample": {"text": str},
    "image": {"caption": str, "path": str},  # a drawn picture; in the run's folder
    "checkpoint": {"path": str, "seconds": float, "stall": float, "bytes": int},  # stall: what of it training waited
    "event": {"what": str, "detail": str},
}
MOST_WAITING = 64 << 20  # bytes
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FLOAT = Rule("must be a number", lambda x: isinstance(x, float) or (type(x) is int and abs(x) < LIMIT))
_RULES = {int: WHOLE, str: TEXT, bool: FLAG, float: _FLOAT, float | None: or_null(_FLOAT), int | None: or_null(WHOLE)}


class Lines:
    """Appends to a text file. Lines that a full disk refuses wait in memory, with one warning, until it is taken.

    fresh: the file is emptied first. Raises Error when MOST_WAITING bytes wait.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self._path, self._waiting = path, b""
        self._fd = no_follow(str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if fresh else 0))
        size = os.fstat(self._fd).st_size
        # A line cut short by a crash must not swallow the next one.
        self._prefix = b"\n" if size and os.pread(self._fd, 1, size - 1) != b"\n" else b""

    def append(self, text: str) -> None:
        """Append lines, in one write() so that those of two processes never interleave."""
        waited = bool(self._waiting)
        self._waiting += self._prefix + text.encode()
        self._prefix = b""
        reason = self._flush()
        if len(self._waiting) > MOST_WAITING:
            raise Error(f"{self._path} cannot be written ({reason}): fix that and resume the run.")
        if self._waiting and not waited:
            log.warning("%s cannot be written (%s); its lines wait in memory until it can.", self._path, reason)

    def _flush(self) -> str:
        """Write what the disk takes; the reason why it does not take all."""
        try:
            self._waiting = self._waiting[os.write(self._fd, self._waiting) :]
        except OSError as error:
            return error.strerror or str(error)
        return os.strerror(errno.ENOSPC)

    def sync(self) -> None:
        """All that was written so far is on the disk."""
        fsync(self._fd)

    def close(self) -> None:
        """Write what waits, or say that it is lost."""
        self._flush()
        os.close(self._fd)
        if self._waiting:
            log.warning("%s: its last %d bytes could not be written.", self._path, len(self._waiting))


class MetricsWriter(Lines):
    """Appends one JSON object a line. JSON has no NaN or infinity: they are the strings of NON_FINITE."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # called with each record
        self._clock = clock

    def write(self, kind: str, step: int, tokens: int, **fields: Any) -> None:
        """Append a record with exactly the fields of FIELDS[kind]."""
        record = {"v": VERSION, "kind": kind, "step": step, "tokens": tokens, "t": float(self._clock()), **fields}
        expected = COMMON | FIELDS[kind]
        assert record.keys() == expected.keys(), f"{kind}: {record.keys() ^ expected.keys()}"
        assert not (said := misfit(record, {key: _RULES[spec] for key, spec in expected.items()})), f"{kind}: {said}"
        bad = {k: json.dumps(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        self.append(json.dumps(record | bad, separators=(",", ":"), allow_nan=False) + "\n")
        for listener in self.listeners:
            listener(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records in step order, non-finite floats restored.

    A resumed run repeats steps: of each (kind, step, task) the last record counts, and nothing beyond the step at
    which a later attempt started; events are also told apart by `what`. Lines that are no records (cut short by a
    crash) are left out, with a warning unless it is the last; of many the first few are named. Pictures are told apart
    by `path`.
    """
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    lines, bad = path.read_bytes().split(b"\n"), 0
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = decode_record(line)
            key = (record["kind"], record["step"], record.get("task", record.get("what", record.get("path"))))
            if record["kind"] == "run":  # a start from this step: what an abandoned attempt said beyond it is void
                latest = {k: r for k, r in latest.items() if r["step"] <= key[1]}
            latest.pop(key, None)  # so that the order within a step is the order of the last records
            latest[key] = record
        except ValueError as error:
            bad += number < len(lines)
            if number < len(lines) and bad <= NAMED:
                log.warning("%s line %d is not a metrics record (%s); it is left out.", path, number, error)
    if bad > NAMED:
        log.warning("%s: lines that are no metrics records either: %d more; they are left out.", path, bad - NAMED)
    return sorted(latest.values(), key=lambda record: record["step"])


def decode_record(line: bytes) -> dict[str, Any]:
    """The record in a line of metrics.jsonl, non-finite floats restored. ValueError names a key of another type than
    FIELDS says, or one that is missing; null may be left out. Of a kind that FIELDS lacks, all keys are returned."""
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if type(record) is not dict or type(kind := record.get("kind")) is not str:
        raise ValueError("it is no object with a kind")
    found: dict[str, Any] = {} if kind in FIELDS else record
    for key, spec in (COMMON | FIELDS.get(kind, {})).items():
        rule, value = _RULES[spec], record.get(key)
        if rule.text.startswith(_FLOAT.text) and type(value) is str:
            value = NON_FINITE.get(value, value)
        if not rule.holds(value):
            raise ValueError(misfit(value, rule, key))
        found[key] = value
    return found


class MainLog(Lines):
    """llm.c's main.log, byte for byte: its plotting tools read it."""

    def val(self, step: int, loss: float) -> None:
        """Validation loss after `step` updates."""
        self.append(f"s:{step} tel:{loss:.4f}\n")

    def eval(self, step: int, accuracy: float) -> None:
        """HellaSwag accuracy (a fraction) after `step` updates."""
        self.append(f"s:{step} eval:{accuracy:.4f}\n")

    def train(self, step: int, loss: float, lr: float, norm: float) -> None:
        """The update number step + 1: llm.c counts it from 0 here."""
        self.append(f"s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}\n")


def step_line(step: int, steps: int, v: Mapping[str, Any]) -> str:
    """llm.c's console line plus memory and time left; what is unknown is left out. `step` counts from 1; `v`: fields of
    a step's record (FIELDS), and its precision."""
    known = {key: v[key] for key in ("loss_z", "norm_z") if v[key] is not None and not math.isnan(v[key])}
    z = {key: f" ({known[key]:+.2f}z)" if key in known else " " for key in ("loss_z", "norm_z")}
    used = "" if v["mfu"] is None else f"{100 * v['mfu']:.1f}% {v['precision']} MFU | "
    left = "" if v["eta_s"] is None else f" | ETA {format_duration(v['eta_s'])}"
    return (
        f"step {step:4d}/{steps} | loss {v['loss']:7.6f}{z['loss_z']}| norm {v['norm']:6.4f}{z['norm_z']}| "
        f"lr {v['lr']:.2e} | {v['ms']:.2f} ms | {used}{v['tok_s']:.0f} tok/s | {v['mem_mib']} MiB{left}"
    )
