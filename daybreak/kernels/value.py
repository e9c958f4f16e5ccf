"""Value embeddings (Zhou et al. 2024) with nanochat's gates: a second embedding of the token, added to its values.

For head h of a token with embedding u:  v_h += g_h u_h,  g_h = 3 sigmoid(s_h),  s_h = w_h . y[:12], where y is the norm
of the stream, y = (a x + b x0) rstd (kernels/mix.py). Only what the norm kept is needed, so its output may be gone, or
in another format.

Backward, with ds_h = (dv_h . u_h) g_h (1 - g_h / 3):  du_h = g_h dv_h,  dy[:12] += sum_h ds_h w_h,
dw_h = sum over tokens of ds_h y[:12].
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks, widen

GATE = 3.0  # of which a gate is a part


def _temps(heads: Tensor, w: Tensor) -> Temps:
    """A chunk of tokens: two of all heads, u before it is wider, gates, twice the norm's channels, the two scalars of
    the stream, and the weight."""
    (n, NH, HS), acc = heads.shape, acc_dtype(heads.dtype)
    rows = chunk_rows(n, NH * HS)
    wide, some = [((rows, NH, HS), acc)] * 2, [((rows, w.shape[1]), acc)] * 2
    return [*wide, ((rows, NH * HS), heads.dtype), ((rows, NH), acc), *some, *[((1,), acc)] * 2, (tuple(w.shape), acc)]


def _gates(
    g: Tensor, y: Tensor, t: Tensor, x: Tensor, x0: Tensor, rstd: Tensor, a: Tensor, b: Tensor, w: Tensor
) -> Tensor:
    """g (r, NH) of rows of the stream a x + b x0; y (r, 12) becomes the norm's first channels."""
    G = w.shape[1]
    y.copy_(x[:, :G]).mul_(a).add_(t.copy_(x0[:, :G]).mul_(b)).mul_(rstd[:, None])
    return torch.mm(y, w.t(), out=g).sigmoid_().mul_(GATE)


def forward_temps(v: Tensor, tokens: Tensor, table: Tensor, w: Tensor, *_: object) -> Temps:
    return _temps(v, w)


@op("v", temps=forward_temps, adds=("v",))
def value_forward(
    v: Tensor, tokens: Tensor, table: Tensor, w: Tensor, x: Tensor, x0: Tensor, rstd: Tensor, a: Tensor, b: Tensor,
    *, scratch: Scratch,
) -> None:  # fmt: skip
    """v (n, NH, HS), whose tokens may lie apart, += gates * table (Vp, NH HS)[tokens (n) int64]. w (NH, 12).

    x, x0 (n, C), a, b (1) and rstd (n): the parts of the stream, and what its norm kept."""
    u_, v_, row_, g_, y_, t_, a_, b_, w_ = scratch(forward_temps(v, tokens, table, w))
    w, a, b = widen(w, w_), widen(a, a_), widen(b, b_)
    for rows in row_chunks(len(v), v[0].numel()):
        u, wide, looked, g, y, t = (z[: len(v[rows])] for z in (u_, v_, row_, g_, y_, t_))
        torch.index_select(table, 0, tokens[rows], out=looked)
        _gates(g, y, t, x[rows], x0[rows], rstd[rows], a, b, w)
        v[rows].copy_(wide.copy_(v[rows]).addcmul_(u.copy_(looked.view(u.shape)), g[..., None]))


def backward_temps(
    du: Tensor, dy: Tensor, dw: Tensor | None, dv: Tensor, tokens: Tensor, table: Tensor, w: Tensor,
    *_: object, **__: object,
) -> Temps:  # fmt: skip
    acc = acc_dtype(dv.dtype)
    rows = chunk_rows(len(dv), dv[0].numel())
    return [*[((rows, w.shape[0]), acc)] * 2, ((rows, w.shape[1]), acc), *[(tuple(w.shape), acc)] * 2, *_temps(dv, w)]


@op("du", "dy", "dw", temps=backward_temps, adds=("dy", "dw"))
def value_backward(
    du: Tensor, dy: Tensor, dw: Tensor | None, dv: Tensor, tokens: Tensor, table: Tensor, w: Tensor,
    x: Tensor, x0: Tensor, rstd: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """du (n, NH HS) and dw (NH, 12), if wanted, from dv (n, NH, HS); adds to the first 12 columns of dy (n, C).

    du is the gradient of table[tokens]: `embedding_backward` adds it up. `accumulate` adds to dw."""
    ds_, tmp_, dy_, total, part, u_, dv_, row_, g_, y_, t_, a_, b_, w_ = scratch(
        backward_temps(du, dy, dw, dv, tokens, table, w)
    )
    w, a, b, G = widen(w, w_), widen(a, a_), widen(b, b_), w.shape[1]
    total.zero_()
    for rows in row_chunks(len(dv), dv[0].numel()):
        ds, tmp, sums, u, d, looked, g, y, t = (z[: len(dv[rows])] for z in (ds_, tmp_, dy_, u_, dv_, row_, g_, y_, t_))
        torch.index_select(table, 0, tokens[rows], out=looked)
        _gates(g, y, t, x[rows], x0[rows], rstd[rows], a, b, w)
        d.copy_(dv[rows])
        torch.sum(u.copy_(looked.view(u.shape)).mul_(d), 2, out=ds)
        du[rows].view(d.shape).copy_(d.mul_(g[..., None]))
        ds.mul_(g).mul_(torch.div(g, -GATE, out=tmp).add_(1))
        total.add_(torch.mm(ds.t(), y, out=part))
        dy[rows, :G].copy_(torch.mm(ds, w, out=sums).add_(widen(dy[rows, :G], t)))
    if dw is not None:
        dw.copy_(total.add_(widen(dw, part)) if accumulate else total)
