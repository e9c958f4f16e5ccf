"""Cases of Muon's update: the widest matrix of a block, and batches of a block's matmuls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DEVICE, Case, launch, rand

from daybreak.optimizers.muon import BATCH

GOAL = "the goal is 70 % of the rate of one large matmul"


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Element-wise parts of one matrix, tall and wide; and the three matmuls of a step, square and wide."""
    found = []
    for r, c in ((4 * C, C), (C, 4 * C)):
        note, size = f"{r}x{c}", r * c
        found += [
            Case("muon_momentum", "triton", 12 * size, 0, _momentum(r, c), note=note),
            Case("muon_sums", "triton", 2 * size, 0, _sums(r, c), note=note),
            Case("muon_update", "triton", 10 * size, 0, _update(r, c), note=f"{note}, split masters"),
        ]
    for c in (C, 4 * C):
        n = max(1, BATCH // (C * c))
        for name, sizes in (("X X'", (C, c, C)), ("G G + G", (C, C, C)), ("H X + X", (C, C, c))):
            flops = 2 * n * sizes[0] * sizes[1] * sizes[2]
            note = f"{n} of {C}x{c}: {name}"
            found.append(Case("matmul_batched", "cublaslt", 0, flops, _product(n, name, c, C), GOAL, note))
    return found


def _scalars() -> tuple[torch.Tensor, torch.Tensor]:
    made = ([0, 0, 0.5, 0, 0, 0], [1e-2, 100, 1, 0.95, 1])
    stats, hyper = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in made)
    return stats, hyper


def _momentum(r: int, c: int) -> Callable[[], Callable[[], None]]:
    def make() -> Callable[[], None]:
        x, momentum, grads = rand(r, c), rand(r, c, dtype=torch.float32), rand(r, c)
        return launch("muon_momentum", "triton", x, momentum, grads, *_scalars())

    return make


def _sums(r: int, c: int) -> Callable[[], Callable[[], None]]:
    def make() -> Callable[[], None]:
        return launch("muon_sums", "triton", rand(1, max(r, c), dtype=torch.float32), rand(1, r, c))

    return make


def _update(r: int, c: int) -> Callable[[], Callable[[], None]]:
    def make() -> Callable[[], None]:
        weights, masters = rand(r * c), rand(r * c).view(torch.int16).random_(-(2**15), 2**15)
        second, sums = (torch.empty(max(r, c), device=DEVICE).uniform_() for _ in range(2))
        options = {"beta2": 0.95, "weight_decay": 0.1, "seed": 42, "offset": 0}
        return launch("muon_update", "triton", weights, masters, second, sums, rand(r, c), *_scalars(), **options)

    return make


def _product(n: int, name: str, c: int, C: int) -> Callable[[], Callable[[], None]]:
    def make() -> Callable[[], None]:
        if name == "X X'":
            x = rand(n, C, c)
            return launch("matmul_batched", "cublaslt", rand(n, C, C), x, x.mT)
        if name == "G G + G":
            g = rand(n, C, C)
            return launch("matmul_batched", "cublaslt", rand(n, C, C), g, g, g, alpha=0.5, beta=-2.8)
        x = rand(n, C, c)
        return launch("matmul_batched", "cublaslt", rand(n, C, c), rand(n, C, C), x, x, beta=4.0)

    return make
