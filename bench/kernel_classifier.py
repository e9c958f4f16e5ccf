"""Cases of the classifier and of the sum of losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DEVICE, Case, launch, rand

F32, F64 = torch.float32, torch.float64
CHUNK = 8192  # rows of logits that the engine keeps
PADDING = 47  # columns that GPT-2's vocabulary is padded by


def _classifier(n: int, Vp: int, *, backward: bool, z_loss: float = 0.0) -> Case:
    rows, V = min(n, CHUNK), Vp - PADDING

    def make() -> Callable[[], None]:
        logits, losses = rand(rows, Vp, scale=3.0), rand(rows, dtype=F32)
        targets = torch.randint(V, (rows,), device=DEVICE)
        # 1: the gradients of one launch are the logits of the next, which should not sink to zero
        scale = torch.ones((), dtype=F64, device=DEVICE)
        how = {"z_loss": z_loss} if z_loss else {}
        return launch("classifier", "triton", losses, logits, targets, scale, V=V, backward=backward, **how)

    nbytes = (2 if backward else 1) * rows * Vp * 2 + rows * (8 + 4)
    note = "with gradient and z-loss" if z_loss else "with gradient" if backward else "losses only"
    return Case("classifier", "triton", nbytes, 0, make, note=note)


def _loss_sum(n: int) -> Case:
    def make() -> Callable[[], None]:
        total = torch.zeros((), dtype=F64, device=DEVICE)
        scale = torch.full((), 1 / n, dtype=F64, device=DEVICE)
        return launch("loss_sum", "triton", total, rand(n, dtype=F32), scale, accumulate=True)

    return Case("loss_sum", "triton", n * 4 + 24, 0, make, "one number from one program: a few microseconds")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """A chunk of logits with its gradient, also with a z-loss, and without; and the losses of a micro-step."""
    n = B * T
    z_loss = _classifier(n, Vp, backward=True, z_loss=1e-4)
    return [_classifier(n, Vp, backward=True), z_loss, _classifier(n, Vp, backward=False), _loss_sum(n)]
