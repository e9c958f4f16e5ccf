"""SwiGLU and GeGLU, element-wise, forward and backward; formulas in kernels/glu.py.

Both go from the last element to the first: the end of what the producer wrote is still in the L2 cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.gelu import sigmoid_2u

BLOCK, WARPS = 1024, 4  # 8 columns a thread: a load of 16 bytes in bf16 from each half


@triton.jit
def _row(F, BLOCK: tl.constexpr):
    """This program's row, its columns of either half, and whether they exist."""
    blocks = tl.cdiv(F, BLOCK)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    cols = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    return (pid // blocks).to(tl.int64), cols, cols < F


@triton.jit
def gate_sigmoid(a, GELU: tl.constexpr):
    """s of act(a) = a s: silu's, or gelu's."""
    if GELU:
        return sigmoid_2u(a)
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def _swiglu_forward_kernel(out, gateup, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, cols, mask = _row(F, BLOCK)
    at = gateup + row * 2 * F + cols
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    y = a * gate_sigmoid(a, GELU) * b
    tl.store(out + row * F + cols, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    d_gateup, rewrite, d_out, gateup, F, AGAIN: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row, cols, mask = _row(F, BLOCK)
    at = row * 2 * F + cols
    a = tl.load(gateup + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(gateup + at + F, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(d_out + row * F + cols, mask=mask, other=0.0).to(tl.float32)
    s = gate_sigmoid(a, GELU)
    f = a * s
    slope = f * (1.0 - s)
    if GELU:
        slope *= 1.5957691216057308 + 0.21406626995640576 * a * a  # that of 2u
    if AGAIN:
        tl.store(rewrite + row * F + cols, (f * b).to(rewrite.dtype.element_ty), mask=mask)
    tl.store(d_gateup + at, (d * b * (s + slope)).to(d_gateup.dtype.element_ty), mask=mask)
    tl.store(d_gateup + at + F, (d * f).to(d_gateup.dtype.element_ty), mask=mask)


@backend("triton")
def swiglu_forward(out: Tensor, gateup: Tensor, *, gelu: bool = False) -> None:
    """out (n, F) = silu(gateup[:, :F]) * gateup[:, F:], both contiguous; in fp32, rounded once. gelu: not silu."""
    n, F = out.shape
    _swiglu_forward_kernel[(n * triton.cdiv(F, BLOCK),)](out, gateup, F, GELU=gelu, BLOCK=BLOCK, num_warps=WARPS)


@backend("triton")
def swiglu_backward(
    d_gateup: Tensor, rewrite: Tensor | None, d_out: Tensor, gateup: Tensor, *, gelu: bool = False
) -> None:
    """d_gateup (n, 2F), which may be gateup, from d_out (n, F); rewrite (n, F) = the output once more, if wanted."""
    n, F = d_out.shape
    _swiglu_backward_kernel[(n * triton.cdiv(F, BLOCK),)](
        d_gateup, d_out if rewrite is None else rewrite, d_out, gateup, F,
        AGAIN=rewrite is not None, GELU=gelu, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@backend("triton")
def matmul_swiglu_forward(
    out: Tensor, gateup: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, *, gelu: bool = False
) -> None:
    """gateup (n, 2F) = x (n, I) @ w (2F, I)^T + b (2F) by torch; out (n, F) from it in another pass."""
    torch.mm(x, w.t(), out=gateup) if b is None else torch.addmm(b, x, w.t(), out=gateup)
    swiglu_forward(out, gateup, gelu=gelu)


@backend("triton")
def matmul_swiglu_backward(
    d_gateup: Tensor, rewrite: Tensor | None, d_act: Tensor, dout: Tensor, w: Tensor, gateup: Tensor,
    *, gelu: bool = False,
) -> None:  # fmt: skip
    """d_act (n, F) = dout (n, O) @ w (O, F) by torch; the rest from it in another pass."""
    torch.mm(dout, w, out=d_act)
    swiglu_backward(d_gateup, rewrite, d_act, gateup, gelu=gelu)
