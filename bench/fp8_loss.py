"""Losses in fp8 beside bf16, and beside bf16 with another micro-batch as the control: one CSV of runs, and a verdict.

    python bench/fp8_loss.py BF16 CONTROL FP8 [--out losses.csv]
    python bench/fp8_loss.py bench/results/fp8_loss_h200.csv      the verdict on a CSV that it wrote

Each run is a finished run's folder, or its metrics.jsonl. All three start from the same weights and see the same
samples; the control differs in the order of rounding alone, which a change of batch.B makes. The rule: at the end, fp8
is away from bf16 by no more than 0.005, or twice as far as the control is, if that is more. It holds for the means of
the last tenth of training losses, and for the last validation loss. The exit code is 1 where it does not.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

LEAST = 0.005  # nats
NAMES = ("bf16", "control", "fp8")


def losses(run: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Training and validation losses of a run, by step."""
    found: dict[str, dict[int, float]] = {"step": {}, "val": {}}
    for line in (run / "metrics.jsonl" if run.is_dir() else run).read_text().splitlines():
        record = json.loads(line)
        if record["kind"] in found:
            found[record["kind"]][record["step"]] = record["loss"]
    return found["step"], found["val"]


def written(table: Path) -> list[tuple[dict[int, float], dict[int, float]]]:
    """The same of the three runs in a CSV that this script wrote."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [[f"{name} {kind}" for kind in ("training", "validation")] for name in NAMES]
    of = {key: {int(r["step"]): float(r[key]) for r in rows if r[key]} for pair in columns for key in pair}
    return [(of[train], of[val]) for train, val in columns]


def gaps(bf16: float, control: float, fp8: float) -> tuple[float, float, float]:
    """How far the control and fp8 are from bf16, and how far fp8 may be."""
    return abs(control - bf16), abs(fp8 - bf16), max(LEAST, 2 * abs(control - bf16))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if len(a.runs) not in (1, len(NAMES)):
        parser.error("give three runs (bf16, control, fp8), or one CSV that this script wrote")
    train, val = zip(*(written(a.runs[0]) if len(a.runs) == 1 else map(losses, a.runs)), strict=True)
    if len({tuple(of) for of in train}) > 1 or len({max(of) for of in val}) > 1:
        sys.exit("The runs have different steps, so they cannot be compared: " + ", ".join(map(str, a.runs)))
    if a.out:
        with a.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *(f"{name} {kind}" for kind in ("training", "validation") for name in NAMES)])
            for step in sorted({*train[0], *val[0]}):
                writer.writerow([step, *(f"{of[step]:.6f}" if step in of else "" for of in (*train, *val))])
    last = sorted(train[0])[-max(1, len(train[0]) // 10) :]
    ends = {f"mean training loss of the last {len(last)} steps": [statistics.mean(of[s] for s in last) for of in train]}
    ends["last validation loss"] = [of[max(of)] for of in val]
    good = True
    for what, (bf16, control, fp8) in ends.items():
        other, ours, most = gaps(bf16, control, fp8)
        good &= ours <= most
        print(f"{what}: bf16 {bf16:.4f}, control {control:.4f} ({other:.4f} away), fp8 {fp8:.4f} ({ours:.4f} away, "
              f"at most {most:.4f}): {'holds' if ours <= most else 'DOES NOT HOLD'}")  # fmt: skip
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
