"""Self-attention without ever storing a T x T matrix in DRAM.

softmax(scale q k^T) v, where query i sees keys lo[i] to i. Causal attention has lo[i] = 0, a window of w tokens has
lo[i] = max(i - w + 1, 0), and in packed documents lo[i] is the place where the document of query i begins.

Heads of queries may share keys and values (Ainslie et al. 2023): NH heads of queries and NKV of keys make NKV groups of
NH / NKV neighbours. A product takes the queries of a group one below the other. So the sums over a group, in dk and dv,
are part of a product, and no key is copied for each of its heads.

A block of queries sees all its keys at once, so the softmax is exact and only its log-sum-exp is kept (as in
FlashAttention, Dao et al. 2022, section 3.1). Backward recomputes P = exp(S - lse) block by block:

dv += P^T do,   dP = do v^T,   dS = P (dP - sum(do * o)) * scale,   dq = dS k,   dk += dS^T q

A softcap c > 0 limits scores, as in Gemma 2 (2024, section 2): c tanh(S / c) takes the place of S, and dS is multiplied
by the slope 1 - tanh^2(S / c). No kernel for GPUs has it, and no family of models uses it yet.

`attention_decode` is the case of one query per row, whose keys and values are kept in a cache from token to token.

q, k, v, out and their gradients are strided views (B, T, heads, HS): slices of a packed qkv are one case. All
arithmetic is in fp32 (fp64 for fp64), on copies with the heads in front.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from daybreak.kernels import Flops, Scratch, Temps, acc_dtype, op, widen
from daybreak.kernels.rope import rope, rope_temps

QUERY_BLOCK = 128  # queries per block: keys beyond a block's last query are not touched
ROWS = 1 << 12  # (head, query) rows of scores held at once, at most: the batch is cut to fit


def _sizes(q: Tensor) -> tuple[int, int]:
    """Queries per block, batch rows per group."""
    B, T, NH, _ = q.shape
    block = min(QUERY_BLOCK, T)  # the group does not depend on T, so a shorter T never needs more scratch
    return block, max(1, min(B, ROWS // (NH * QUERY_BLOCK)))


def _hide_temps(lo: Tensor | None, window: int, group: int, block: int, T: int) -> Temps:
    """Places of keys, and which ones queries do not see."""
    rows = group * block if lo is not None else block if window else 0
    return [((0 if lo is None else T,), torch.int32), ((rows * T,), torch.bool)]


def forward_temps(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, *_: object, lo: Tensor | None = None, window: int = 0, **__: object
) -> Temps:
    T, NH, HS = q.shape[1:]
    block, group = _sizes(q)
    acc, heads, shared = acc_dtype(q.dtype), group * NH, group * k.shape[2]
    return [
        ((heads * T * HS,), acc),
        *[((shared * T * HS,), acc)] * 2,
        ((heads * block * T,), acc),
        ((heads * block * HS,), acc),
        *[((heads * block,), acc)] * 2,
        ((block, block), torch.bool),
        *_hide_temps(lo, window, group, block, T),
    ]


def _heads_first(x: Tensor, buffer: Tensor) -> Tensor:
    """Copy x (b, T, NH, HS) into `buffer` as a contiguous (b * NH, T, HS)."""
    b, T, NH, HS = x.shape
    view = buffer[: x.numel()].view(b, NH, T, HS)
    view.copy_(x.transpose(1, 2))
    return view.view(b * NH, T, HS)


def _blocks(x: Tensor, buffer: Tensor) -> list[Tensor]:
    """Copy each block of queries of x (b, T, NH, width) into `buffer` as a contiguous (b * NH, r, width)."""
    parts = torch.split(x, QUERY_BLOCK, 1)
    pieces = torch.split(buffer[: x.numel()], [part.numel() for part in parts])
    return [_heads_first(part, piece) for part, piece in zip(parts, pieces, strict=True)]


def _scores(
    buffer: Tensor, q: Tensor, k: Tensor, start: int, stop: int, scale: float, mask: Tensor, softcap: float,
    slope: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scaled, masked scores of queries [start, stop), a group's in one, against keys [0, stop). `slope` takes the
    softcap's."""
    r = stop - start
    S = buffer[: q.shape[0] * q.shape[1] * stop].view(*q.shape[:2], stop)
    torch.baddbmm(S, q, k[:, :stop].transpose(1, 2), beta=0, alpha=scale, out=S)
    if softcap:
        S.div_(softcap).tanh_()
        if slope is not None:
            torch.mul(S, S, out=slope[: S.numel()].view(S.shape)).neg_().add_(1)
        S.mul_(softcap)
    S.view(-1, r, stop)[:, :, start:].masked_fill_(mask[:r, :r], -math.inf)
    return S


