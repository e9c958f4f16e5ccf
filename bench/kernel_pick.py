"""Cases of picked rows, for which the head computes losses: half of the rows, in spans as chats have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DEVICE, Case, launch, rand
from torch import Tensor

SPAN = 64  # rows of a question, and of an answer


def _places(n: int) -> Tensor:
    """at (n) int32: rows of answers come first."""
    learned = torch.arange(n) // SPAN % 2 == 1
    others = learned.sum() + (~learned).cumsum(0) - 1
    return torch.where(learned, learned.cumsum(0) - 1, others).to(DEVICE, torch.int32)


def _forward(n: int, r: int, C: int) -> Case:
    def make() -> Callable[[], None]:
        targets, picked = torch.arange(n, device=DEVICE), torch.empty(r, dtype=torch.int64, device=DEVICE)
        return launch("pick_forward", "triton", rand(r, C), picked, rand(n, C), targets, _places(n))

    return Case("pick_forward", "triton", 2 * r * (C * 2 + 8) + n * 4, 0, make, note="half of the rows")


def _backward(n: int, r: int, C: int) -> Case:
    def make() -> Callable[[], None]:
        return launch("pick_backward", "triton", rand(n, C), rand(r, C), _places(n))

    return Case("pick_backward", "triton", (n + r) * C * 2 + n * 4, 0, make, note="half of the rows")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Forward, and backward, which also writes the zeros of the rows that are left out."""
    n, r = B * T, B * T // 2
    return [_forward(n, r, C), _backward(n, r, C)]
