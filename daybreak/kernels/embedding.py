"""Token and position embedding: a gather forward, a scatter-add backward whose order is fixed.

Backward for fp32 and fp64 adds rows in token order. In bf16 a frequent token would be rounded once per occurrence, so
occurrences are sorted and summed in fp32 first, and the gradient is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, op, widen


@op("out")
def embedding_forward(out: Tensor, tokens: Tensor, wte: Tensor, wpe: Tensor) -> None:
    """out (B*T, C) = wte[tokens] + wpe[:T] for tokens (B, T) int64."""
    B, T = tokens.shape
    torch.index_select(wte, 0, tokens.view(-1), out=out)
    out.view(B, T, -1).add_(wpe[:T])


def backward_temps(dwte: Tensor, dwpe: Tensor, dout: Tensor, tokens: Tensor, **_: object) -> Temps:
    n, C = dout.shape
    acc, ids = acc_dtype(dout.dtype), torch.int64
    wide = [((tokens.shape[1], C), dout.dtype)]
    if dout.dtype == acc:
        return wide
    return [*wide, *[((n, C), acc)] * 2, ((n, C), dout.dtype), *[((n,), ids)] * 4, ((n,), torch.bool)]


@op("dwte", "dwpe", temps=backward_temps)
def embedding_backward(
    dwte: Tensor, dwpe: Tensor, dout: Tensor, tokens: Tensor, *, accumulate: bool, scratch: Scratch
) -> None:
    """Add dout (B*T, C) to the rows of dwte (Vp, C) that `tokens` (B, T) name, and its sum over B to dwpe[:T].

    dwte always accumulates: the tied head wrote it earlier in the same backward pass.
    """
    B, T = tokens.shape
    temps = scratch(backward_temps(dwte, dwpe, dout, tokens))
    position = temps[0]
    torch.sum(dout.view(B, T, -1), 0, out=position)
    if accumulate:
        dwpe[:T].add_(position)
    else:
        dwpe[:T].copy_(position)
        dwpe[T:].zero_()
    if len(temps) == 1:
        _scatter_add(dwte, tokens.view(-1), dout)
    else:
        _scatter_add_rounded_once(dwte, tokens.view(-1), dout, temps[1:])


def _scatter_add(dst: Tensor, index: Tensor, src: Tensor) -> None:
    if dst.is_cuda:
        dst.index_put_((index,), src, accumulate=True)  # sorts, so the order is fixed; index_add_ would use atomics
    else:
        dst.index_add_(0, index, src)


def _scatter_add_rounded_once(dst: Tensor, index: Tensor, src: Tensor, temps: list[Tensor]) -> None:
    """Sum the rows of each distinct index in fp32, then add once: at most one rounding per row of dst."""
    sums, wide, rows, sorted_ids, order, segment, ids, new = temps
    torch.sort(index, stable=True, out=(sorted_ids, order))
    new[0] = False
    torch.ne(sorted_ids[1:], sorted_ids[:-1], out=new[1:])
    torch.cumsum(new, 0, out=segment)
    ids.zero_()
    ids.scatter_(0, segment, sorted_ids)  # the distinct ids, in front
    torch.index_select(src, 0, order, out=rows)
    sums.zero_()
    _scatter_add(sums, segment, widen(rows, wide))
    torch.index_select(dst, 0, ids, out=rows)
    sums.add_(rows)
    count = int(segment[-1]) + 1  # rows behind the distinct ids are padding
    dst.index_copy_(0, ids[:count], rows.copy_(sums)[:count])
