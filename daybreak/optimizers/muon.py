"""Muon: the update of a matrix is its momentum, made nearly orthogonal (Jordan et al. 2024).

A matrix is a sum of singular directions, each with a strength. A gradient has a few strong ones and many weak ones.
Muon gives all of them about the same strength, so that rare directions are learned too. No singular value is computed:
a polynomial that is odd in the matrix changes only the strengths, and five in a row bring them near 1. The five come
from Polar Express (Amsel et al. 2025, arXiv 2505.16932). Each is best for the range that the one before it leaves:

    strength        0.002   0.01    0.1     0.3     1          a step is three matmuls of X (r, c), if r <= c:
    after step 1    0.02    0.08    0.79    1.88    1.55           G = X X^T
    after step 3    0.26    1.18    1.41    1.84    1.88           H = b G + c G G
    after step 5    1.14    1.03    1.06    0.98    0.87           X = a X + H X

A tall matrix (r > c) has G and H on its other side: G = X^T X, and X = a X + X H. kernels/muon.py has the rest of an
update, before the steps and after them. The units of one shape go together:

    gradients --muon_momentum--> X (units, r, c) --5 steps, batched--> X --muon_sums, muon_update--> weights

A unit is a matrix, or one of those that lie packed in one parameter: q, k and v are three. The steps are in compute
dtype, and everything else is in fp32 or wider. Buffers are the plan's, and have the bytes of activations, which are
free by then. Embeddings, head, norms and biases stay with AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from daybreak.config_keys import OptimConfig, ScheduleConfig
from daybreak.models.frame import Frame
from daybreak.models.rows import Row
from daybreak.optimizers import Optimizer, ParamGroup, Part

MATRICES = "h.*"  # the blocks' parameters; of these Muon takes those with two dimensions
STEPS = (  # Polar Express: (a, b, c) of x -> a x + b x^3 + c x^5, for strengths from 0.001 on
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
BATCH = 1 << 25  # elements of the units that go together, unless one has more: enough to fill a GPU
FIRST_MOMENTUM = 0.85  # from which it rises to `momentum`


class Unit(NamedTuple):
    """One matrix of a parameter: its first element there, and its first value in the second moment."""

    part: Part
    start: int
    second: int


def units_of(row: Row) -> list[tuple[int, int]]:
    """(rows, columns) of each matrix of a parameter."""
    return [(rows, row.shape[1]) for rows in row.stacked or row.shape[:1]]


@dataclass(frozen=True)
class Muon(Optimizer):
    """Each unit has a momentum, and NorMuon's second moment: a value for each row, or column if these are more.

    Momentum rises over the first `warmup` updates. It falls to `final` between the steps `start` and `stop`; with
    `fades`, weight decay falls to 0 up to `stop`, as half a cosine."""

    momentum: float
    warmup: int
    beta2: float
    final: float = 0.0  # 0: it stays
    start: int = 0
    stop: int = 0  # 0: not known, so nothing falls
    fades: bool = False
    whole = True
    state = ("momentum", "second")

    def takes(self, row: Row) -> bool:
        return len(row.shape) == 2

    def shape(self, key: str, row: Row) -> tuple[int, ...]:
        return row.shape if key == "momentum" else (sum(map(max, units_of(row))),)

    def scalars(self, t: int) -> tuple[float, ...]:
        """The momentum of update t, and a factor of its weight decay."""
        step, mu = t - 1, self.momentum
        if step < self.warmup:
            mu = FIRST_MOMENTUM + (mu - FIRST_MOMENTUM) * (step / self.warmup)
        elif self.final and self.stop > max(self.start, 0) and step > self.start:
            mu += (self.final - mu) * min(1.0, (step - self.start) / (self.stop - self.start))
        decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self.stop))) if self.fades and self.stop else 1.0
        return mu, decay

    def update(self, f: Frame, parts: Sequence[Part]) -> None:
        """Update the units shape after shape, in batches."""
        units: dict[tuple[int, int], list[Unit]] = {}
        for part in parts:
            assert part.row is not None
            shapes = units_of(part.row)
            starts = accumulate((r * c for r, c in shapes), initial=0)
            for shape, start, second in zip(shapes, starts, accumulate(map(max, shapes), initial=0), strict=False):
                units.setdefault(shape, []).append(Unit(part, start, second))
        for (r, c), same in units.items():
            most = max(1, BATCH // (r * c))
            for at in range(0, len(same), most):
                self._update(f, r, c, same[at : at + most])

    def _update(self, f: Frame, r: int, c: int, units: list[Unit]) -> None:
        n, name = len(units), f"muon.{r}x{c}"
        x = f.a(f"{name}.x", n, r, c)
        for unit, out in zip(units, x, strict=True):
            part, here = unit.part, slice(unit.start, unit.start + r * c)
            momentum = part.state["momentum"].view(-1)[here]
            f.k.muon_momentum(out, momentum.view(r, c), part.grads[here].view(r, c), part.stats, part.hyper)
        x = orthogonal(f, name, x)
        sums = f.a(f"{name}.sums", n, max(r, c), dtype=f.acc)
        f.k.muon_sums(sums, x)
        for unit, u, s in zip(units, x, sums, strict=True):
            part, here = unit.part, slice(unit.start, unit.start + r * c)
            weights, masters = part.weights[here], part.masters
            if masters is not None:
                masters = weights if masters is part.weights else masters[here]
            f.k.muon_update(
                weights, masters, part.state["second"][unit.second :][: max(r, c)], s, u, part.stats, part.hyper,
                beta2=self.beta2, weight_decay=part.weight_decay, seed=part.seed, offset=part.offset + unit.start,
            )  # fmt: skip


def orthogonal(f: Frame, name: str, x: Tensor) -> Tensor:
    """For each matrix of x (n, r, c), of norm up to 1: nearly its nearest orthogonal matrix. x is overwritten."""
    n, r, c = x.shape
    small = min(r, c)
    y, g, h = f.a(f"{name}.y", n, r, c), f.a(f"{name}.g", n, small, small), f.a(f"{name}.h", n, small, small)
    product = f.k.matmul_batched
    for first, third, fifth in STEPS:
        left, right = (x, x.mT) if r <= c else (x.mT, x)
        product(g, left, right)
        product(h, g, g, g, alpha=fifth, beta=third)
        product(y, *((h, x) if r <= c else (x, h)), x, beta=first)
        x, y = y, x
    return x


def muon_groups(optim: OptimConfig, schedule: ScheduleConfig) -> tuple[ParamGroup, ...]:
    """The matrices of blocks, if a configuration chooses Muon. They share the schedule of the learning rate."""
    if optim.name != "muon":
        return ()
    muon = Muon(
        optim.muon_momentum, optim.muon_warmup, optim.muon_beta2, optim.muon_final_momentum,
        schedule.decays_from(optim.horizon), optim.horizon, optim.muon_decay_schedule == "cosine",
    )  # fmt: skip
    scale = optim.muon_lr / optim.lr if optim.lr else 0.0
    return (ParamGroup(MATRICES, muon, scale, optim.muon_weight_decay),)
