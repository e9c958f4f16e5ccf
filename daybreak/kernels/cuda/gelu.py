"""GELU and its derivative, element-wise, behind a matmul that has no epilogue for them.

Both go from the last element to the first: the end of what the producer wrote is still in the L2 cache.

(1 + tanh u)/2 = 1 / (1 + exp(-2u)): one exponential, which runs into 0 or infinity at the ends, where the quotient is
exact; and near -0 gelu(x) keeps its relative accuracy, which 1 + tanh u loses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import bias, tl, triton

BLOCK, WARPS = 2048, 4  # 16 values a thread: two loads of 16 bytes in bf16 from each input


@triton.jit
def sigmoid_2u(x):
    """1 / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))


@triton.jit
def _gelu_forward_kernel(out, x, size, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    at = (tl.num_programs(0) - 1 - pid).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    xf = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (xf * sigmoid_2u(xf)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_backward_kernel(grad, x, size, BLOCK: tl.constexpr):
    """grad *= gelu'(x), in place: gelu' = s + x s (1 - s) 2u' with s = (1 + tanh u)/2."""
    pid = tl.program_id(0)
    at = (tl.num_programs(0) - 1 - pid).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    xf = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    df = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid_2u(xf)
    slope = s + s * (1.0 - s) * xf * (1.5957691216057308 + 0.21406626995640576 * xf * xf)
    tl.store(grad + at, (df * slope).to(grad.dtype.element_ty), mask=mask)


def gelu_forward(out: Tensor, x: Tensor) -> None:
    """out = gelu(x), any shape, both contiguous."""
    size = x.numel()
    _gelu_forward_kernel[(triton.cdiv(size, BLOCK),)](out, x, size, BLOCK=BLOCK, num_warps=WARPS)


@backend("triton")
def matmul_gelu_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, b: Tensor) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T + b (O) by torch; out (n, O) = gelu(pre)."""
    torch.addmm(b, x, w.t(), out=pre)
    gelu_forward(out, pre)


def gelu_backward_temps(dpre: Tensor, gelu: Tensor | None, db: Tensor | None, *_: object, **__: object) -> Temps:
    """Partial sums of the bias gradient."""
    return bias.bias_temps(db, dpre)


@backend("triton", temps=gelu_backward_temps)
def matmul_gelu_backward(
    dpre: Tensor, gelu: Tensor | None, db: Tensor | None, dout: Tensor, w: Tensor, pre: Tensor,
    *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """dpre (n, I) = dout (n, O) @ w (O, I) by torch, then * gelu'(pre (n, I)) in place; the rest in other passes."""
    torch.mm(dout, w, out=dpre)
    multiply_by_slope(dpre, pre)
    if gelu is not None:
        gelu_forward(gelu, pre)
    if db is not None:
        bias.bias_backward(db, dpre, accumulate=accumulate, scratch=scratch)


def multiply_by_slope(grad: Tensor, pre: Tensor) -> None:
    """grad *= gelu'(pre), any shape, both contiguous."""
    size = pre.numel()
    _gelu_backward_kernel[(triton.cdiv(size, BLOCK),)](grad, pre, size, BLOCK=BLOCK, num_warps=WARPS)
