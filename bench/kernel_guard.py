"""The case of the guard's decision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DEVICE, Case, launch, rand

from daybreak.kernels.guard import STATS, WINDOW

F64 = torch.float64


def _step_guard() -> Case:
    def make() -> Callable[[], None]:
        stats, windows = rand(len(STATS), dtype=F64), rand(2, WINDOW, dtype=F64)
        counts = torch.full((2,), WINDOW, device=DEVICE)
        loss, norm = rand(dtype=F64), rand(dtype=F64)
        limits = {"clip": 1.0, "max_loss_z": 5.0, "max_norm_z": 5.0}
        return launch("step_guard", "triton", stats, windows, counts, loss, norm, **limits)

    nbytes = 2 * WINDOW * 8 + len(STATS) * 8 + 2 * 2 * 8 + 4 * 8
    return Case("step_guard", "triton", nbytes, 0, make, "scalars of one step: a few microseconds")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """One decision; no shape changes it."""
    return [_step_guard()]
