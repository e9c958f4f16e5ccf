"""Writing text on a GPU: milliseconds a token beside the least that reading the weights once takes.

    python bench/decode_speed.py d48 [--texts 1,8] [--tokens 256] [--top-p 0.9] [--out FILE.csv]

Random weights, a prompt of 16 tokens, five times greedy and five times drawn with top-p (column top_p_ms); the median
of all steps from the tenth on, the host's work included.
The limit: every weight that a step reads, over the measured copy rate. An embedding of which a step reads one row does
not count: GPT-2's positions, and token embeddings that are not the head too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from timing import append_row

from daybreak.engine import Engine, EngineSpec
from daybreak.generate import Batch, Sampling, Text
from daybreak.report.bench import limits
from daybreak.shapes import LlamaConfig, parse_shape
from daybreak.shapes.shape import Shape
from daybreak.state.run_folder import package_commit

PROMPT, SKIP, ROUNDS = 16, 10, 5


def looked_up(shape: Shape) -> int:
    """Parameters of embeddings that only give rows."""
    if isinstance(shape, LlamaConfig):
        return 0 if shape.tied else shape.Vp * shape.C
    return shape.max_T * shape.C


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--texts", default="1,8")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    shape, device = parse_shape(a.model), torch.device("cuda", 0)
    bandwidth, _ = limits(device)
    for texts in map(int, a.texts.split(",")):
        engine = Engine(EngineSpec(shape, B=1, T=1024, compute="bf16", train=False, rows=texts), device=device)
        weights = 2 * (engine.num_parameters - looked_up(shape))
        batch, steps = Batch(engine), []
        for how in (Sampling(a.tokens, temperature=0.0), Sampling(a.tokens, top_p=a.top_p)):
            times = list[float]()
            for _ in range(ROUNDS):
                batch.add([Text(range(100 + i, 100 + i + PROMPT), how) for i in range(texts)])
                taken = []
                while batch.texts:
                    began = time.perf_counter()
                    batch.step()
                    taken.append(time.perf_counter() - began)
                times += taken[SKIP:]
            steps.append(statistics.median(times))
        (step, drawn), floor = steps, weights / bandwidth
        row = {
            "model": a.model, "texts": texts, "ms": f"{1e3 * step:.3f}", "floor_ms": f"{1e3 * floor:.3f}",
            "ratio": f"{step / floor:.2f}", "tokens_s": f"{texts / step:.0f}", "copy_tb_s": f"{bandwidth / 1e12:.3f}",
            "card": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
            "commit": package_commit(Path(__file__).parents[1]), "top_p_ms": f"{1e3 * drawn:.3f}",
        }  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in row.items()))
        if a.out:
            append_row(a.out, row)
        del engine, batch


if __name__ == "__main__":
    main()
