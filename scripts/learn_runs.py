"""The runs behind the curves of docs/learn/16-whole-run.md, as one small table.

    daybreak prepare stdlib --tokenizer gpt2-1024
    daybreak prepare few.txt --tokenizer gpt2-1024     # argparse.py and ast.py of Python 3.11, one after the other
    python scripts/learn_runs.py runs bench/results/learn_runs.csv

The second command reads these runs of `daybreak train tiny`, all with --eval.every 100 --eval.tokens 32768:

    good    as it is: a learning rate of 4e-3, 120 steps of warm-up
    slow    --optim.lr 5e-4
    fast    --optim.lr 0.1
    edge    --optim.lr 0.03 --schedule.warmup 0 --optim.clip 0
    few     --data few-gpt2-1024

A row has the mean loss of a run's last 20 steps, the lowest and the highest of them, and the validation loss where
there is one.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import daybreak

RUNS, EVERY = ("good", "slow", "fast", "edge", "few"), 20


def rows(folder: Path, name: str) -> list[dict[str, str | int]]:
    """The rows of one run."""
    run = daybreak.load(folder / name)
    losses = {record["step"]: record["loss"] for record in run.metrics("step")}  # after a restart, the later ones
    validation = {record["step"]: f"{record['loss']:.4f}" for record in run.metrics("val")}
    found: list[dict[str, str | int]] = [{"run": name, "step": 0, "validation": validation[0]}]
    for step in range(EVERY, max(losses) + 1, EVERY):
        part = [losses[i] for i in range(step - EVERY + 1, step + 1)]
        found.append({
            "run": name, "step": step, "mean": f"{sum(part) / EVERY:.4f}", "lowest": f"{min(part):.4f}",
            "highest": f"{max(part):.4f}", "validation": validation.get(step, ""),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    with Path(sys.argv[2]).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "step", "mean", "lowest", "highest", "validation"], lineterminator="\n")
        writer.writeheader()
        for run_name in RUNS:
            writer.writerows(rows(Path(sys.argv[1]), run_name))
