"""Self-attention without ever storing a T x T matrix in DRAM.

softmax(scale q k^T) v, where query i sees keys lo[i] to i. Causal attention has lo[i] = 0, a window of w tokens has
lo[i] = max(i - w + 1, 0), and in packed documents lo[i] is the place where the document of query i begins.

A block of queries sees all its keys at once, so the softmax is exact and only its log-sum-exp is kept (as in
FlashAttention, Dao et al. 2022, section 3.1). Backward recomputes P = exp(S - lse) block by block:

dv += P^T do,   dP = do v^T,   dS = P (dP - sum(do * o)) * scale,   dq = dS k,   dk += dS^T q

A softcap c > 0 limits scores, as in Gemma 2 (2024, section 2): c tanh(S / c) takes the place of S, and dS is multiplied
by the slope 1 - tanh^2(S / c).

`attention_decode` is the case of one query per row, whose keys and values are kept in a cache from token to token.

q, k, v, out and their gradients are strided views (B, T, heads, HS): slices of a packed qkv are one case. All
arithmetic is in fp32 (fp64 for fp64), on copies with the heads in front.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, op, widen

QUERY_BLOCK = 128  # queries per block: keys beyond a block's last query are not touched
ROWS = 1 << 12  # (head, query) rows of scores held at once, at most: the batch is cut to fit


def _sizes(q: Tensor) -> tuple[int, int]:
    """Queries per block, batch rows per group."""
    B, T, NH, _ = q.shape
    block = min(QUERY_BLOCK, T)  # the group does not depend on T, so a shorter T never needs more scratch
    return block, max(1, min(B, ROWS // (NH * QUERY_BLOCK)))


def _lo_temps(lo: Tensor | None, queries: int, T: int) -> Temps:
    """Places of keys, and which ones queries do not see."""
    return [((T,), torch.int32), ((queries * T,), torch.bool)] if lo is not None else [((0,), torch.int32)] * 2


def forward_temps(out: Tensor, lse: Tensor, q: Tensor, *_: object, lo: Tensor | None = None, **__: object) -> Temps:
    T, NH, HS = q.shape[1:]
    block, group = _sizes(q)
    acc, heads = acc_dtype(q.dtype), group * NH
    return [
        *[((heads * T * HS,), acc)] * 3,
        ((heads * block * T,), acc),
        ((heads * block * HS,), acc),
        *[((heads * block,), acc)] * 2,
        ((block, block), torch.bool),
        *_lo_temps(lo, group * block, T),
    ]


def _heads_first(x: Tensor, buffer: Tensor) -> Tensor:
    """Copy x (b, T, NH, HS) into `buffer` as a contiguous (b * NH, T, HS)."""
    b, T, NH, HS = x.shape
    view = buffer[: x.numel()].view(b, NH, T, HS)
    view.copy_(x.transpose(1, 2))
    return view.view(b * NH, T, HS)


def _scores(
    buffer: Tensor, q: Tensor, k: Tensor, start: int, stop: int, scale: float, mask: Tensor, softcap: float,
    slope: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scaled, masked scores of queries [start, stop) against keys [0, stop). `slope` takes the softcap's."""
    r = stop - start
    S = buffer[: q.shape[0] * r * stop].view(q.shape[0], r, stop)
    torch.baddbmm(S, q[:, start:stop], k[:, :stop].transpose(1, 2), beta=0, alpha=scale, out=S)
    if softcap:
        S.div_(softcap).tanh_()
        if slope is not None:
            torch.mul(S, S, out=slope[: S.numel()].view(S.shape)).neg_().add_(1)
        S.mul_(softcap)
    S[:, :, start:].masked_fill_(mask[:r, :r], -math.inf)
    return S


