"""The squared ReLU (So et al. 2021): max(x, 0)^2, the activation of nanochat's MLP. Its slope is 2 max(x, 0)."""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks


def relu2_temps(out: Tensor, *_: object) -> Temps:
    return [((chunk_rows(*out.shape), out.shape[1]), acc_dtype(out.dtype))]


@op("out", temps=relu2_temps)
def relu2_forward(out: Tensor, x: Tensor, *, scratch: Scratch) -> None:
    """out (n, F) = max(x (n, F), 0)^2, in fp32 or wider and rounded once."""
    (wide,) = scratch(relu2_temps(out))
    for rows in row_chunks(*out.shape):
        y = wide[: len(out[rows])]
        out[rows].copy_(torch.square(y.copy_(x[rows]).clamp_(min=0), out=y))


def relu2_backward_temps(dx: Tensor, *_: object) -> Temps:
    return [((chunk_rows(*dx.shape), dx.shape[1]), acc_dtype(dx.dtype))] * 2


@op("dx", "rewrite", temps=relu2_backward_temps, adds=("dx",))
def relu2_backward(dx: Tensor, rewrite: Tensor | None, x: Tensor, *, scratch: Scratch) -> None:
    """dx (n, F) *= 2 max(x (n, F), 0). rewrite (n, F) = the output once more, if wanted."""
    wide, d_ = scratch(relu2_backward_temps(dx))
    for rows in row_chunks(*dx.shape):
        y, d = (t[: len(dx[rows])] for t in (wide, d_))
        dx[rows].copy_(d.copy_(dx[rows]).mul_(y.copy_(x[rows]).clamp_(min=0)).mul_(2))
        if rewrite is not None:
            rewrite[rows].copy_(torch.square(y, out=y))
