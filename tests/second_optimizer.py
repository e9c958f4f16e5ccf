"""A second optimizer, which needs whole matrices, and what ranks that train with it do.

It keeps a momentum, and one value a row: the running mean of the squared gradients there. A step is the momentum over
the root of that, divided by its norm. Every matrix has a norm of its own, and so has each of q, k and v in one weight.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dist_engine import SAMPLES, SHAPE, T, batch
from snapshots import facts

from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.kernels.optimizer import exact, set_exact
from daybreak.models.frame import Frame
from daybreak.models.rows import Row
from daybreak.optimizers import Optimizer, ParamGroup, Part
from daybreak.optimizers.adamw import AdamW
from daybreak.parallel import Group, connect
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import restore, snapshot

STEPS, LR = 3, 3e-3
BETA, SCALE, DECAY = 0.8, 20.0, 0.05  # of the second optimizer's group
WPE_SCALE = 0.5  # and of wpe, which AdamW updates without decay


@dataclass(frozen=True)
class Normalized(Optimizer):
    beta: float
    whole = True
    state = ("momentum", "rows")

    def shape(self, key: str, row: Row) -> tuple[int, ...]:
        return row.shape[:1] if key == "rows" else row.shape

    def scalars(self, t: int) -> tuple[float, ...]:
        return (1.0 - self.beta**t,)

    def update(self, f: Frame, parts: Sequence[Part]) -> None:
        for part in parts:
            kept = [x for x in (part.weights, part.masters, *part.state.values()) if x is not None]
            f.k.do("normalized_update", partial(self._step, part), kept, [*kept, part.grads, part.stats, part.hyper])

    def _step(self, part: Part) -> None:
        if part.stats[3] != 0:
            return
        assert part.row is not None
        lr, _, _, bias = part.hyper.tolist()
        momentum, rows = part.state["momentum"], part.state["rows"]
        g = part.grads.view(part.row.shape).to(momentum.dtype) * part.stats[2]
        momentum.lerp_(g, 1 - self.beta)
        rows.lerp_(g.square().mean(1), 1 - self.beta)
        step = momentum / bias / ((rows / bias).sqrt()[:, None] + 1e-8)
        for matrix in step.split(part.row.stacked or part.row.shape[0]):
            matrix /= matrix.norm()
        p = exact(part.weights, part.masters).view(part.row.shape)
        set_exact(part.weights, part.masters, (p - lr * (step + part.weight_decay * p)).view(-1))


GROUPS = (
    ParamGroup("h.*.[!l]*w", Normalized(BETA), SCALE, DECAY),  # the matrices of blocks: no layernorm
    ParamGroup("wpe", AdamW(0.9, 0.95, 1e-8), WPE_SCALE),
)
# Muon (optimizers/muon.py), whose momentum rises over the first steps.
MUON = OptimConfig(name="muon", lr=LR, muon_lr=0.02, muon_warmup=4, muon_beta2=0.9, muon_weight_decay=0.2)


def train(engine: Engine, group: Group, steps: range) -> list[float]:
    """The losses of these steps, whose samples are the same for any number of ranks."""
    mine, losses = SAMPLES // group.world, []
    for step in steps:
        rows = batch(step)[group.rank * mine : (group.rank + 1) * mine].view(-1, engine.B, T + 1)
        engine.train_step(rows[..., :-1], rows[..., 1:], lr=LR, step=step)
        losses.append(engine.stats()["loss"])
    engine.finish()
    return losses


def build(group: Group, zero: int, **options: Any) -> Engine:
    options = {"compute": "fp64", "bucket_bytes": 1 << 15, "groups": GROUPS, **options}
    spec = EngineSpec(SHAPE, B=6 // group.world, T=T, zero=zero, **options)
    return Engine(spec, seed=3, group=group)


def ranks_train(args: list[str]) -> int:
    """STEPS steps at stages 1 and 2, from the start or from what other ranks have saved. args: OUT, the first step,
    and "muon" for Muon instead."""
    out, first = Path(args[0]), int(args[1])
    options: dict[str, Any] = {"groups": (), "optim": MUON} if args[2:] == ["muon"] else {}
    group = connect(os.environ, 60)
    for zero in (1, 2):
        engine = build(group, zero, **options)
        if first:
            restore(engine, load_checkpoint(out / f"stage{zero}" / f"step-{first:08d}"))
        losses = train(engine, group, range(first, first + STEPS))
        save_checkpoint(out / f"stage{zero}", snapshot(engine, first + STEPS, facts(engine)), group)
        weights = {name: engine.param(name).clone() for name in engine.names()}
        torch.save((losses, weights), out / f"{group.world}-{zero}-{group.rank}.pt")
    group.close()
    return 0
