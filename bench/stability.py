"""Runs at learning rates that are too high, with QK-norm, soft-cap and z-loss or without: one CSV, a row for each run.

    python bench/stability.py OUT.csv [--runs FOLDER] [--steps 300]

Small models of three families train in fp32 on the standard library's text, at a constant rate without warm-up,
clipping and weight decay. Rows that OUT.csv has already are not measured again. A run takes half a minute.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import daybreak
from daybreak.config import Config

BASE: dict[str, Any] = {
    "model.L": 4, "model.C": 128, "model.NH": 4, "model.max_T": 128, "model.V": 1025, "data.name": "stdlib",
    "data.tokenizer": "gpt2-1024", "batch.B": 4, "optim.weight_decay": 0.0, "optim.clip": 0.0,
    "schedule.name": "constant", "schedule.warmup": 0, "eval.every": 0, "eval.tokens": 16384,
    "eval.sample_tokens": 0, "checkpoint.every": 0, "log.every": 100000, "precision.compute": "fp32",
}  # fmt: skip
LLAMA = {"model.arch": "llama", "model.NKV": 4, "model.HS": 32, "model.F": 344}
WEAK, Z_LOSS = {"optim.z_loss": 1e-4}, {"optim.z_loss": 1e-2}  # as published, and a hundred times as strong
QK_NORM, NO_CAP = {"model.qk_norm": True}, {"model.softcap": 1e6}
GRID: list[tuple[str, float, dict[str, Any], dict[str, dict[str, Any]]]] = [  # family, rate, its keys, variants
    (
        "llama", 0.3, LLAMA,
        {"none": {}, "qk-norm": QK_NORM, "z-loss 1e-4": WEAK, "z-loss 1e-2": Z_LOSS,
         "qk-norm, z-loss 1e-2": QK_NORM | Z_LOSS},
    ),
    ("llama", 0.4, LLAMA, {"none": {}, "qk-norm": QK_NORM}),
    ("llama", 0.5, LLAMA, {"none": {}, "qk-norm": QK_NORM}),
    ("gpt2", 0.3, {}, {"none": {}, "z-loss 1e-4": WEAK, "z-loss 1e-2": Z_LOSS}),
    (
        "nanochat", 0.3, {"model.arch": "nanochat"},  # which always has QK-norm
        {"none": NO_CAP, "soft-cap": {}, "z-loss 1e-2": NO_CAP | Z_LOSS, "soft-cap, z-loss 1e-2": Z_LOSS},
    ),
]  # fmt: skip
SEEDS = (1, 2)
COLUMNS = ("family", "lr", "variant", "seed", "steps", "highest after 20", "last 50", "validation")


def cases() -> Iterator[tuple[str, float, str, int, dict[str, Any]]]:
    """Family, rate, variant, seed, and the keys of each run."""
    for family, lr, own, variants in GRID:
        for variant, keys in variants.items():
            for seed in SEEDS:
                yield family, lr, variant, seed, BASE | own | keys | {"optim.lr": lr, "run.seed": seed}


def measure(keys: dict[str, Any], folder: Path, name: str, steps: int) -> tuple[str, str, str]:
    """The highest training loss after step 20, the mean of the last 50, and the validation loss at the end."""
    torch.set_num_threads(1)
    run = daybreak.train(Config().override(keys | {"run.dir": str(folder), "run.name": name, "run.steps": steps}))
    losses = [r["loss"] for r in run.metrics("step")]
    found = max(losses[20:]), statistics.fmean(losses[-50:]), run.metrics("val")[-1]["loss"]
    return tuple(f"{x:.4f}" for x in found)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"))
    parser.add_argument("--steps", type=int, default=300)
    a = parser.parse_args()
    logging.getLogger("daybreak").setLevel(logging.ERROR)
    rows = list(csv.reader(a.out.open(newline="")))[1:] if a.out.exists() else []
    for family, lr, variant, seed, keys in cases():
        case = [family, f"{lr:g}", variant, str(seed), str(a.steps)]
        if case in (row[: len(case)] for row in rows):
            continue
        rows.append([*case, *measure(keys, a.runs, "-".join(case).replace(",", "").replace(" ", "_"), a.steps)])
        print(*rows[-1], flush=True)
        with a.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
