"""The residual stream of nanochat: sums of streams with learned scalars, and the norms of such sums.

A block begins with m = a x + b y, where x is the stream, y is what it started as, and a and b are one number each. Only
the norm of m and, after attention, m + attention's output are wanted. So m itself is never rounded and never stored:
each kernel that needs it computes it from x and y in fp32 (fp64 for fp64). Rounding m to bf16
would lose most of a small attention output. In one small model it was 0.0003 of the stream after step 3.

Backward of out = m r, r = 1 / sqrt(mean(m^2) + eps), and d the gradient of m from its other uses:
xhat = m r,  d_m = d + r (dout - xhat mean(dout xhat)),  dx = a d_m,  dy += b d_m,  da = sum d_m x,  db = sum d_m y.

Backout's part of the stream's gradient comes from the last norm, and is added to dx many layers below. Both are rounded
once, there. Rounded before, it decided the signs of step 1's gradients of the scalars, which are 0 but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks, widen


def _one(a: Tensor | None, buffer: Tensor) -> Tensor:
    """The scalar in the buffer's dtype; 1 if there is none."""
    return buffer.fill_(1) if a is None else buffer.copy_(a)


def mix_norm_temps(res: Tensor | None, out: Tensor, rstd: Tensor, x: Tensor, *_: object, **__: object) -> Temps:
    (n, C), acc = x.shape, acc_dtype(x.dtype)
    return [*[((chunk_rows(n, C), C), acc)] * 2, *[((1,), acc)] * 2]


@op("res", "out", "rstd", temps=mix_norm_temps, adds=("res",))
def mix_norm_forward(
    res: Tensor | None, out: Tensor, rstd: Tensor, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor,
    *, eps: float, factor: float = 1.0, scratch: Scratch,
) -> None:  # fmt: skip
    """out (n, C) = the RMSNorm, without a weight, of a x (n, C) + factor b y (n, C). a, b (1): an a of None is 1. rstd
    (n), in fp32 or wider, is kept for backward.

    res (n, C), if given, is added, and becomes the sum, rounded once. out is then the norm of res as it is stored,
    because backward reads that too."""
    x_, y_, a_, b_ = scratch(mix_norm_temps(res, out, rstd, x))
    a_, b_ = _one(a, a_), _one(b, b_).mul_(factor)
    for rows in row_chunks(*x.shape):
        r = rstd[rows, None]
        m, t = (z[: len(r)] for z in (x_, y_))
        m.copy_(x[rows]).mul_(a_).add_(t.copy_(y[rows]).mul_(b_))
        if res is not None:
            res[rows].copy_(m.add_(widen(res[rows], t)))
            m.copy_(res[rows])
        torch.mean(torch.mul(m, m, out=t), 1, keepdim=True, out=r)
        torch.rsqrt(r.add_(eps), out=r)
        out[rows].copy_(m.mul_(r))


def mix_norm_backward_temps(
    dx: Tensor, dy: Tensor, da: Tensor | None, db: Tensor | None, rewrite: Tensor | None, d: Tensor,
    *_: object, **__: object,
) -> Temps:  # fmt: skip
    (n, C), acc = d.shape, acc_dtype(d.dtype)
    rows = chunk_rows(n, C)
    return [*[((rows, C), acc)] * 4, ((rows, 1), acc), *[((1,), acc)] * 5, ((), acc)]


