"""Cases of NF4: the matrices of a block, unpacked into bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DEVICE, Case, launch, rand

from daybreak.kernels.nf4 import packed_parts


def _unpack(O: int, I: int, backend: str) -> Case:
    def make() -> Callable[[], None]:
        parts = [torch.zeros(shape, dtype=dtype, device=DEVICE) for shape, dtype in packed_parts("w", (O, I), (O,))]
        for part in parts:
            part.random_(256) if part.dtype == torch.uint8 else part.uniform_(0.01, 0.1)
        return launch("nf4_unpack", backend, rand(O, I), *parts, rows=(O,))

    return Case("nf4_unpack", backend, O * I * 5 // 2 + O * I // 64, 0, make, note=f"{O} x {I}")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """A wide and a narrow matrix, of a decoder whose MLP has four times the width."""
    return [_unpack(O, I, "triton") for O, I in ((8 * C, C), (C, 4 * C), (C, C))]