def _hide(S: Tensor, lo: Tensor, places: Tensor, buffer: Tensor) -> None:
    """Mask keys before lo (b, r) in scores S (b NH, r, keys)."""
    (b, r), k = lo.shape, S.shape[2]
    hidden = buffer[: b * r * k].view(b, 1, r, k)
    torch.lt(torch.arange(k, out=places[:k]), lo[:, None, :, None], out=hidden)
    S.view(b, -1, r, k).masked_fill_(hidden, -math.inf)


@op("out", "lse", temps=forward_temps)
def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    *, scale: float, lo: Tensor | None = None, softcap: float = 0.0, scratch: Scratch,
) -> None:  # fmt: skip
    """out (B, T, NH, HS) = attention; lse (B, NH, T) in fp32 or wider is kept for backward.

    lo (B, T) int32: the first key that each query sees, at most its own place; causal if not given. softcap: 0 = none.
    """
    B, T, NH, HS = q.shape
    block, group = _sizes(q)
    qh_, kh_, vh_, s_, o_, m_, l_, mask, places, hidden = scratch(forward_temps(out, lse, q, lo=lo))
    mask.fill_(True).triu_(1)
    for b in range(0, B, group):
        rows = slice(b, min(b + group, B))
        qh, kh, vh = _heads_first(q[rows], qh_), _heads_first(k[rows], kh_), _heads_first(v[rows], vh_)
        H = qh.shape[0]
        for start in range(0, T, block):
            stop = min(start + block, T)
            r = stop - start
            S = _scores(s_, qh, kh, start, stop, scale, mask, softcap)
            if lo is not None:
                _hide(S, lo[rows, start:stop], places, hidden)
            m, total, o = m_[: H * r].view(H, r, 1), l_[: H * r].view(H, r, 1), o_[: H * r * HS].view(H, r, HS)
            torch.amax(S, 2, keepdim=True, out=m)
            torch.sum(S.sub_(m).exp_(), 2, keepdim=True, out=total)
            torch.bmm(S, vh[:, :stop], out=o)
            o.div_(total)
            out[rows, start:stop].copy_(o.view(-1, NH, r, HS).transpose(1, 2))
            lse[rows, :, start:stop].copy_(m.add_(total.log_()).view(-1, NH, r))


def backward_temps(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, *_: object,
    lo: Tensor | None = None, softcap: float = 0.0, **__: object,
) -> Temps:  # fmt: skip
    T, NH, HS = q.shape[1:]
    block, group = _sizes(q)
    acc, heads = acc_dtype(q.dtype), group * NH
    return [
        *[((heads * T * HS,), acc)] * 8,
        *[((heads * block * T,), acc)] * 2,
        *[((heads * T,), acc)] * 2,
        ((block, block), torch.bool),
        ((heads * block * T if softcap else 0,), acc),
        *_lo_temps(lo, group * block, T),
    ]


