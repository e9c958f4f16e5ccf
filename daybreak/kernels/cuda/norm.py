"""LayerNorm in one pass over memory each way; formulas in kernels/norm.py.

A row lies in the registers of one program, which takes rows in strides and asks for its next row before it works on
the one it has: memory stays busy through the reductions. The last row comes first: the end of what the producer wrote
is still in the L2 cache. Backward keeps its sums over rows (dw, db, dbias) in fp32 registers from first row to last and
writes them out once; a second, small kernel adds up what the programs wrote. How many programs there are depends on the
shape alone, so the sums have the same bits on every card.
"""

from __future__ import annotations

from torch import Tensor, float32

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.bias import column_sums
from daybreak.kernels.norm import EPS

# Warps of all programs together: what an H100's 132 multiprocessors hold at once by the registers a thread takes.
FORWARD_WARPS = 28 * 132  # 72 registers
BACKWARD_WARPS = 12 * 132  # of 16 values to a thread: three accumulators and a prefetched row
BACKWARD_WARPS_WRITE = 16 * 132  # the same without an old dx
BACKWARD_WARPS_8 = 20 * 132  # of 8 values
MIN_PROGRAMS = 132


@triton.jit
def _layernorm_forward_kernel(out, mean, rstd, x, w, b, n, C, eps, BLOCK: tl.constexpr):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    wf = tl.load(w + cols, mask=mask, other=0.0).to(tl.float32)
    bf = tl.load(b + cols, mask=mask, other=0.0).to(tl.float32)
    row, step = n - 1 - pid, -programs
    at, stride = row.to(tl.int64) * C, step.to(tl.int64) * C
    following = tl.load(x + at + cols, mask=mask, other=0.0)
    for i in range(pid, n, programs):
        xf = following.to(tl.float32)
        following = tl.load(x + at + stride + cols, mask=mask & (i + programs < n), other=0.0)
        m = tl.sum(xf, 0) / C
        xc = tl.where(mask, xf - m, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(xc * xc, 0) / C + eps)
        tl.store(out + at + cols, (xc * r * wf + bf).to(out.dtype.element_ty), mask=mask)
        tl.store(mean + row, m)
        tl.store(rstd + row, r)
        row += step
        at += stride


