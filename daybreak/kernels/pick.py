"""Pick rows of a matrix into a smaller one, and carry gradients back: for a head that computes learned rows alone.

`at` gives each of n rows a place of its own, from 0 to n - 1. The smaller matrix has the r rows with `at < r`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, op


def forward_temps(out: Tensor, picked: Tensor, x: Tensor, *_: object) -> Temps:
    return [((len(x),), torch.int64)] * 3


@op("out", "picked", temps=forward_temps)
def pick_forward(out: Tensor, picked: Tensor, x: Tensor, targets: Tensor, at: Tensor, *, scratch: Scratch) -> None:
    """out (r, C) and picked (r) are rows of x (n, C) and of targets (n) int64: row i becomes row at[i], unless that is
    r or more. at (n) int32."""
    index, rows, source = scratch(forward_temps(out, picked, x))
    source.scatter_(0, index.copy_(at), torch.arange(len(x), out=rows))
    torch.index_select(x, 0, source[: len(out)], out=out)
    torch.index_select(targets, 0, source[: len(out)], out=picked)


def backward_temps(dx: Tensor, *_: object) -> Temps:
    return [((len(dx),), torch.int64), ((len(dx), 1), torch.bool)]


@op("dx", temps=backward_temps)
def pick_backward(dx: Tensor, d_out: Tensor, at: Tensor, *, scratch: Scratch) -> None:
    """dx (n, C): row i is row at[i] of d_out (r, C), or zeros where at (n) int32 is r or more."""
    index, left = scratch(backward_temps(dx))
    torch.ge(at[:, None], len(d_out), out=left)
    torch.index_select(d_out, 0, index.copy_(at).clamp_(max=len(d_out) - 1), out=dx)
    dx.masked_fill_(left, 0.0)
