"""nanochat's smear: every token's embedding takes some of that of the token before it.

For token t:  g = l sigmoid(s),  s = w . e_t[:24],  out_t = e_t + g e_(t-1). The first token of a text has g = 0.
Backward, with p = dout_t . e_(t-1) and ds = p g (1 - sigmoid(s)):

de_t = dout_t + g_(t+1) dout_(t+1) + ds w (in the first 24 channels),  dw = sum ds e_t[:24],  dl = sum p sigmoid(s)
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, op, widen

GATE = 24  # channels that the gate reads


def _wide(e: Tensor, count: int) -> Temps:
    """This many fp32 copies of e; then what `_gate` needs."""
    (B, T, C), acc = e.shape, acc_dtype(e.dtype)
    small = [*[((B, T), acc)] * 3, ((B, T, GATE), acc), ((B, T), torch.bool), ((GATE,), acc), ((1,), acc)]
    return [*[((B, T, C), acc)] * count, *small]


def _gate(e: Tensor, w: Tensor, factor: Tensor, positions: Tensor | None, temps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """g and sigmoid(s) (B, T) of e (B, T, C) in fp32 or wider; both are 0 for the first token of a text."""
    s, g, _, products, first, w_, l_ = temps
    torch.sum(torch.mul(e[..., :GATE], widen(w, w_), out=products), 2, out=s).sigmoid_()
    if positions is None:
        first.zero_()
        first[:, 0] = True
    else:
        torch.eq(positions.view(s.shape), 0, out=first)
    s.masked_fill_(first, 0.0)
    return torch.mul(s, widen(factor, l_), out=g), s


def forward_temps(out: Tensor, e: Tensor, *_: object) -> Temps:
    return _wide(e, 2)


@op("out", temps=forward_temps)
def smear_forward(
    out: Tensor, e: Tensor, w: Tensor, factor: Tensor, positions: Tensor | None = None, *, scratch: Scratch
) -> None:
    """out (B, T, C) = e (B, T, C) + what it takes of the token before, with weight w (24) and factor l (1).

    positions (B T) int64, of packed rows, are 0 where a text begins; else every row is one text. The temporaries are
    as large as e: this reference is for CPUs."""
    wide, more, *rest = scratch(forward_temps(out, e))
    wide.copy_(e)
    g, _ = _gate(wide, w, factor, positions, rest)
    more.copy_(wide)
    more[:, 1:].addcmul_(wide[:, :-1], g[:, 1:, None])
    out.copy_(more)


def backward_temps(de: Tensor, dw: Tensor | None, dl: Tensor | None, dout: Tensor, *_: object, **__: object) -> Temps:
    acc = acc_dtype(de.dtype)
    return [((GATE,), acc), ((GATE,), acc), ((1,), acc), ((), acc), *_wide(dout, 3)]


@op("de", "dw", "dfactor", temps=backward_temps, adds=("dw", "dfactor"))
def smear_backward(
    de: Tensor, dw: Tensor | None, dfactor: Tensor | None, dout: Tensor, e: Tensor, w: Tensor, factor: Tensor,
    positions: Tensor | None = None, *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """de (B, T, C), which is not dout, dw (24) and dfactor (1) from dout (B, T, C). `accumulate` adds to the last two,
    either of which may be None."""
    sum_w, w_, wide_l, part, d, x, tmp, *rest = scratch(backward_temps(de, dw, dfactor, dout))
    spare = rest[2]
    x.copy_(e)
    d.copy_(dout)
    g, s = _gate(x, w, factor, positions, rest)
    tmp.zero_()
    torch.mul(d[:, 1:], x[:, :-1], out=tmp[:, 1:])
    torch.sum(tmp, 2, out=spare)  # p
    torch.sum(torch.mul(spare, s, out=tmp[..., 0]), (0, 1), out=part)
    if dfactor is not None:
        dfactor.copy_(part.add_(widen(dfactor, wide_l)[0]) if accumulate else part)
    tmp.copy_(d)
    tmp[:, :-1].addcmul_(d[:, 1:], g[:, 1:, None])
    spare.mul_(g).mul_(s.neg_().add_(1))  # ds
    tmp[..., :GATE].addcmul_(spare[..., None], widen(w, w_))
    de.copy_(tmp)
    torch.sum(torch.mul(x[..., :GATE], spare[..., None], out=tmp[..., :GATE]), (0, 1), out=sum_w)
    if dw is not None:
        dw.copy_(sum_w.add_(widen(dw, w_)) if accumulate else sum_w)


def decode_temps(out: Tensor, cache: Tensor, e: Tensor, *_: object) -> Temps:
    return _wide(e[:, None], 2)


@op("out", "cache", temps=decode_temps, adds=("cache",))
def smear_decode(
    out: Tensor, cache: Tensor, e: Tensor, w: Tensor, factor: Tensor, positions: Tensor, *, scratch: Scratch
) -> None:
    """out (b, C) = e (b, C) + what it takes of the token before, for a token of each of b texts at positions (b) int64.

    cache (b, NH, T, HS) with NH HS = C keeps the embeddings of each text, and takes e."""
    wide, before, *rest = scratch(decode_temps(out, cache, e))
    NH, _, HS = cache.shape[1:]
    wide.copy_(e[:, None])
    for row, t in enumerate(positions.tolist()):
        cache[row, :, t].copy_(e[row].view(NH, HS))
        before[row].view(NH, HS).copy_(cache[row, :, max(t - 1, 0)])
    g, _ = _gate(wide, w, factor, positions, rest)
    out.copy_(wide.addcmul_(before, g[..., None])[:, 0])
