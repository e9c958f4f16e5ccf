"""Sums of two streams with learned scalars, element-wise; formulas in kernels/mix.py.

A program of backward takes several blocks, in strides, and writes its two sums out once. How many programs there are
depends on the shape alone, so the sums have the same bits on every GPU.
"""

from __future__ import annotations

from torch import Tensor, float32

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.bias import column_sums

BLOCK, WARPS = 2048, 4
PROGRAMS = 132 * 8  # of backward: what an H100's 132 multiprocessors hold of 64 registers a thread


@triton.jit
def _mix_forward_kernel(out, x, y, a, b, factor, size, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xf = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    yf = tl.load(y + at, mask=at < size, other=0.0).to(tl.float32)
    if A:
        xf *= tl.load(a).to(tl.float32)
    if B:
        factor *= tl.load(b).to(tl.float32)
    tl.store(out + at, (xf + yf * factor).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _mix_backward_kernel(
    dx, dy, part, dout, x, y, a, b, factor, size, DX: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ACCUMULATE_DY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part (2, programs) in fp32: this program's sums of dout x and of factor dout y."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    fa = 1.0
    fb = factor
    if A:
        fa = tl.load(a).to(tl.float32)
    if B:
        fb *= tl.load(b).to(tl.float32)
    sum_a = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, tl.cdiv(size, BLOCK) - pid, programs):
        at = (pid + i).to(tl.int64) * BLOCK + lanes
        d = tl.load(dout + at, mask=at < size, other=0.0).to(tl.float32)
        if A:
            sum_a += d * tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        if B:
            sum_b += d * tl.load(y + at, mask=at < size, other=0.0).to(tl.float32)
        grad = d * fb
        if ACCUMULATE_DY:
            grad += tl.load(dy + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(dy + at, grad.to(dy.dtype.element_ty), mask=at < size)
        if DX:
            tl.store(dx + at, (d * fa).to(dx.dtype.element_ty), mask=at < size)
    tl.store(part + pid, tl.sum(sum_a, 0))
    tl.store(part + programs + pid, tl.sum(sum_b, 0) * factor)


@backend("triton")
def mix_forward(out: Tensor, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, *, factor: float = 1.0) -> None:
    """out (n, C) = a x + factor b y, all contiguous; out may be x or y. a, b (1): None is 1."""
    _mix_forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        out, x, y, x if a is None else a, x if b is None else b, factor, x.numel(),
        A=a is not None, B=b is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def backward_temps(
    dx: Tensor | None, dy: Tensor, da: Tensor | None, db: Tensor | None, dout: Tensor, *_: object, **__: object
) -> Temps:
    """The programs' two sums."""
    return [((2, min(PROGRAMS, triton.cdiv(dout.numel(), BLOCK)), 1), float32)]


@backend("triton", temps=backward_temps)
def mix_backward(
    dx: Tensor | None, dy: Tensor, da: Tensor | None, db: Tensor | None, dout: Tensor, x: Tensor | None, y: Tensor,
    a: Tensor | None, b: Tensor | None, *, factor: float = 1.0, accumulate_dy: bool, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of mix_forward, all contiguous: see the reference. dx may be dout."""
    (part,) = scratch(backward_temps(dx, dy, da, db, dout))
    _mix_backward_kernel[(part.shape[1],)](
        dy if dx is None else dx, dy, part, dout, y if x is None else x, y, y if a is None else a,
        y if b is None else b, factor, dout.numel(), DX=dx is not None, A=a is not None, B=b is not None,
        ACCUMULATE_DY=accumulate_dy, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    column_sums([da, db], part, accumulate)
