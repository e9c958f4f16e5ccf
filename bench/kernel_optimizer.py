"""Cases of the global norm and of AdamW over all parameters of a GPT-2: every layout of masters, and bf16 moments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DEVICE, Case, launch, rand

LAYERS = {768: 12, 1024: 24, 1280: 36, 1600: 48}  # of GPT-2's sizes, by width
OPTIONS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "seed": 42, "offset": 0}
# Bytes that an element moves: the gradient is read, all else read and written, weights beside fp32 masters written.
LAYOUTS = {"fp32 masters": 2 + 2 + 3 * 8, "split masters": 2 + 2 * 4 + 2 * 8, "no masters": 2 + 4 + 2 * 8}
LAYOUTS |= {"no masters, bf16 moments": 2 + 4 + 2 * 4}


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """One norm and one update of every layout, with bf16 gradients and weights. Two sets of a layout take 50 GB."""
    N = LAYERS.get(C, 12) * (12 * C * C + 13 * C) + (Vp + T + 2) * C
    N = -(-N // 128) * 128
    updates = [
        Case("adamw_update", "triton", nbytes * N, 0, _update(N, layout), note=layout)
        for layout, nbytes in LAYOUTS.items()
    ]
    return [Case("global_norm", "triton", 2 * N, 0, _norm(N)), *updates]


def _norm(N: int) -> Callable[[], Callable[[], None]]:
    return lambda: launch("global_norm", "triton", torch.zeros((), dtype=torch.float64, device=DEVICE), rand(N))


def _update(N: int, layout: str) -> Callable[[], Callable[[], None]]:
    def make() -> Callable[[], None]:
        weights, grads = rand(N), rand(N)
        m = rand(N, dtype=torch.bfloat16 if "bf16 moments" in layout else torch.float32)
        v = torch.empty_like(m).uniform_()
        masters = None if layout.startswith("no masters") else torch.empty_like(weights if layout[0] == "s" else m)
        if layout == "fp32 masters" and masters is not None:
            masters.copy_(weights)
        elif masters is not None:
            masters = masters.view(torch.int16).random_(-(2**15), 2**15)
        stats = torch.tensor([0, 0, 0.5, 0, 0, 0], dtype=torch.float64, device=DEVICE)
        hyper = torch.tensor([1e-4, 100, 1, 1 - 0.9**100, 1 - 0.95**100], dtype=torch.float64, device=DEVICE)
        return launch("adamw_update", "triton", weights, masters, m, v, grads, stats, hyper, **OPTIONS)

    return make
