"""Cases of rotary positions: the heads of queries in a packed qkv, and one sequence that decodes a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DECODE, DEVICE, Case, launch, rand


def _rope(B: int, T: int, C: int, NH: int, place: int | None = None) -> Case:
    HS = C // NH

    def make() -> Callable[[], None]:
        heads, freq = rand(B, T, 3 * NH, HS)[:, :, :NH], rand(HS // 2, dtype=torch.float32).abs()
        positions = None if place is None else torch.tensor([place] * B, device=DEVICE)
        return launch("rope", "triton", heads, freq, positions)

    how = {} if place is None else {"exempt": DECODE, "note": "one row"}
    return Case("rope", "triton", 2 * B * T * C * 2, 0, make, **how)


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """A whole batch, and one token."""
    return [_rope(B, T, C, NH), _rope(1, 1, C, NH, T - 1)]