def _hide(S: Tensor, start: int, stop: int, lo: Tensor | None, window: int, places: Tensor, buffer: Tensor) -> None:
    """Mask the keys before lo (b, T), and those before the window, in scores of queries [start, stop)."""
    r = stop - start
    if lo is not None:
        hidden = buffer[: len(lo) * r * stop].view(-1, 1, r, stop)
        torch.lt(torch.arange(stop, out=places[:stop]), lo[:, None, start:stop, None], out=hidden)
        S.view(len(lo), -1, r, stop).masked_fill_(hidden, -math.inf)
    if window:
        hidden = buffer[: r * stop].view(r, stop).fill_(True).tril_(start - window)
        S.view(-1, r, stop).masked_fill_(hidden, -math.inf)


def causal_products(count: int) -> Flops:
    """Of this many matmuls between queries and the keys up to their places: half the square."""
    return lambda given: int(count * given["q"].numel() * (given["q"].shape[1] + 1))


@op("out", "lse", temps=forward_temps, flops=causal_products(2))
def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    *, scale: float, lo: Tensor | None = None, window: int = 0, softcap: float = 0.0, scratch: Scratch,
) -> None:  # fmt: skip
    """out (B, T, NH, HS) = attention of q (B, T, NH, HS) to k, v (B, T, NKV, HS); lse (B, NH, T) in fp32 or wider is
    kept for backward. NH is a multiple of NKV: each NH / NKV neighbouring heads share keys and values.

    Causal, but query i sees only keys from lo[i] on, and at most the last `window` ones up to itself. lo (B, T) int32:
    at most the query's own place. window, softcap: 0 = none.
    """
    B, T, NH, HS = q.shape
    block, group = _sizes(q)
    qh_, kh_, vh_, s_, o_, m_, l_, mask, *hidden = scratch(forward_temps(out, lse, q, k, lo=lo, window=window))
    mask.fill_(True).triu_(1)
    for b in range(0, B, group):
        rows = slice(b, min(b + group, B))
        kh, vh = _heads_first(k[rows], kh_), _heads_first(v[rows], vh_)
        for start, qh in zip(range(0, T, block), _blocks(q[rows], qh_), strict=True):
            H, r, _ = qh.shape
            stop = start + r
            qh = qh.view(len(kh), -1, HS)
            S = _scores(s_, qh, kh, start, stop, scale, mask, softcap)
            _hide(S, start, stop, None if lo is None else lo[rows], window, *hidden)
            m, total = (x[: H * r].view(len(kh), -1, 1) for x in (m_, l_))
            o = o_[: H * r * HS].view(qh.shape)
            torch.amax(S, 2, keepdim=True, out=m)
            torch.sum(S.sub_(m).exp_(), 2, keepdim=True, out=total)
            torch.bmm(S, vh[:, :stop], out=o)
            o.div_(total)
            out[rows, start:stop].copy_(o.view(-1, NH, r, HS).transpose(1, 2))
            lse[rows, :, start:stop].copy_(m.add_(total.log_()).view(-1, NH, r))


def backward_temps(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, *_: object,
    lo: Tensor | None = None, window: int = 0, softcap: float = 0.0, **__: object,
) -> Temps:  # fmt: skip
    T, NH, HS = q.shape[1:]
    block, group = _sizes(q)
    acc, heads, shared = acc_dtype(q.dtype), group * NH, group * dk.shape[2]
    return [
        *[((heads * T * HS,), acc)] * 4,
        *[((shared * T * HS,), acc)] * 4,
        *[((heads * block * T,), acc)] * 2,
        *[((heads * T,), acc)] * 2,
        ((block, block), torch.bool),
        ((heads * block * T if softcap else 0,), acc),
        *_hide_temps(lo, window, group, block, T),
    ]