@triton.jit
def _layernorm_backward_kernel(
    dx, again, part, dout, x, mean, rstd, w, b, n, C,
    BLOCK: tl.constexpr, ACCUMULATE_DX: tl.constexpr, DBIAS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """part (3, programs, C) in fp32: this program's sums of dout xhat, of dout and of dx over its rows."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    wf = tl.load(w + cols, mask=mask, other=0.0).to(tl.float32)
    if AGAIN:
        bf = tl.load(b + cols, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    row, step = n - 1 - pid, -programs
    at, stride = row.to(tl.int64) * C, step.to(tl.int64) * C
    dout_next = tl.load(dout + at + cols, mask=mask, other=0.0)
    x_next = tl.load(x + at + cols, mask=mask, other=0.0)
    if ACCUMULATE_DX:
        dx_next = tl.load(dx + at + cols, mask=mask, other=0.0)
    m_next, r_next = tl.load(mean + row), tl.load(rstd + row)
    for i in range(pid, n, programs):
        d, xf, m, r = dout_next.to(tl.float32), x_next.to(tl.float32), m_next, r_next
        if ACCUMULATE_DX:
            old = dx_next.to(tl.float32)
        here = at
        row += step
        at += stride
        more = i + programs < n
        dout_next = tl.load(dout + at + cols, mask=mask & more, other=0.0)
        x_next = tl.load(x + at + cols, mask=mask & more, other=0.0)
        if ACCUMULATE_DX:
            dx_next = tl.load(dx + at + cols, mask=mask & more, other=0.0)
        m_next, r_next = tl.load(mean + row, mask=more, other=0.0), tl.load(rstd + row, mask=more, other=0.0)
        xhat = tl.where(mask, xf - m, 0.0) * r
        g = d * wf
        c1 = tl.sum(g, 0) / C
        c2 = tl.sum(g * xhat, 0) / C
        dw += d * xhat
        db += d
        grad = (g - c1 - xhat * c2) * r
        if ACCUMULATE_DX:
            grad += old
        if DBIAS:
            dbias += grad
        tl.store(dx + here + cols, grad.to(dx.dtype.element_ty), mask=mask)
        if AGAIN:
            tl.store(again + here + cols, (xhat * wf + bf).to(again.dtype.element_ty), mask=mask)
    mine = part + pid * C + cols
    plane = programs.to(tl.int64) * C
    tl.store(mine, dw, mask=mask)
    tl.store(mine + plane, db, mask=mask)
    if DBIAS:
        tl.store(mine + 2 * plane, dbias, mask=mask)


def _block(C: int) -> int:
    """The power of two that holds a row."""
    return 1 << (C - 1).bit_length()


def _forward_launch(n: int, C: int) -> tuple[int, int, int]:
    """Programs, block and warps of forward: 16 values of a row to a thread."""
    block = _block(C)
    warps = min(max(block // 512, 2), 16)
    return min(n, max(MIN_PROGRAMS, FORWARD_WARPS // warps)), block, warps


def _backward_launch(n: int, C: int, accumulate_dx: bool) -> tuple[int, int, int]:
    """Programs, block and warps of backward: 8 values of a row to a thread, 16 above C = 1024."""
    block = _block(C)
    warps = min(max(block // 512, 4), 32 if block > 8192 else 16)
    wide = BACKWARD_WARPS if accumulate_dx else BACKWARD_WARPS_WRITE
    together = wide if block > 256 * warps else BACKWARD_WARPS_8
    return min(n, max(MIN_PROGRAMS, together // warps)), block, warps


@backend("triton")
def layernorm_forward(out: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, w: Tensor, b: Tensor) -> None:
    """out (n, C) = layernorm(x (n, C)) * w (C) + b (C); mean, rstd (n) in fp32 are kept for backward."""
    n, C = x.shape
    programs, block, warps = _forward_launch(n, C)
    _layernorm_forward_kernel[(programs,)](out, mean, rstd, x, w, b, n, C, EPS, BLOCK=block, num_warps=warps)


def backward_temps(
    dx: Tensor, dw: Tensor, db: Tensor, dbias: Tensor | None, again: Tensor | None, dout: Tensor,
    *_: object, accumulate_dx: bool, **__: object,
) -> Temps:  # fmt: skip
    """The programs' sums for dw, db and, if asked for, dbias."""
    n, C = dout.shape
    return [((2 if dbias is None else 3, _backward_launch(n, C, accumulate_dx)[0], C), float32)]


@backend("triton", temps=backward_temps)
def layernorm_backward(
    dx: Tensor, dw: Tensor, db: Tensor, dbias: Tensor | None, again: Tensor | None,
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor,
    *, accumulate_dx: bool, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """dx (n, C), dw, db, dbias (C) and again (n, C) from dout (n, C): see the reference. dx may be dout."""
    (part,) = scratch(backward_temps(dx, dw, db, dbias, again, dout, accumulate_dx=accumulate_dx))
    backward_rows(dx, again, part, dout, x, mean, rstd, w, b, accumulate_dx=accumulate_dx)
    column_sums([dw, db] if dbias is None else [dw, db, dbias], part, accumulate)


def backward_rows(
    dx: Tensor, again: Tensor | None, part: Tensor, dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    w: Tensor, b: Tensor, *, accumulate_dx: bool,
) -> None:  # fmt: skip
    """The first stage: all but the sums over programs."""
    n, C = dout.shape
    programs, block, warps = _backward_launch(n, C, accumulate_dx)
    _layernorm_backward_kernel[(programs,)](
        dx, dx if again is None else again, part, dout, x, mean, rstd, w, b, n, C,
        BLOCK=block, ACCUMULATE_DX=accumulate_dx, DBIAS=part.shape[0] == 3, AGAIN=again is not None, num_warps=warps,
    )  # fmt: skip
