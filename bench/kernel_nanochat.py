"""Cases of what only nanochat's family has: squared ReLU, the mixed stream and its norms, queries
and keys that are turned and normed, smear, value embeddings, the soft-cap."""

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


def _scalar() -> torch.Tensor:
    """A learned scalar, as kernels read it."""
    return rand(1, dtype=torch.float32)


def _mix(n: int, C: int) -> list[Case]:
    """The norms before a block's two halves, and the last one; back, added to the gradient of the first embedding; the
    sums beside them."""
    size = n * C * 2

    def forward(stored: bool = False, scaled: bool = True) -> Callable[[], None]:
        res, a = rand(n, C) if stored else None, _scalar() if scaled else None
        rest = (rand(n, C), rand(n, dtype=torch.float32), rand(n, C), rand(n, C), a, _scalar())
        return launch("mix_norm_forward", "triton", res, *rest, eps=1e-6)

    def backward(again: bool = False) -> Callable[[], None]:
        d, rewrite, rstd = rand(n, C), rand(n, C) if again else None, rand(n, dtype=torch.float32).abs()
        outs, stream = (d, rand(n, C), rand(1), rand(1), rewrite), (rand(n, C), rand(n, C), rstd, _scalar(), _scalar())
        return launch(
            "mix_norm_backward", "triton", *outs, d, rand(n, C), *stream, accumulate_dy=True, accumulate=False
        )

    def added() -> Callable[[], None]:
        d, more, stream = rand(n, C), rand(n, C, dtype=torch.float32), (rand(n, C), rand(n, C))
        outs, rstd = (d, rand(n, C), rand(1), rand(1), None), rand(n, dtype=torch.float32).abs()
        given = (*outs, d, rand(n, C), *stream, rstd, _scalar(), _scalar(), more)
        return launch("mix_norm_backward", "triton", *given, accumulate_dy=True, accumulate=False)

    def backout() -> Callable[[], None]:
        outs, rstd = (rand(n, C), rand(n, C, dtype=torch.float32), rand(1)), rand(n, dtype=torch.float32).abs()
        given = (*outs, rand(n, C), rand(n, C), rand(n, C), rstd, _scalar())
        return launch("mix_backward", "triton", *given, factor=-1.0, accumulate=False)

    def add() -> Callable[[], None]:
        d = rand(n, C)
        return launch("mix_add", "triton", d, d, rand(n, C))

    return [
        Case("mix_norm_forward", "triton", 3 * size, 0, forward, note="ln1"),
        Case("mix_norm_forward", "triton", 5 * size, 0, partial(forward, stored=True), note="residual2 and ln2"),
        Case(
            "mix_norm_forward",
            "triton",
            5 * size,
            0,
            partial(forward, stored=True, scaled=False),
            note="backed and lnf",
        ),
        Case("mix_norm_backward", "triton", 7 * size, 0, backward),
        Case("mix_norm_backward", "triton", 8 * size, 0, partial(backward, again=True), note="again"),
        Case("mix_norm_backward", "triton", 9 * size, 0, added, note="and backout's part"),
        Case("mix_backward", "triton", 6 * size, 0, backout),
        Case("mix_add", "triton", 3 * size, 0, add),
    ]


def _heads(B: int, T: int, C: int, NH: int) -> list[Case]:
    """Queries and keys of a packed qkv, turned and normed; and the gradient, in place."""
    n, HS = B * T, C // NH

    def given() -> tuple[torch.Tensor, torch.Tensor]:
        return rand(n, 3 * NH, HS)[:, : 2 * NH], rand(HS // 2, dtype=torch.float32).abs()

    def forward() -> Callable[[], None]:
        return launch("rope_norm_forward", "triton", rand(n, 2 * NH, HS), *given(), T=T, eps=1e-6)

    def backward() -> Callable[[], None]:
        return launch("rope_norm_backward", "triton", rand(n, 3 * NH, HS)[:, : 2 * NH], *given(), T=T, eps=1e-6)

    return [
        Case("rope_norm_forward", "triton", 4 * n * C * 2, 0, forward),
        Case("rope_norm_backward", "triton", 6 * n * C * 2, 0, backward),
    ]


def _smear(B: int, T: int, C: int, NH: int) -> list[Case]:
    def forward() -> Callable[[], None]:
        return launch("smear_forward", "triton", rand(B, T, C), rand(B, T, C), rand(24), _scalar())

    def backward() -> Callable[[], None]:
        tensors = (rand(B, T, C), rand(24), rand(1), rand(B, T, C), rand(B, T, C), rand(24), _scalar())
        return launch("smear_backward", "triton", *tensors, accumulate=False)

    def decode() -> Callable[[], None]:
        cache, place = rand(1, NH, T, C // NH), torch.tensor([T - 1], device=DEVICE)
        return launch("smear_decode", "triton", rand(1, C), cache, rand(1, C), rand(24), _scalar(), place)

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
        stream = (rand(n, C), rand(n, C), rand(n, dtype=torch.float32).abs(), _scalar(), _scalar())
        return tokens, rand(Vp, C), rand(NH, 12), *stream

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
        *_heads(B, T, C, NH),
        *_smear(B, T, C, NH),
        *_value(n, C, NH, Vp),
        _softcap(min(n, 64), Vp),
    ]
