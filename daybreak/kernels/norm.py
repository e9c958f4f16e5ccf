"""LayerNorm (Ba, Kiros, Hinton 2016), and RMSNorm (Zhang, Sennrich 2019).

For a row x of C values:  xhat = (x - mean) rstd,  rstd = 1 / sqrt(var + 1e-5),  y = xhat w + b.
Backward, with g = dy w:  dx = rstd (g - mean(g) - xhat mean(g xhat)),  dw = sum dy xhat,  db = sum dy.
RMSNorm has neither mean nor b:  rstd = 1 / sqrt(mean(x^2) + eps),  xhat = x rstd,  dx = rstd (g - xhat mean(g xhat)).
Gemma's has 1 + w in the place of w, so that weights start at 0.
Statistics are two-pass and kept in fp32 (fp64 for fp64), whatever the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks, widen

EPS = 1e-5


def forward_temps(out: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, *_: object) -> Temps:
    n, C = x.shape
    rows, acc = chunk_rows(n, C), acc_dtype(x.dtype)
    return [((rows, C), acc), ((rows, C), acc), ((rows, 1), acc), ((C,), acc), ((C,), acc)]


@op("out", "mean", "rstd", temps=forward_temps)
def layernorm_forward(
    out: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, w: Tensor, b: Tensor, *, scratch: Scratch
) -> None:
    """out (n, C) = layernorm(x (n, C)) * w (C) + b (C); mean, rstd (n) in fp32 or wider are kept for backward."""
    centred, square, var, w_, b_ = scratch(forward_temps(out, mean, rstd, x))
    w, b = widen(w, w_), widen(b, b_)
    for rows in row_chunks(*x.shape):
        m, r = mean[rows, None], rstd[rows, None]
        n = m.shape[0]
        xc, sq, v = centred[:n], square[:n], var[:n]
        xc.copy_(x[rows])
        torch.mean(xc, 1, keepdim=True, out=m)
        xc.sub_(m)
        torch.mul(xc, xc, out=sq)
        torch.mean(sq, 1, keepdim=True, out=v)
        torch.rsqrt(v.add_(EPS), out=r)
        out[rows].copy_(xc.mul_(r).mul_(w).add_(b))


def backward_temps(
    dx: Tensor, dw: Tensor | None, db: Tensor | None, dbias: Tensor | None, again: Tensor | None, dout: Tensor,
    *_: object, **__: object,
) -> Temps:  # fmt: skip
    n, C = dout.shape
    rows, acc = chunk_rows(n, C), acc_dtype(dout.dtype)
    return [*[((rows, C), acc)] * 3, *[((rows, 1), acc)] * 2, *[((C,), acc)] * 6]


@op("dx", "dw", "db", "dbias", "again", temps=backward_temps, adds=("dx", "dw", "db", "dbias"))
def layernorm_backward(
    dx: Tensor, dw: Tensor | None, db: Tensor | None, dbias: Tensor | None, again: Tensor | None,
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor,
    *, accumulate_dx: bool, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of layernorm: dx (n, C), dw (C), db (C) from dout (n, C), and what the same pass gets for free.

    `accumulate_dx` adds into dx (the residual stream's gradient), `accumulate` adds into dw, db, dbias (micro-steps).
    dbias (C) = column sums of the resulting dx before it is rounded: the bias gradient of the linear layer that was
    added to the stream below this layernorm. dw, db and dbias may be None, where nobody wants them. again (n, C) = the
    layernorm's output once more (recomputation).
    """
    xhat_, g_, tmp_, c1_, c2_, dw_acc, db_acc, dbias_acc, part, w_, b_ = scratch(
        backward_temps(dx, dw, db, dbias, again, dout)
    )
    w, b = widen(w, w_), widen(b, b_)
    totals = [(dw, dw_acc), (db, db_acc), (dbias, dbias_acc)]
    for _, total in totals:
        total.zero_()
    for rows in row_chunks(*x.shape):
        n = x[rows].shape[0]
        xhat, g, tmp, c1, c2 = xhat_[:n], g_[:n], tmp_[:n], c1_[:n], c2_[:n]
        r = rstd[rows, None]
        xhat.copy_(x[rows]).sub_(mean[rows, None]).mul_(r)
        if again is not None:
            again[rows].copy_(torch.mul(xhat, w, out=tmp).add_(b))
        g.copy_(dout[rows])
        db_acc.add_(torch.sum(g, 0, out=part))
        torch.mul(g, xhat, out=tmp)
        dw_acc.add_(torch.sum(tmp, 0, out=part))
        g.mul_(w)
        torch.mean(g, 1, keepdim=True, out=c1)
        torch.mul(g, xhat, out=tmp)
        torch.mean(tmp, 1, keepdim=True, out=c2)
        g.sub_(c1).sub_(xhat.mul_(c2)).mul_(r)
        if accumulate_dx:
            g.add_(widen(dx[rows], tmp))
        if dbias is not None:
            dbias_acc.add_(torch.sum(g, 0, out=part))
        dx[rows].copy_(g)
    for grad, total in totals:
        if grad is not None:
            if accumulate:
                total.add_(widen(grad, part))
            grad.copy_(total)


