"""Cases of what only nanochat's family has: squared ReLU, mixed streams, smear, value embeddings, the soft-cap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import DECODE, DEVICE, PRODUCT, Case, launch, rand


def _relu(n: int, F: int) -> list[Case]:
    def forward() -> Callable[[], None]:
        return launch("relu2_forward", "triton", rand(n, F), rand(n, F))

    def backward() -> Callable[[], None]:
        return launch("relu2_backward", "triton", rand(n, F), rand(n, F), rand(n, F))

    return [
        Case("relu2_forward", "triton", 2 * n * F * 2, 0, forward),
        Case("relu2_backward", "triton", 4 * n * F * 2, 0, backward, note="again"),
    ]


def _products(n: int, C: int, F: int) -> list[Case]:
    """The matmuls that have the squared ReLU inside, in turns with those that have it behind them."""
    found = []
    for backend in ("quack", "cublaslt"):

        def forward(backend: str = backend) -> Callable[[], None]:
            w = rand(F, C, scale=C**-0.5)
            return launch("matmul_relu2_forward", backend, rand(n, F), rand(n, F), rand(n, C), w)

        def backward(again: bool, backend: str = backend) -> Callable[[], None]:
            rewrite, w = rand(n, F) if again else None, rand(C, F, scale=C**-0.5)
            return launch("matmul_relu2_backward", backend, rand(n, F), rewrite, rand(n, C), w, rand(n, F))

        nbytes, flops = 2 * (n * (2 * F + C) + F * C), 2 * n * F * C
        found.append(Case("matmul_relu2_forward", backend, nbytes, flops, forward, PRODUCT))
        for again in (False, True):
            nbytes, make = 2 * (n * ((2 + again) * F + C) + F * C), partial(backward, again)
            found.append(Case("matmul_relu2_backward", backend, nbytes, flops, make, PRODUCT, "again" if again else ""))
    return found


def _mix(n: int, C: int) -> list[Case]:
    """Before a block, and back: in place, added to the gradient of the first embedding."""

    def forward() -> Callable[[], None]:
        return launch("mix_forward", "triton", rand(n, C), rand(n, C), rand(n, C), rand(1), rand(1))

    def backward() -> Callable[[], None]:
        d, rest = rand(n, C), (rand(n, C), rand(n, C), rand(1), rand(1))
        how = {"accumulate_dy": True, "accumulate": False}
        return launch("mix_backward", "triton", d, rand(n, C), rand(1), rand(1), d, *rest, **how)

    return [
        Case("mix_forward", "triton", 3 * n * C * 2, 0, forward),
        Case("mix_backward", "triton", 6 * n * C * 2, 0, backward),
    ]


def _smear(B: int, T: int, C: int, NH: int) -> list[Case]:
    def forward() -> Callable[[], None]:
        return launch("smear_forward", "triton", rand(B, T, C), rand(B, T, C), rand(24), rand(1))

    def backward() -> Callable[[], None]:
        tensors = (rand(B, T, C), rand(24), rand(1), rand(B, T, C), rand(B, T, C), rand(24), rand(1))
        return launch("smear_backward", "triton", *tensors, accumulate=False)

    def decode() -> Callable[[], None]:
        cache, place = rand(1, NH, T, C // NH), torch.tensor([T - 1], device=DEVICE)
        return launch("smear_decode", "triton", rand(1, C), cache, rand(1, C), rand(24), rand(1), place)

    size = B * T * C * 2
    return [
        Case("smear_forward", "triton", 2 * size, 0, forward),
        Case("smear_backward", "triton", 3 * size, 0, backward),
        Case("smear_decode", "triton", 8 * C, 0, decode, DECODE, "one row"),
    ]


def _value(n: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Every token of the batch reads a row of the table of its own, as most do."""

    def given() -> tuple[torch.Tensor, ...]:
        tokens = torch.randint(Vp, (n,), device=DEVICE)
        rstd = rand(n, dtype=torch.float32).abs()
        return tokens, rand(Vp, C), rand(n, C), rstd, rand(NH, 12)

    def forward() -> Callable[[], None]:
        return launch("value_forward", "triton", rand(n, 3 * NH, C // NH)[:, 2 * NH :], *given())

    def backward() -> Callable[[], None]:
        dv = rand(n, 3 * NH, C // NH)[:, 2 * NH :]
        return launch("value_backward", "triton", rand(n, C), rand(n, C), rand(NH, 12), dv, *given(), accumulate=False)

    return [
        Case("value_forward", "triton", 3 * n * C * 2, 0, forward),
        Case("value_backward", "triton", 3 * n * C * 2, 0, backward),
    ]


def _softcap(rows: int, Vp: int) -> Case:
    return Case(
        "cap_logits", "triton", 2 * rows * Vp * 2, 0, lambda: launch("cap_logits", "triton", rand(rows, Vp), cap=15.0)
    )


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """All of them at the shape's sizes."""
    n = B * T
    return [
        *_relu(n, 4 * C),
        *_products(n, C, 4 * C),
        *_mix(n, C),
        *_smear(B, T, C, NH),
        *_value(n, C, NH, Vp),
        _softcap(min(n, 64), Vp),
    ]
