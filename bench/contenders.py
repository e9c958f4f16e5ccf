"""Contenders on one CPU: each a process of its own, blocked on its pipe while another one works."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Contender:
    """A child process, the script itself with these flags, that answers a line of JSON whenever it is asked.

    Its first line says that it is ready. An answer has the "seconds" that it took.
    """

    def __init__(self, script: str, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contender ended early, with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, question: object) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def interleaved(contenders: dict[str, Contender], question: object, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; every other round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        order = list(contenders.items())
        for name, c in order if i % 2 == 0 else reversed(order):
            seconds[name].append(c.ask(question)["seconds"])
    return seconds


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} .. {high:.3f})"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def commit() -> str:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return git.stdout.strip() or "unknown"


def write(
    path: Path, setting: dict[str, object], results: dict[str, dict[str, list[float]]], what: str = "dtype"
) -> None:
    """One row per measured step, with the setting in every row. what: what the results are of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*setting, what, "contender", "round", "seconds"])
        for dtype, seconds in results.items():
            for name, values in seconds.items():
                rows.writerows([*setting.values(), dtype, name, i, f"{v:.6f}"] for i, v in enumerate(values))
