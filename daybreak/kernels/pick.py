"""Pick rows of a matrix into a smaller one, and carry gradients back: for a head that computes learned rows alone.

`at` says of each of n rows which of r rows it is there, or -1: it is left out. Each of the r rows is one of the n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, op


def forward_temps(out: Tensor, picked: Tensor, x: Tensor, *_: object) -> Temps:
    n, r = len(x), len(out)
    return [((n,), torch.int64), ((n,), torch.int64), ((n,), torch.bool), ((r + 1,), torch.int64)]


@op("out", "picked", temps=forward_temps)
def pick_forward(out: Tensor, picked: Tensor, x: Tensor, targets: Tensor, at: Tensor, *, scratch: Scratch) -> None:
    """out (r, C) and picked (r) are rows of x (n, C) and of targets (n) int64: row i is row at[i]; at is (n) int32."""
    index, rows, left, source = scratch(forward_temps(out, picked, x))
    torch.lt(index.copy_(at), 0, out=left)
    index.masked_fill_(left, len(out))  # a place behind the others, which nobody reads
    source.scatter_(0, index, torch.arange(len(x), out=rows))
    torch.index_select(x, 0, source[:-1], out=out)
    torch.index_select(targets, 0, source[:-1], out=picked)


def backward_temps(dx: Tensor, *_: object) -> Temps:
    return [((len(dx),), torch.int64), ((len(dx), 1), torch.bool)]


@op("dx", temps=backward_temps)
def pick_backward(dx: Tensor, d_out: Tensor, at: Tensor, *, scratch: Scratch) -> None:
    """dx (n, C) from d_out (r, C): the row that at (n) int32 names, or zeros where it is negative."""
    index, left = scratch(backward_temps(dx))
    torch.lt(at[:, None], 0, out=left)
    torch.index_select(d_out, 0, index.copy_(at).clamp_(min=0), out=dx)
    dx.masked_fill_(left, 0.0)
