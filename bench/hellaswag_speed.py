"""In-loop HellaSwag on GPT-2 124M with random weights: seconds for 10,042 examples of HellaSwag's lengths.

Lengths are drawn (context about 75 tokens, endings about 27), since the set is not shipped; the work is the same.

    python bench/hellaswag_speed.py [--examples 10042] [--B 64] [--device cuda]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from daybreak.engine import Engine, EngineSpec
from daybreak.evaluate.multiple_choice import Example, accuracy
from daybreak.shapes import parse_shape


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=10_042)
    parser.add_argument("--B", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args()
    rng = np.random.default_rng(0)

    def ids(mean: float) -> list[int]:
        return [int(t) for t in rng.integers(0, 50257, 1 + rng.poisson(rng.gamma(6, mean / 6)))]

    examples = [Example(ids(75), [ids(27) for _ in range(4)], int(rng.integers(4))) for _ in range(a.examples)]
    compute = "bf16" if a.device.startswith("cuda") else "fp32"
    engine = Engine(EngineSpec(parse_shape("d12"), B=a.B, T=1024, compute=compute, train=False), device=a.device)
    accuracy(engine, examples[:256])  # warm up
    for _ in range(3):
        began = time.perf_counter()
        found = accuracy(engine, examples)
        seconds = time.perf_counter() - began
        print(f"{found.examples} examples, {4 * found.examples} rows in batches of {a.B}, {compute}: {seconds:.2f} s")
    print(torch.cuda.get_device_name() if a.device.startswith("cuda") else "cpu", torch.__version__)


if __name__ == "__main__":
    main()
