"""Cases of the classifier and of the sum of losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DEVICE, Case, launch, rand

F32, F64 = torch.float32, torch.float64
CHUNK = 8192  # rows of logits that the engine keeps
PADDING = 47  # columns that GPT-2's vocabulary is padded by


def _classifier(n: int, Vp: int, *, backward: bool) -> Case:
    rows, V = min(n, CHUNK), Vp - PADDING

    def make() -> Callable[[], None]:
        logits, losses = rand(rows, Vp, scale=3.0), rand(rows, dtype=F32)
        targets = torch.randint(V, (rows,), device=DEVICE)
        # 1: the gradients of one launch are the logits of the next, which should not sink to zero
        scale = torch.ones((), dtype=F64, device=DEVICE)
        return launch("classifier", "triton", losses, logits, targets, scale, V=V, backward=backward)

    nbytes = (2 if backward else 1) * rows * Vp * 2 + rows * (8 + 4)
    return Case("classifier", "triton", nbytes, 0, make, note="with gradient" if backward else "losses only")


def _loss_sum(n: int) -> Case:
    def make() -> Callable[[], None]:
        total = torch.zeros((), dtype=F64, device=DEVICE)
        scale = torch.full((), 1 / n, dtype=F64, device=DEVICE)
        return launch("loss_sum", "triton", total, rand(n, dtype=F32), scale, accumulate=True)

    return Case("loss_sum", "triton", n * 4 + 24, 0, make, "one number from one program: a few microseconds")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """A chunk of logits with and without its gradient, and the losses of a micro-step."""
    n = B * T
    return [_classifier(n, Vp, backward=True), _classifier(n, Vp, backward=False), _loss_sum(n)]