@op("dq", "dk", "dv", temps=backward_temps)
def attention_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, scale: float, lo: Tensor | None = None, softcap: float = 0.0, scratch: Scratch,
) -> None:  # fmt: skip
    """dq, dk, dv (B, T, NH, HS) from dout and what forward kept; lo and softcap as there."""
    B, T, NH, HS = q.shape
    block, group = _sizes(q)
    qh_, kh_, vh_, gh_, oh_, dqh_, dkh_, dvh_, s_, ds_, delta_, lse_, mask, slope, places, hidden = scratch(
        backward_temps(dq, dk, dv, dout, q, lo=lo, softcap=softcap)
    )
    mask.fill_(True).triu_(1)
    for b in range(0, B, group):
        rows = slice(b, min(b + group, B))
        qh, kh, vh = _heads_first(q[rows], qh_), _heads_first(k[rows], kh_), _heads_first(v[rows], vh_)
        gh, oh = _heads_first(dout[rows], gh_), _heads_first(out[rows], oh_)
        H = qh.shape[0]
        dqh, dkh, dvh = (x[: H * T * HS].view(H, T, HS) for x in (dqh_, dkh_, dvh_))
        delta, L = delta_[: H * T].view(H, T, 1), lse_[: H * T].view(H, T, 1)
        torch.sum(oh.mul_(gh), 2, keepdim=True, out=delta)
        L.view(-1, NH, T).copy_(lse[rows])
        # Last block first: it covers all keys, so it writes dk and dv (beta = 0) and the others add.
        for start in reversed(range(0, T, block)):
            stop = min(start + block, T)
            beta = 0 if stop == T else 1
            P = _scores(s_, qh, kh, start, stop, scale, mask, softcap, slope)
            if lo is not None:
                _hide(P, lo[rows, start:stop], places, hidden)
            P.sub_(L[:, start:stop]).exp_()
            g = gh[:, start:stop]
            torch.baddbmm(dvh[:, :stop], P.transpose(1, 2), g, beta=beta, out=dvh[:, :stop])
            dS = ds_[: P.numel()].view(P.shape)
            torch.bmm(g, vh[:, :stop].transpose(1, 2), out=dS)
            dS.sub_(delta[:, start:stop]).mul_(P)
            if softcap:
                dS.mul_(slope[: P.numel()].view(P.shape))
            torch.baddbmm(dqh[:, start:stop], dS, kh[:, :stop], beta=0, alpha=scale, out=dqh[:, start:stop])
            torch.baddbmm(
                dkh[:, :stop], dS.transpose(1, 2), qh[:, start:stop], beta=beta, alpha=scale, out=dkh[:, :stop]
            )
        for grad, heads in ((dq, dqh), (dk, dkh), (dv, dvh)):
            grad[rows].copy_(heads.view(-1, NH, T, HS).transpose(1, 2))


@op("cache")
def cache_write(cache: Tensor, k: Tensor, v: Tensor) -> None:
    """Keep k, v (b, T, NH, HS), the first T of their texts, in cache (2, b, NH, longest, HS)."""
    for kept, x in zip(cache, (k, v), strict=True):
        kept[:, :, : x.shape[1]].copy_(x.transpose(1, 2))


def decode_temps(out: Tensor, cache: Tensor, *_: object, **__: object) -> Temps:
    b, NH, T, HS = cache.shape[1:]
    acc = acc_dtype(cache.dtype)
    return [*[((b * NH * T,), acc)] * 2, *[((b * NH * HS,), acc)] * 2, ((b * NH * T * HS,), acc)]


@op("out", "cache", temps=decode_temps)
def attention_decode(
    out: Tensor, cache: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, scale: float, scratch: Scratch
) -> None:
    """out (b, NH, HS) = attention of one query a row over its keys so far; k, v, the newest, go into the cache first.

    cache (2, b, NH, T, HS) holds keys and values, positions (b) int64 the place of each row's newest token.
    """
    s_, p_, o_, q_, wide = scratch(decode_temps(out, cache))
    NH, HS = q.shape[1:]
    start = 0
    for t, group in itertools.groupby(positions.tolist()):  # neighbouring rows of one length in one product
        rows = slice(start, start := start + len(list(group)))
        both = cache[:, rows]
        both[0, :, :, t].copy_(k[rows])
        both[1, :, :, t].copy_(v[rows])
        keys, values = (x.flatten(0, 1)[:, : t + 1] for x in both)
        H = keys.shape[0]
        S, P = (x[: H * (t + 1)].view(H, 1, t + 1) for x in (s_, p_))
        o, query = (x[: H * HS].view(H, 1, HS) for x in (o_, q_))
        buffer = wide[: keys.numel()].view(keys.shape)
        query.view(-1, NH, HS).copy_(q[rows])
        torch.baddbmm(S, query, widen(keys, buffer).mT, beta=0, alpha=scale, out=S)
        torch.softmax(S, 2, out=P)
        torch.bmm(P, widen(values, buffer), out=o)
        out[rows].copy_(o.view(-1, NH, HS))
