"""SwiGLU (Shazeer 2020): the MLP's gate, silu(a) b with silu(a) = a sigmoid(a), for halves a and b of one matrix.

Backward, with s = sigmoid(a) and f = a s:  da = dh b (s + f (1 - s)),  db = dh f.
GeGLU, also by Shazeer, has gelu(a) in the place of silu(a): the same with GPT-2's gelu and its slope (matmul.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks


def forward_temps(out: Tensor, *_: object, **__: object) -> Temps:
    chunk = (chunk_rows(*out.shape), out.shape[1])
    return [(chunk, acc_dtype(out.dtype))] * 2


@op("out", temps=forward_temps)
def swiglu_forward(out: Tensor, gateup: Tensor, *, gelu: bool = False, scratch: Scratch) -> None:
    """out (n, F) = silu(gateup[:, :F]) * gateup[:, F:], in fp32 or wider and rounded once; gelu: instead of silu."""
    F = out.shape[1]
    gate_, up_ = scratch(forward_temps(out))
    for rows in row_chunks(*out.shape):
        a, b = (x[: len(out[rows])] for x in (gate_, up_))
        _act(a.copy_(gateup[rows, :F]), gelu)
        out[rows].copy_(a.mul_(b.copy_(gateup[rows, F:])))


def _act(x: Tensor, gelu: bool) -> object:
    """silu or gelu, in place."""
    return torch.ops.aten.gelu_(x, approximate="tanh") if gelu else torch.ops.aten.silu_(x)


def backward_temps(d_gateup: Tensor, rewrite: Tensor | None, d_out: Tensor, *_: object, **__: object) -> Temps:
    chunk = (chunk_rows(*d_out.shape), d_out.shape[1])
    return [(chunk, acc_dtype(d_out.dtype))] * 5


@op("d_gateup", "rewrite", temps=backward_temps)
def swiglu_backward(
    d_gateup: Tensor, rewrite: Tensor | None, d_out: Tensor, gateup: Tensor, *, gelu: bool = False, scratch: Scratch
) -> None:
    """d_gateup (n, 2F), which may be gateup, from d_out (n, F). rewrite (n, F) = the output once more, if wanted."""
    F = d_out.shape[1]
    for rows in row_chunks(*d_out.shape):
        a, b, d, s, f = (x[: len(d_out[rows])] for x in scratch(backward_temps(d_gateup, rewrite, d_out)))
        a.copy_(gateup[rows, :F])
        b.copy_(gateup[rows, F:])
        d.copy_(d_out[rows])
        _act(f.copy_(a), gelu)
        if rewrite is not None:
            rewrite[rows].copy_(torch.mul(f, b, out=s))
        d_gateup[rows, F:].copy_(torch.mul(d, f, out=s))
        d.mul_(b)
        if gelu:
            torch.ops.aten.gelu_backward.grad_input(d, a, approximate="tanh", grad_input=d)
        else:
            torch.sigmoid(a, out=s)
            d.mul_(f.mul_(torch.sub(1, s, out=a)).add_(s))
        d_gateup[rows, :F].copy_(d)