@op("dq", "dk", "dv", temps=backward_temps, flops=causal_products(5))
def attention_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, scale: float, lo: Tensor | None = None, window: int = 0, softcap: float = 0.0, scratch: Scratch,
) -> None:  # fmt: skip
    """dq (B, T, NH, HS), dk, dv (B, T, NKV, HS) from dout and what forward kept; lo, window and softcap as there."""
    B, T, NH, HS = q.shape
    block, group = _sizes(q)
    qh_, gh_, oh_, dqh_, kh_, vh_, dkh_, dvh_, s_, ds_, delta_, lse_, mask, slope, *hidden = scratch(
        backward_temps(dq, dk, dv, dout, q, lo=lo, window=window, softcap=softcap)
    )
    mask.fill_(True).triu_(1)
    for b in range(0, B, group):
        rows = slice(b, min(b + group, B))
        kh, vh = _heads_first(k[rows], kh_), _heads_first(v[rows], vh_)
        dkh, dvh = (x[: kh.numel()].view(kh.shape) for x in (dkh_, dvh_))
        blocks = [
            _blocks(x, buffer)
            for x, buffer in (
                (q[rows], qh_), (dout[rows], gh_), (out[rows], oh_), (lse[rows].transpose(1, 2)[..., None], lse_)
            )
        ]  # fmt: skip
        # Last block first: it covers all keys, so it writes dk and dv (beta = 0) and the others add.
        for start in reversed(range(0, T, block)):
            r = min(block, T - start)
            stop = start + r
            beta = 0 if stop == T else 1
            qh, g, o, L = (x[start // block].view(len(kh), -1, x[0].shape[2]) for x in blocks)
            delta, dqh = delta_[: L.numel()].view(L.shape), dqh_[: qh.numel()].view(qh.shape)
            torch.sum(o.mul_(g), 2, keepdim=True, out=delta)
            P = _scores(s_, qh, kh, start, stop, scale, mask, softcap, slope)
            _hide(P, start, stop, None if lo is None else lo[rows], window, *hidden)
            P.sub_(L).exp_()
            torch.baddbmm(dvh[:, :stop], P.transpose(1, 2), g, beta=beta, out=dvh[:, :stop])
            dS = ds_[: P.numel()].view(P.shape)
            torch.bmm(g, vh[:, :stop].transpose(1, 2), out=dS)
            dS.sub_(delta).mul_(P)
            if softcap:
                dS.mul_(slope[: P.numel()].view(P.shape))
            torch.baddbmm(dqh, dS, kh[:, :stop], beta=0, alpha=scale, out=dqh)
            dq[rows, start:stop].copy_(dqh.view(-1, NH, r, HS).transpose(1, 2))
            torch.baddbmm(dkh[:, :stop], dS.transpose(1, 2), qh, beta=beta, alpha=scale, out=dkh[:, :stop])
        for grad, heads in ((dk, dkh), (dv, dvh)):
            grad[rows].copy_(heads.view(-1, *grad.shape[2:0:-1], HS).transpose(1, 2))


@op("cache")
def cache_write(cache: Tensor, k: Tensor, v: Tensor) -> None:
    """Keep k, v (b, T, NH, HS), the first T of their texts, in cache (2, b, NH, longest, HS)."""
    for kept, x in zip(cache, (k, v), strict=True):
        kept[:, :, : x.shape[1]].copy_(x.transpose(1, 2))


def decode_temps(
    out: Tensor, cache: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
    *, freq: Tensor | None = None, **_: object,
) -> Temps:  # fmt: skip
    """Those of attention; with freq the turned queries and keys too, and of either those of rope."""
    NH, T, acc = out.shape[1], cache.shape[3], acc_dtype(cache.dtype)
    rows = len(out) * NH
    found: list[tuple[tuple[int, ...], torch.dtype]] = [((rows * T,), acc)] * 2
    found += [*[((rows * out.shape[2],), acc)] * 2, ((cache[0].numel(),), acc)]
    if freq is not None:
        for x in (q, k):
            found += [(tuple(x.shape), x.dtype), *rope_temps(x[:, None], freq, positions)]
    return found


@op("out", "cache", temps=decode_temps)
def attention_decode(
    out: Tensor, cache: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
    *, scale: float, window: int = 0, freq: Tensor | None = None, attention: float = 1.0, scratch: Scratch,
) -> None:  # fmt: skip
    """out (b, NH, HS) = attention of one query a row over its keys so far; k, v (b, NKV, HS), the newest, go into the
    cache first. Heads share keys as in attention_forward.

    cache (2, b, NKV, T, HS) holds keys and values, positions (b) int64 the place of each row's newest token. A query
    sees at most the last `window` keys, itself included; 0 = all. With freq, queries and keys turn first, as `rope`
    turns them with freq and attention; q and k themselves stay as they are.
    """
    s_, p_, o_, q_, wide, *rest = scratch(decode_temps(out, cache, q, k, v, positions, freq=freq))
    if freq is not None:
        half, turns = len(rest) // 2, list[Tensor]()
        for x, (own, *temps) in ((q, rest[:half]), (k, rest[half:])):
            turns.append(own.copy_(x))
            rope(own[:, None], freq, positions, attention=attention, scratch=lambda _, temps=temps: temps)
        q, k = turns
    NH, HS = q.shape[1:]
    start = 0
    for t, group in itertools.groupby(positions.tolist()):  # neighbouring rows of one length in one product
        rows = slice(start, start := start + len(list(group)))
        both = cache[:, rows]
        both[0, :, :, t].copy_(k[rows])
        both[1, :, :, t].copy_(v[rows])
        first = max(0, t - window + 1) if window else 0
        keys, values = (x.flatten(0, 1)[:, first : t + 1] for x in both)
        H, n = keys.shape[:2]
        rows_q = NH * len(q[rows]) // H
        S, P = (x[: H * rows_q * n].view(H, rows_q, n) for x in (s_, p_))
        o, query = (x[: H * rows_q * HS].view(H, rows_q, HS) for x in (o_, q_))
        buffer = wide[: keys.numel()].view(keys.shape)
        query.view(-1, NH, HS).copy_(q[rows])
        torch.baddbmm(S, query, widen(keys, buffer).mT, beta=0, alpha=scale, out=S)
        torch.softmax(S, 2, out=P)
        torch.bmm(P, widen(values, buffer), out=o)
        out[rows].copy_(o.view(-1, NH, HS))
