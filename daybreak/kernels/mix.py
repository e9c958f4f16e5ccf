"""Sums of two streams with learned scalars: out = a x + factor b y, where a and b are one number each.

Before every block nanochat mixes the first embedding into the residual stream so, and before the last norm it takes
away some of the stream of half the depth.

Backward:  dx = a dout,  dy = factor b dout,  da = sum dout x,  db = factor sum dout y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks, widen


def _one(a: Tensor | None, buffer: Tensor) -> Tensor:
    """The scalar in the buffer's dtype; 1 if there is none."""
    return buffer.fill_(1) if a is None else buffer.copy_(a)


def mix_temps(out: Tensor, *_: object, **__: object) -> Temps:
    (n, C), acc = out.shape, acc_dtype(out.dtype)
    return [*[((chunk_rows(n, C), C), acc)] * 2, *[((1,), acc)] * 2]


@op("out", temps=mix_temps)
def mix_forward(
    out: Tensor, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, *, factor: float = 1.0, scratch: Scratch
) -> None:
    """out (n, C) = a x (n, C) + factor b y (n, C), rounded once. out may be x or y. a, b (1): None is 1."""
    x_, y_, a_, b_ = scratch(mix_temps(out))
    a_, b_ = _one(a, a_), _one(b, b_).mul_(factor)
    for rows in row_chunks(*out.shape):
        xf, yf = (t[: len(out[rows])] for t in (x_, y_))
        out[rows].copy_(xf.copy_(x[rows]).mul_(a_).add_(yf.copy_(y[rows]).mul_(b_)))


def mix_backward_temps(
    dx: Tensor | None, dy: Tensor, da: Tensor | None, db: Tensor | None, dout: Tensor, *_: object, **__: object
) -> Temps:
    (n, C), acc = dout.shape, acc_dtype(dout.dtype)
    return [*[((chunk_rows(n, C), C), acc)] * 2, *[((1,), acc)] * 5, ((), acc)]


@op("dx", "dy", "da", "db", temps=mix_backward_temps, adds=("dx", "dy", "da", "db"))
def mix_backward(
    dx: Tensor | None, dy: Tensor, da: Tensor | None, db: Tensor | None, dout: Tensor, x: Tensor | None, y: Tensor,
    a: Tensor | None, b: Tensor | None, *, factor: float = 1.0, accumulate_dy: bool, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of mix_forward from dout (n, C). dx may be dout, or None: nobody wants it. da, db (1) too.

    `accumulate_dy` adds to dy, `accumulate` to da and db. x may be None where da is."""
    d_, t_, a_, b_, sum_a, sum_b, wide, part = scratch(mix_backward_temps(dx, dy, da, db, dout))
    a_, b_ = _one(a, a_), _one(b, b_).mul_(factor)
    sum_a.zero_()
    sum_b.zero_()
    for rows in row_chunks(*dout.shape):
        d, t = (z[: len(dout[rows])] for z in (d_, t_))
        d.copy_(dout[rows])
        if da is not None and x is not None:
            sum_a.add_(torch.sum(t.copy_(x[rows]).mul_(d), (0, 1), out=part))
        if db is not None:
            sum_b.add_(torch.sum(t.copy_(y[rows]).mul_(d), (0, 1), out=part))
        torch.mul(d, b_, out=t)
        if dx is not None:
            dx[rows].copy_(d.mul_(a_))
        dy[rows].copy_(t.add_(widen(dy[rows], d)) if accumulate_dy else t)
    for grad, total in ((da, sum_a), (db, sum_b.mul_(factor))):
        if grad is not None:
            grad.copy_(total.add_(widen(grad, wide)) if accumulate else total)