@op("dx", "dy", "da", "db", "rewrite", temps=mix_norm_backward_temps, adds=("dy", "da", "db"))
def mix_norm_backward(
    dx: Tensor, dy: Tensor, da: Tensor | None, db: Tensor | None, rewrite: Tensor | None,
    d: Tensor, dout: Tensor, x: Tensor, y: Tensor, rstd: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None,
    *, accumulate_dy: bool, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of m = a x + b y: dx, dy (n, C), and da, db (1) if they are wanted. dout (n, C) is the gradient of m's
    norm, and d (n, C) that of m from elsewhere. dx may be d. add (n, C), if given, is added to dx before it is rounded.

    `accumulate_dy` adds to dy, `accumulate` to da and db. rewrite (n, C) = the norm once more, if it is wanted."""
    m_, g_, t_, z_, c_, a_, b_, sum_a, sum_b, wide, part = scratch(mix_norm_backward_temps(dx, dy, da, db, rewrite, d))
    a_, b_ = _one(a, a_), _one(b, b_)
    sum_a.zero_()
    sum_b.zero_()
    for rows in row_chunks(*dout.shape):
        r = rstd[rows, None]
        m, g, t, z, c = (buffer[: len(r)] for buffer in (m_, g_, t_, z_, c_))
        torch.mul(t.copy_(x[rows]), a_, out=m).add_(z.copy_(y[rows]).mul_(b_)).mul_(r)
        if rewrite is not None:
            rewrite[rows].copy_(m)
        torch.mean(torch.mul(g.copy_(dout[rows]), m, out=z), 1, keepdim=True, out=c)
        g.sub_(m.mul_(c)).mul_(r).add_(widen(d[rows], m))
        sum_a.add_(torch.sum(t.mul_(g), (0, 1), out=part))
        sum_b.add_(torch.sum(t.copy_(y[rows]).mul_(g), (0, 1), out=part))
        torch.mul(g, a_, out=t)
        dx[rows].copy_(t if add is None else t.add_(widen(add[rows], z)))
        g.mul_(b_)
        dy[rows].copy_(g.add_(widen(dy[rows], t)) if accumulate_dy else g)
    for grad, total in ((da, sum_a), (db, sum_b)):
        if grad is not None:
            grad.copy_(total.add_(widen(grad, wide)) if accumulate else total)


def mix_add_temps(out: Tensor, *_: object) -> Temps:
    (n, C), acc = out.shape, acc_dtype(out.dtype)
    return [((chunk_rows(n, C), C), acc)] * 2


@op("out", temps=mix_add_temps)
def mix_add(out: Tensor, x: Tensor, y: Tensor, *, scratch: Scratch) -> None:
    """out (n, C) = x (n, C) + y (n, C), rounded once. out may be x or y."""
    x_, y_ = scratch(mix_add_temps(out))
    for rows in row_chunks(*out.shape):
        xf, yf = (t[: len(out[rows])] for t in (x_, y_))
        out[rows].copy_(xf.copy_(x[rows]).add_(yf.copy_(y[rows])))


def mix_backward_temps(dx: Tensor, *_: object, **__: object) -> Temps:
    (n, C), acc = dx.shape, acc_dtype(dx.dtype)
    rows = chunk_rows(n, C)
    return [*[((rows, C), acc)] * 3, ((rows, 1), acc), *[((1,), acc)] * 3, ((), acc)]


@op("dx", "dy", "db", temps=mix_backward_temps, adds=("db",))
def mix_backward(
    dx: Tensor, dy: Tensor, db: Tensor | None, dout: Tensor, x: Tensor, y: Tensor, rstd: Tensor, b: Tensor,
    *, factor: float = 1.0, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of the norm of x (n, C), a stored sum with the term factor b y (n, C): dx, dy = factor b dx and, if it
    is wanted, db (1) = factor sum dx y, where dx is not rounded before. dout (n, C) is the gradient of the norm.

    `accumulate` adds to db."""
    m_, g_, t_, c_, b_, total, wide, part = scratch(mix_backward_temps(dx))
    b_.copy_(b).mul_(factor)
    total.zero_()
    for rows in row_chunks(*dout.shape):
        r = rstd[rows, None]
        m, g, t, c = (buffer[: len(r)] for buffer in (m_, g_, t_, c_))
        m.copy_(x[rows]).mul_(r)
        torch.mean(torch.mul(g.copy_(dout[rows]), m, out=t), 1, keepdim=True, out=c)
        g.sub_(m.mul_(c)).mul_(r)
        dx[rows].copy_(g)
        total.add_(torch.sum(t.copy_(y[rows]).mul_(g), (0, 1), out=part))
        dy[rows].copy_(g.mul_(b_))
    if db is not None:
        total.mul_(factor)
        db.copy_(total.add_(widen(db, wide)) if accumulate else total)
