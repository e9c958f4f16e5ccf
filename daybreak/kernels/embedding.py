"""Token and position embedding: a gather forward, a scatter-add backward whose order is fixed.

Backward for fp32 and fp64 adds rows in token order. In bf16 a frequent token would be rounded once per occurrence, so
its occurrences are summed in fp32 first and the gradient is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, op


@op("out")
def embedding_forward(out: Tensor, tokens: Tensor, wte: Tensor, wpe: Tensor | None, *, scale: float = 1.0) -> None:
    """out (B*T, C) = scale * wte[tokens] + wpe[:T], if there is a wpe, for tokens (B, T) int64."""
    B, T = tokens.shape
    torch.index_select(wte, 0, tokens.view(-1), out=out).mul_(scale)
    if wpe is not None:
        out.view(B, T, -1).add_(wpe[:T])


def decode_temps(out: Tensor, tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor | None, **_: object) -> Temps:
    return [(tuple(out.shape), out.dtype)] if wpe is not None else []


@op("out", temps=decode_temps)
def embedding_decode(
    out: Tensor, tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor | None,
    *, scale: float = 1.0, scratch: Scratch,
) -> None:  # fmt: skip
    """out (b, C) = scale * wte[tokens] + wpe[positions] for tokens, positions (b) int64: a token of each of b texts."""
    torch.index_select(wte, 0, tokens, out=out).mul_(scale)
    if wpe is not None:
        (position,) = scratch(decode_temps(out, tokens, positions, wte, wpe))
        torch.index_select(wpe, 0, positions, out=position)
        out.add_(position)


def backward_temps(dwte: Tensor | None, dwpe: Tensor | None, dout: Tensor, tokens: Tensor, **_: object) -> Temps:
    n, C = dout.shape
    acc, ids = acc_dtype(dout.dtype), torch.int64
    wide = [((tokens.shape[1], C), dout.dtype)]
    if dout.dtype == acc or dwte is None:
        return wide
    return [*wide, *[((n, C), acc)] * 2, ((n, C), dout.dtype), *[((n,), ids)] * 2, *[((dwte.shape[0],), ids)] * 2]


@op("dwte", "dwpe", temps=backward_temps, adds=("dwte", "dwpe"))
def embedding_backward(
    dwte: Tensor | None, dwpe: Tensor | None, dout: Tensor, tokens: Tensor,
    *, accumulate: bool, tied: bool = True, scale: float = 1.0, scratch: Scratch,
) -> None:  # fmt: skip
    """Add scale * dout (B*T, C) to the rows of dwte (Vp, C) that `tokens` (B, T) name, and dout's sum over B to
    dwpe[:T].

    A tied dwte always accumulates: the head wrote it earlier in the same backward pass. Either may be None: nobody
    wants it.
    """
    B, T = tokens.shape
    temps = scratch(backward_temps(dwte, dwpe, dout, tokens))
    if dwpe is not None:
        position = torch.sum(dout.view(B, T, -1), 0, out=temps[0])
        if accumulate:
            dwpe[:T].add_(position)
        else:
            dwpe[:T].copy_(position)
            dwpe[T:].zero_()
    if dwte is None:
        return
    if not (tied or accumulate):
        dwte.zero_()
    if len(temps) == 1:
        _scatter_add(dwte, tokens.view(-1), dout, scale)
    else:
        _scatter_add_rounded_once(dwte, tokens.view(-1), dout, scale, temps[1:])


def _scatter_add(dst: Tensor, index: Tensor, src: Tensor, scale: float) -> None:
    if dst.is_cuda:  # sorts, so the order is fixed; index_add_ would use atomics
        dst.index_put_((index,), src if scale == 1 else src * scale, accumulate=True)
    else:
        dst.index_add_(0, index, src, alpha=scale)


def _scatter_add_rounded_once(dst: Tensor, index: Tensor, src: Tensor, scale: float, temps: list[Tensor]) -> None:
    """Sum the rows of each distinct index in fp32, then add once: at most one rounding per row of dst."""
    sums, wide, rows, segment, ids, seen, rank = temps
    seen.zero_().index_fill_(0, index, 1)
    torch.cumsum(seen, 0, out=rank)
    torch.index_select(rank.sub_(1), 0, index, out=segment)  # which of the distinct indices a row belongs to
    ids.zero_().scatter_(0, segment, index)  # the distinct indices, in front; padded with row 0
    sums.zero_()
    _scatter_add(sums, segment, wide.copy_(src), scale)
    torch.index_select(dst, 0, ids, out=rows)
    rows.copy_(sums.add_(wide.copy_(rows)))
    count = int(rank[-1]) + 1
    dst.index_copy_(0, ids[:count], rows[:count])
