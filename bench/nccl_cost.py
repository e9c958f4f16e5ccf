"""The cost of the exchange for a step of one rank: NCCL, captured in the graphs, beside none at all.

    python bench/nccl_cost.py [d12 --B 16 --micro 8 --rounds 5]

Two engines take turns in one process; medians of all their steps. Gradients are all-reduced in buckets under the last
micro-step's backward, as between ranks.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from daybreak.engine import Engine, EngineSpec
from daybreak.engine.collectives import Collectives
from daybreak.parallel import ALONE, Group
from daybreak.report.bench import time_steps
from daybreak.shapes import parse_shape


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="d12")
    parser.add_argument("--B", type=int, default=16)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    dist, device = torch.distributed, torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    plain = Collectives.__init__
    group = Group()
    group.dist = dist

    def sends(self: Collectives, sharding: object, of: Group = ALONE) -> None:
        plain(self, sharding, of)  # type: ignore[arg-type]
        self.active = of is group

    Collectives.__init__ = sends  # type: ignore[method-assign]
    Collectives.sum_scalars = lambda self, state: None  # type: ignore[method-assign]  # two numbers, with no room here
    engines = [
        Engine(EngineSpec(parse_shape(a.model), B=a.B, T=1024, compute="bf16"), device=device, group=of)
        for of in (ALONE, group)
    ]
    times: list[list[float]] = [[], []]
    for _ in range(a.rounds):
        for engine, of in zip(engines, times, strict=True):
            of += time_steps(engine, a.micro, 2.0)
    alone, nccl = (statistics.median(of) for of in times)
    print(
        f"{a.model} B={a.B}, {a.micro} micro-steps: {1e3 * alone:.2f} ms alone, {1e3 * nccl:.2f} ms through NCCL with "
        f"one rank: {100 * (nccl / alone - 1):+.2f} %, "
        f"{torch.cuda.get_device_name()}"
    )
    engines[1].graphs.clear()  # a communicator does not end while graphs hold its calls
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
