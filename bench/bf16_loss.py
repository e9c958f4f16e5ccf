"""Losses in bf16 beside those in fp32 (TF32 off): the same weights, batches and schedule.

    python bench/bf16_loss.py FOLDER d12 [--steps 300] [--runs /tmp/bf16_loss] [--batch.B 32 --schedule.warmup 100 ...]

FOLDER holds train.bin and val.bin (token shards of real text). Two runs of `daybreak train`, side by side. Prints the
means of every 50 steps, and the largest gradient norm in them: where norms leap, training is at the edge of stability,
small differences grow there, and what is compared is luck.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

BLOCK = 50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=Path, default=Path("/tmp/bf16_loss"))
    a, more = parser.parse_known_args()
    a.runs.mkdir(parents=True, exist_ok=True)
    base = ["--data.train", a.folder / "train.bin", "--data.val", a.folder / "val.bin", "--data.tokenizer", "gpt2",
            "--run.steps", a.steps, "--run.dir", a.runs, "--eval.every", 0, "--checkpoint.every", 0,
            "--precision.tf32", "false"]  # fmt: skip
    lines: dict[str, list[dict[str, float]]] = {}
    running = {}
    for name in ("fp32", "bf16"):
        words = ["train", a.model, *base, "--run.name", name, "--precision.compute", name, *more]
        with (a.runs / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "daybreak", *map(str, words)]
            running[name] = subprocess.Popen(command, stdout=log, stderr=log)
    for name, process in running.items():
        if process.wait():
            sys.exit(f"{name} ended with {process.returncode}:\n" + (a.runs / f"{name}.log").read_text()[-2000:])
        found = map(json.loads, (a.runs / name / "metrics.jsonl").read_text().splitlines())
        lines[name] = [line for line in found if line["kind"] == "step"]
    for start in range(0, a.steps, BLOCK):
        blocks = [lines[name][start : start + BLOCK] for name in ("fp32", "bf16")]
        fp32, bf16 = (sum(line["loss"] for line in block) / len(block) for block in blocks)
        norms = " and ".join(f"{max(line['norm'] for line in block):.2f}" for block in blocks)
        print(f"steps {start + 1:>3} to {start + len(blocks[0]):>3}: fp32 {fp32:.5f}, bf16 {bf16:.5f}, "
              f"{bf16 / fp32 - 1:+.3%}; largest norms {norms}")  # fmt: skip


if __name__ == "__main__":
    main()
