"""Choosing the next token: milliseconds beside sorting the whole vocabulary, up to V = 262,144.

    python bench/sampling_speed.py [--device cuda] [--vocab 50257,262144] [--texts 1,8] [--out FILE.csv]

Random logits, flat (spread 2, where top-p keeps a quarter of the vocabulary) and peaked (spread 4), as text has them.
All ways take turns; medians of `--rounds` calls, the copy of the ids to the host included.
It prints nothing unless the tokens of 200 random numbers are those that the sorted definition gives.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import cpu_name
from timing import append_row

from daybreak.generate import Sampling, choose
from daybreak.state.run_folder import package_commit

WAYS = {
    "greedy": Sampling(temperature=0.0), "temperature": Sampling(), "top_k 50": Sampling(top_k=50),
    "top_p 0.9": Sampling(top_p=0.9), "both": Sampling(top_k=1000, top_p=0.95),
}  # fmt: skip


def sorted_top_p(logits: Any, draw: float) -> Any:
    """Top-p 0.9 by its definition: everything sorted, ties by id."""
    x = torch.as_tensor(logits).double()
    p, ids = (x - x.amax(-1, keepdim=True)).exp().sort(dim=-1, descending=True, stable=True)
    p = torch.where(p.cumsum(-1) - p < 0.9 * p.sum(-1, keepdim=True), p, 0)
    ends = torch.zeros_like(p).scatter_(-1, ids, p).cumsum(-1)
    return torch.searchsorted(ends, draw * ends[:, -1:], right=True)[:, 0]


def measure(logits: Any, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    b, on_gpu = len(logits), isinstance(logits, torch.Tensor)

    def ours(how: Sampling, draw: float = 0.3) -> Any:
        return choose(logits, [how] * b, [draw] * b)

    for draw in np.random.default_rng(1).random(200 // b):
        if ours(WAYS["top_p 0.9"], draw).tolist() != sorted_top_p(logits, draw).tolist():
            sys.exit(f"no figures: other tokens than the sorted definition's at V = {logits.shape[1]}, draw {draw}")
    calls = {name: partial(ours, how) for name, how in WAYS.items()}
    calls["top_p 0.9, all sorted"] = partial(sorted_top_p, logits, 0.3)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if on_gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            call().tolist()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocab", default="50257,262144")
    parser.add_argument("--texts", default="1,8")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    for V, b, spread in product(map(int, a.vocab.split(",")), map(int, a.texts.split(",")), (2, 4)):
        logits: Any = (np.random.default_rng(0).normal(size=(b, V)) * spread).astype(np.float32)
        if a.device != "cpu":
            logits = torch.from_numpy(logits).to(a.device)
        for name, ms in measure(logits, a.rounds).items():
            row = {
                "V": V, "texts": b, "spread": spread, "way": name, "ms": f"{ms:.3f}",
                "device": cpu_name() if a.device == "cpu" else torch.cuda.get_device_name(), "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"), "commit": package_commit(Path(__file__).parents[1]),
            }  # fmt: skip
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if a.out:
                append_row(a.out, row)


if __name__ == "__main__":
    main()
