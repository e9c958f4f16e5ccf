"""Linear layers: out = x w^T + b with w stored (out, in), and the three products of its backward.

With y = x w^T + b and gradient dy:  dx = dy w,  dw = dy^T x,  db = sum over rows of dy.

The products with something attached (an addend, GELU, GELU's derivative) are operations of their own because a GEMM
library computes them in the epilogue, before its result goes to memory.

GELU is the tanh form, which GPT-2 uses (Hendrycks & Gimpel 2016, section 2), with u = sqrt(2/pi) (x + 0.044715 x^3):

gelu(x) = x/2 (1 + tanh u)
gelu'(x) = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) sqrt(2/pi) (1 + 3 * 0.044715 x^2)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, op

FEW = range(2, 17)
BLOCKS = 16  # of a matrix for one row: as many threads can read it; fixed, so that bits do not depend on how many do


def _few_rows(out: Tensor, x: Tensor, w: Tensor) -> bool:
    """out = x w^T for a few rows in fp32 on a CPU; False if it is another case.

    One row: torch multiplies a vector on one thread, but several matrices on all; reading w is all there is to it.
    More: oneDNN takes half of MKL's time. w goes in as the left operand, which is read as it lies. The result is a
    temporary of oneDNN's, the size of out.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if x.shape[0] == 1:
        n = math.gcd(w.shape[0], BLOCKS)
        torch.bmm(x.expand(n, 1, -1), w.view(n, -1, w.shape[1]).mT, out=out.view(n, 1, -1))
        return True
    oneDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if oneDNN is None or x.shape[0] not in FEW:
        return False
    out.copy_(oneDNN(w, x, None, "none", [], "").t())
    return True


@op("out")
def matmul_forward(out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None) -> None:
    """out (n, O) = x (n, I) @ w (O, I)^T + b (O) + add (n, O), which is not out itself."""
    if _few_rows(out, x, w):
        if b is not None:
            out.add_(b)
    elif b is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(b, x, w.t(), out=out)
    if add is not None:
        out.add_(add)


@op("out", "pre")
def matmul_gelu_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, b: Tensor) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T + b (O), kept for backward; out (n, O) = gelu(pre)."""
    matmul_forward(pre, x, w, b)
    torch.ops.aten.gelu.out(pre, approximate="tanh", out=out)


@op("dx")
def matmul_backward_input(dx: Tensor, dout: Tensor, w: Tensor) -> None:
    """dx (n, I) = dout (n, O) @ w (O, I)."""
    torch.mm(dout, w, out=dx)


@op("dw")
def matmul_backward_weight(dw: Tensor, dout: Tensor, x: Tensor, *, accumulate: bool) -> None:
    """dw (O, I) = dout (n, O)^T @ x (n, I), added to dw if `accumulate`."""
    if accumulate:
        dw.addmm_(dout.t(), x)
    else:
        torch.mm(dout.t(), x, out=dw)


def bias_temps(db: Tensor, dout: Tensor, **_: object) -> Temps:
    return [((dout.shape[1],), dout.dtype)]


@op("db", temps=bias_temps)
def bias_backward(db: Tensor, dout: Tensor, *, accumulate: bool, scratch: Scratch) -> None:
    """db (O) = column sums of dout (n, O), added to db if `accumulate`. torch sums bf16 columns in fp32."""
    if accumulate:
        (total,) = scratch(bias_temps(db, dout))
        torch.sum(dout, 0, out=total)
        db.add_(total)
    else:
        torch.sum(dout, 0, out=db)


def gelu_backward_temps(dpre: Tensor, gelu: Tensor | None, db: Tensor, *_: object, **__: object) -> Temps:
    return bias_temps(db, dpre)


@op("dpre", "gelu", "db", temps=gelu_backward_temps)
def matmul_gelu_backward(
    dpre: Tensor, gelu: Tensor | None, db: Tensor, dout: Tensor, w: Tensor, pre: Tensor,
    *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Back through a linear layer, the GELU before it and the bias before that.

    dpre (n, I) = (dout (n, O) @ w (O, I)) * gelu'(pre (n, I)); db (I) = its column sums, added to db if `accumulate`;
    gelu (n, I) = gelu(pre) once more, where it is given.
    """
    torch.mm(dout, w, out=dpre)
    torch.ops.aten.gelu_backward.grad_input(dpre, pre, approximate="tanh", grad_input=dpre)
    if gelu is not None:
        torch.ops.aten.gelu.out(pre, approximate="tanh", out=gelu)
    bias_backward(db, dpre, accumulate=accumulate, scratch=scratch)