def rms_temps(out: Tensor, rstd: Tensor, x: Tensor, *_: object, **__: object) -> Temps:
    (n, *inner), C, acc = x.shape[:-1], x.shape[-1], acc_dtype(x.dtype)
    rows = chunk_rows(n, x[0].numel())
    return [*[((rows, *inner, C), acc)] * 2, ((C,), acc)]


def _weight(weight: Tensor, offset: float, buffer: Tensor) -> Tensor:
    """offset + weight, in the buffer's dtype."""
    return buffer.copy_(weight).add_(offset) if offset else widen(weight, buffer)


@op("out", "rstd", temps=rms_temps)
def rmsnorm_forward(
    out: Tensor, rstd: Tensor, x: Tensor, weight: Tensor,
    *, eps: float, offset: float = 0.0, add: Tensor | None = None, scratch: Scratch,
) -> None:  # fmt: skip
    """out = x / sqrt(mean(x^2) + eps) * (offset + weight (C)) + add over the last dimension of x, rounded once.

    x and out: (n, C), or (n, heads, C), and strided if need be. add: (n, C), with rows (n, C) only. rstd, one for each
    row, in fp32 or wider, is kept for backward.
    """
    x_, square, w_ = scratch(rms_temps(out, rstd, x))
    w, rstd = _weight(weight, offset, w_), rstd.view(*x.shape[:-1], 1)
    for rows in row_chunks(x.shape[0], x[0].numel()):
        r = rstd[rows]
        xf, sq = x_[: len(r)], square[: len(r)]
        torch.mul(xf.copy_(x[rows]), xf, out=sq)
        torch.mean(sq, -1, keepdim=True, out=r)
        torch.rsqrt(r.add_(eps), out=r)
        y = xf.mul_(r).mul_(w)
        out[rows].copy_(y if add is None else y.add_(widen(add[rows], sq)))


def rms_backward_temps(
    dx: Tensor, dweight: Tensor | None, rewrite: Tensor | None, dout: Tensor, *_: object, **__: object
) -> Temps:
    (n, *inner), C, acc = dout.shape[:-1], dout.shape[-1], acc_dtype(dout.dtype)
    rows = chunk_rows(n, dout[0].numel())
    return [*[((rows, *inner, C), acc)] * 3, ((rows, *inner, 1), acc), *[((C,), acc)] * 3]


@op("dx", "dweight", "rewrite", temps=rms_backward_temps, adds=("dx", "dweight"))
def rmsnorm_backward(
    dx: Tensor, dweight: Tensor | None, rewrite: Tensor | None, dout: Tensor, x: Tensor, rstd: Tensor, weight: Tensor,
    *, accumulate_dx: bool, accumulate: bool, offset: float = 0.0, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of RMSNorm: dx like x, and dweight (C) summed over all rows, if wanted. dx may be dout.

    `accumulate_dx` adds into dx, `accumulate` into dweight. rewrite = the output once more, if wanted, without `add`.
    """
    xhat_, g_, tmp_, c_, total, part, w_ = scratch(rms_backward_temps(dx, dweight, rewrite, dout))
    w, rstd, C = _weight(weight, offset, w_), rstd.view(*x.shape[:-1], 1), x.shape[-1]
    total.zero_()
    for rows in row_chunks(x.shape[0], x[0].numel()):
        r = rstd[rows]
        xhat, g, tmp, c = (buffer[: len(r)] for buffer in (xhat_, g_, tmp_, c_))
        xhat.copy_(x[rows]).mul_(r)
        if rewrite is not None:
            rewrite[rows].copy_(torch.mul(xhat, w, out=tmp))
        torch.mul(g.copy_(dout[rows]), xhat, out=tmp)
        total.add_(torch.sum(tmp.view(-1, C), 0, out=part))
        torch.mul(g.mul_(w), xhat, out=tmp)
        torch.mean(tmp, -1, keepdim=True, out=c)
        g.sub_(xhat.mul_(c)).mul_(r)
        if accumulate_dx:
            g.add_(widen(dx[rows], tmp))
        dx[rows].copy_(g)
    if dweight is not None:
        dweight.copy_(total.add_(widen(dweight, part)) if accumulate else total)
