"""Run by test_dist_engine in every rank: every ZeRO stage in this world, one engine after the other.

Each trains on the same 12 samples a step; the results go to OUT/WORLD-ZERO-COMPUTE-RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine
from daybreak.parallel import connect
from daybreak.shapes import GPT2Config

SAMPLES, T, V = 12, 8, 61
SHAPE = GPT2Config(L=2, C=24, NH=2, max_T=12, V=V)  # rows that are no multiples of 128


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, V, (SAMPLES, T + 1), generator=torch.Generator().manual_seed(step))


def gradients(engine: Engine) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Of each tensor, the parts whose sum over all ranks is here: (first element, values)."""
    plan = engine.comm.plan
    if not plan.zero:
        return {name: [(0, engine.grad(name).flatten().clone())] for name in engine.table.rows}
    return {
        name: [(where.start, engine.state["shard"][at].clone()) for where, at in plan.within(name, plan.shards())]
        for name in engine.table.rows
    }


def train(group, zero: int, compute: str, steps: int, B: int, masters: str = "auto", bucket: int = 16384) -> dict:
    engine = Engine(
        SHAPE, B=B, T=T, compute=compute, seed=3, optim=OptimConfig(clip=0.5), masters=masters, group=group, zero=zero,
        bucket_bytes=bucket,
    )  # fmt: skip
    mine = SAMPLES // group.world
    losses, norms, first, record, grads = [], [], {}, [], {}
    for step in range(steps):
        rows = batch(step)[group.rank * mine : (group.rank + 1) * mine].view(-1, B, T + 1)
        engine.begin_step(lr=3e-3, step=step, valid=SAMPLES * T)
        for i, part in enumerate(rows):
            engine.micro_step(part[:, :-1], part[:, 1:], first=i == 0, last=i == len(rows) - 1)
        engine.update()
        losses.append(engine.stats()["loss"])
        norms.append(engine.stats()["norm"])
        if step == 0:
            first = {name: grad for name, _, grad in engine.norms()}
            grads = gradients(engine)
        if step == 1:
            record = [(e.what, e.bucket, e.sent) for e in engine.comm.record]
        engine.comm.record.clear()
    engine.finish()
    volume = engine.arena.sharding.volume(engine.frame.dtype, mine // B)
    plan = engine.arena.sharding
    return {
        "losses": losses, "norms": norms, "first": first, "record": record, "volume": volume, "numel": plan.numel,
        "weights": {name: engine.param(name).clone() for name in engine.names()}, "nbytes": engine.arena.nbytes,
        "buckets": [(b.start, b.stop, b.moment) for b in plan.buckets],
        "calls": engine.call_list(), "grads": grads,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    out, jobs = Path(sys.argv[1]), [job.split(",") for job in sys.argv[2:]]
    group = connect(os.environ, 60)
    for zero, compute, steps, B, masters in jobs:
        result = train(group, int(zero), compute, int(steps), int(B), masters)
        torch.save(result, out / f"{group.world}-{zero}-{compute}-{masters}-{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    main()
