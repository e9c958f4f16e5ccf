"""Value embeddings (Zhou et al. 2024) with nanochat's gates: a second embedding of the token, added to its values.

For head h of a token with embedding u:  v_h += g_h u_h,  g_h = 3 sigmoid(s_h),  s_h = w_h . y[:12], where y is the norm
of the stream, y = x rstd. Only what RMSNorm kept is needed, so its output may be gone, or in another format.

Backward, with ds_h = (dv_h . u_h) g_h (1 - g_h / 3):  du_h = g_h dv_h,  dy[:12] += sum_h ds_h w_h,
dw_h = sum over tokens of ds_h y[:12].
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks, widen

GATE = 3.0  # of which a gate is a part


def _temps(heads: Tensor, w: Tensor) -> Temps:
    """A chunk of tokens: two of all heads, u before it is wider, gates, the norm's channels, and the weight."""
    (n, NH, HS), acc = heads.shape, acc_dtype(heads.dtype)
    rows = chunk_rows(n, NH * HS)
    wide = [((rows, NH, HS), acc)] * 2
    return [*wide, ((rows, NH * HS), heads.dtype), ((rows, NH), acc), ((rows, w.shape[1]), acc), (tuple(w.shape), acc)]


def _gates(g: Tensor, y: Tensor, x: Tensor, rstd: Tensor, w: Tensor) -> Tensor:
    """g (r, NH) of rows of the stream; y (r, 12) becomes the norm's first channels."""
    torch.mul(y.copy_(x[:, : y.shape[1]]), rstd[:, None], out=y)
    return torch.mm(y, w.t(), out=g).sigmoid_().mul_(GATE)


def forward_temps(v: Tensor, tokens: Tensor, table: Tensor, x: Tensor, rstd: Tensor, w: Tensor, **_: object) -> Temps:
    return _temps(v, w)


@op("v", temps=forward_temps, adds=("v",))
def value_forward(
    v: Tensor, tokens: Tensor, table: Tensor, x: Tensor, rstd: Tensor, w: Tensor, *, scratch: Scratch
) -> None:
    """v (n, NH, HS), whose tokens may lie apart, += gates * table (Vp, NH HS)[tokens (n) int64].

    x (n, C) and rstd (n): the stream, and what its RMSNorm kept. w (NH, 12)."""
    u_, v_, row_, g_, y_, w_ = scratch(forward_temps(v, tokens, table, x, rstd, w))
    w = widen(w, w_)
    for rows in row_chunks(len(v), v[0].numel()):
        u, wide, looked, g, y = (t[: len(v[rows])] for t in (u_, v_, row_, g_, y_))
        torch.index_select(table, 0, tokens[rows], out=looked)
        _gates(g, y, x[rows], rstd[rows], w)
        v[rows].copy_(wide.copy_(v[rows]).addcmul_(u.copy_(looked.view(u.shape)), g[..., None]))


def backward_temps(
    du: Tensor, dy: Tensor, dw: Tensor | None, dv: Tensor, tokens: Tensor, table: Tensor, x: Tensor, rstd: Tensor,
    w: Tensor, **_: object,
) -> Temps:  # fmt: skip
    acc = acc_dtype(dv.dtype)
    rows = chunk_rows(len(dv), dv[0].numel())
    return [*[((rows, w.shape[0]), acc)] * 2, ((rows, w.shape[1]), acc), *[(tuple(w.shape), acc)] * 2, *_temps(dv, w)]


@op("du", "dy", "dw", temps=backward_temps, adds=("dy", "dw"))
def value_backward(
    du: Tensor, dy: Tensor, dw: Tensor | None, dv: Tensor, tokens: Tensor, table: Tensor, x: Tensor, rstd: Tensor,
    w: Tensor, *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """du (n, NH HS) and dw (NH, 12), if wanted, from dv (n, NH, HS); adds to the first 12 columns of dy (n, C).

    du is the gradient of table[tokens]: `embedding_backward` adds it up. `accumulate` adds to dw."""
    ds_, tmp_, dy_, total, part, u_, dv_, row_, g_, y_, w_ = scratch(
        backward_temps(du, dy, dw, dv, tokens, table, x, rstd, w)
    )
    w, G = widen(w, w_), w.shape[1]
    total.zero_()
    for rows in row_chunks(len(dv), dv[0].numel()):
        ds, tmp, sums, u, d, looked, g, y = (t[: len(dv[rows])] for t in (ds_, tmp_, dy_, u_, dv_, row_, g_, y_))
        torch.index_select(table, 0, tokens[rows], out=looked)
        _gates(g, y, x[rows], rstd[rows], w)
        d.copy_(dv[rows])
        torch.sum(u.copy_(looked.view(u.shape)).mul_(d), 2, out=ds)
        du[rows].view(d.shape).copy_(d.mul_(g[..., None]))
        ds.mul_(g).mul_(torch.div(g, -GATE, out=tmp).add_(1))
        total.add_(torch.mm(ds.t(), y, out=part))
        dy[rows, :G].copy_(torch.mm(ds, w, out=sums).add_(widen(dy[rows, :G], y)))
    if dw is not None:
        dw.copy_(total.add_(widen(dw, part)) if accumulate else total)
