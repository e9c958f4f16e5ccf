"""LayerNorm and RMSNorm in one pass over memory each way; formulas in kernels/norm.py.

A program of forward takes two rows and is done: the next ones keep memory busy. One of backward keeps sums over rows
(dw, db, dbias) in fp32 registers and writes them out once, so it takes two rows at a time, in strides, and those that
come next travel to shared memory meanwhile (tl.range with stages, where C is a multiple of 16, as all of GPT-2's widths
are: else Triton makes plain loads of them). A second, small kernel adds up what the programs wrote. How many programs
there are depends on the shape alone, so the sums have the same bits on every GPU. The last rows come first: the end of
what the producer wrote is still in the L2 cache.

RMSNorm is the same kernel without mean and bias. Its rows may be heads, HEADS of each token, whose tokens lie apart.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, finfo, float32

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.bias import column_sums
from daybreak.kernels.cuda.rounding import rounded
from daybreak.kernels.norm import EPS

# Warps of all programs together: as many as an H100's 132 multiprocessors hold of 128 registers a thread.
BACKWARD_WARPS = 16 * 132
MIN_PROGRAMS = 132
HEAD_TILE = 2048  # elements of the rows of heads that a program takes at a time
STAGES = 3  # one turn's rows of each tensor in work, two turns' on their way
AHEAD = 96 << 10  # bytes of shared memory for those on their way, at most: sm_86 and sm_89 have 99 KB


@triton.jit
def _place(at, row, cols, stride, C, HEADS: tl.constexpr):
    """Where elements of a row are: `at` if rows follow each other, else those of a head, tokens `stride` apart."""
    if HEADS == 0:
        return at
    return ((row // HEADS).to(tl.int64) * stride + (row % HEADS) * C)[:, None] + cols


@triton.jit
def _layernorm_forward_kernel(
    out, mean, rstd, x, w, b, add, out_s, x_s, n, C, eps, RMS: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr = 0.0, ADD: tl.constexpr = False,
    LARGEST: tl.constexpr = 0.0,
):  # fmt: skip
    """LARGEST: out is in fp8, whose largest value this is, and `add` is its scale."""
    cols = tl.arange(0, BLOCK)[None, :]
    mask = cols < C
    row = n - 1 - (tl.program_id(0) * ROWS + tl.arange(0, ROWS))
    at = row.to(tl.int64)[:, None] * C + cols
    here = mask & (row >= 0)[:, None]
    xf = tl.load(x + _place(at, row, cols, x_s, C, HEADS), mask=here, other=0.0).to(tl.float32)
    wf = tl.load(w + cols, mask=mask, other=0.0).to(tl.float32)
    if RMS:
        r = 1.0 / tl.sqrt(tl.sum(xf * xf, 1) / C + eps)
        y = xf * r[:, None] * (wf + OFFSET if OFFSET != 0.0 else wf)
        if ADD:
            y += tl.load(add + at, mask=here, other=0.0).to(tl.float32)
    else:
        bf = tl.load(b + cols, mask=mask, other=0.0).to(tl.float32)
        m = tl.sum(xf, 1) / C
        xc = tl.where(mask, xf - m[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(xc * xc, 1) / C + eps)
        y = xc * r[:, None] * wf + bf
        tl.store(mean + row, m, mask=row >= 0)
    to = out + _place(at, row, cols, out_s, C, HEADS)
    if LARGEST > 0.0:
        y = rounded(y, tl.load(add), LARGEST, out.dtype.element_ty)
        to = tl.max_contiguous(to, [1, 8])
    tl.store(to, y.to(out.dtype.element_ty), mask=here)
    tl.store(rstd + row, r, mask=row >= 0)


@triton.jit
def _add(a, b, more_a, more_b):
    """Two sums in one reduction, whose threads then wait for each other once."""
    return a + more_a, b + more_b


@triton.jit
def _layernorm_backward_kernel(
    dx, again, part, dout, x, mean, rstd, w, b, dx_s, again_s, dout_s, x_s, n, C,
    ACCUMULATE_DX: tl.constexpr, DBIAS: tl.constexpr, AGAIN: tl.constexpr, RMS: tl.constexpr, HEADS: tl.constexpr,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part (3, programs, C) in fp32: this program's sums of dout xhat, of dout and of dx over its rows. RMS: the first.

    Rows travel ahead of the stores to dx, which may be dout: no row is another one's.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = cols < C
    wf = tl.load(w + cols, mask=mask, other=0.0).to(tl.float32)
    if OFFSET != 0.0:
        wf += OFFSET
    if AGAIN and not RMS:
        bf = tl.load(b + cols, mask=mask, other=0.0).to(tl.float32)
    KEPT: tl.constexpr = ROWS if HEADS else 1  # of many short rows, the sums over rows are made once, at the end
    dw = tl.zeros((KEPT, BLOCK), tl.float32)
    db = tl.zeros((1, BLOCK), tl.float32)
    dbias = tl.zeros((1, BLOCK), tl.float32)
    # Mean and rstd, a number a row, are asked for a turn ahead by hand: in registers, without a copy of their own.
    row = n - 1 - (pid * ROWS + tl.arange(0, ROWS))
    r_next = tl.load(rstd + row, mask=row >= 0, other=0.0)
    if not RMS:
        m_next = tl.load(mean + row, mask=row >= 0, other=0.0)
    for i in tl.range(pid * ROWS, n, programs * ROWS, num_stages=STAGES):
        row = n - 1 - (i + tl.arange(0, ROWS))
        at = row.to(tl.int64)[:, None] * C + cols
        here = mask & (row >= 0)[:, None]  # where a row is none, all that is read is 0 and adds nothing
        d = tl.load(dout + _place(at, row, cols, dout_s, C, HEADS), mask=here, other=0.0).to(tl.float32)
        xf = tl.load(x + _place(at, row, cols, x_s, C, HEADS), mask=here, other=0.0).to(tl.float32)
        to = _place(at, row, cols, dx_s, C, HEADS)
        if ACCUMULATE_DX:
            old = tl.load(dx + to, mask=here, other=0.0).to(tl.float32)
        if AGAIN:
            renewed = _place(at, row, cols, again_s, C, HEADS)
        r = r_next[:, None]
        if not RMS:
            m = m_next[:, None]
        row -= programs * ROWS
        r_next = tl.load(rstd + row, mask=row >= 0, other=0.0)
        g = d * wf
        if RMS:
            xhat = xf * r
            grad = (g - xhat * (tl.sum(g * xhat, 1)[:, None] / C)) * r
        else:
            m_next = tl.load(mean + row, mask=row >= 0, other=0.0)
            xhat = tl.where(mask, xf - m, 0.0) * r
            c1, c2 = tl.reduce((g, g * xhat), 1, _add)
            c1 = c1[:, None] / C
            c2 = c2[:, None] / C
            db += tl.sum(d, 0)[None, :]
            grad = (g - c1 - xhat * c2) * r
        if HEADS:
            dw += d * xhat
        else:
            dw += tl.sum(d * xhat, 0)[None, :]
        if ACCUMULATE_DX:
            grad += old
        if DBIAS:
            dbias += tl.sum(grad, 0)[None, :]
        tl.store(dx + to, grad.to(dx.dtype.element_ty), mask=here)
        if AGAIN:
            y = xhat * wf
            if not RMS:
                y += bf
            tl.store(again + renewed, y.to(again.dtype.element_ty), mask=here)
    if HEADS:
        dw = tl.sum(dw, 0)[None, :]
    mine = part + pid * C + cols
    plane = programs.to(tl.int64) * C
    tl.store(mine, dw, mask=mask)
    if not RMS:
        tl.store(mine + plane, db, mask=mask)
    if DBIAS:
        tl.store(mine + 2 * plane, dbias, mask=mask)


class Launch(NamedTuple):
    """How many programs of how many warps, what each takes at a time, and how far ahead."""

    programs: int
    rows: int
    block: int
    warps: int
    stages: int = 1


def forward_launch(x: Tensor, heads: int = 0) -> Launch:
    """The launch of forward for rows x (..., C): up to 32 columns of a row to a thread (C <= 16384). Heads are short
    rows, so a program takes more of them."""
    C = x.shape[-1]
    block = triton.next_power_of_2(C)
    rows = max(2, HEAD_TILE // block) if heads else 2 if block <= 8192 else 1
    warps = min(max((rows * block // 2 if heads else block) // 1024, 2), 16)
    return Launch(triton.cdiv(x.numel() // C, rows), rows, block, warps)


def backward_launch(dout: Tensor, accumulate_dx: bool, heads: int = 0) -> Launch:
    """The launch of backward for dout (..., C): 8 columns to a thread (16 above 4096), because of the accumulators."""
    C = dout.shape[-1]
    block = triton.next_power_of_2(C)
    rows = max(2, HEAD_TILE // block) if heads else 2 if block <= 4096 else 1
    warps = min(max(rows * block // 256 if heads else block // 256, 1), 32 if block > 8192 else 16)
    tile = (2 + accumulate_dx) * rows * block * dout.element_size()  # dout, x and the old dx
    stages = min(STAGES, 1 + AHEAD // tile)
    programs = min(triton.cdiv(dout.numel() // C, rows), max(MIN_PROGRAMS, BACKWARD_WARPS // warps))
    return Launch(programs, rows, block, warps, stages)


@backend("triton")
def layernorm_forward(out: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, w: Tensor, b: Tensor) -> None:
    """out (n, C) = layernorm(x (n, C)) * w (C) + b (C); mean, rstd (n) in fp32 are kept for backward."""
    forward_rows(out, mean, rstd, x, w, b)


def forward_rows(
    out: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, w: Tensor, b: Tensor, scale: Tensor | None = None
) -> None:
    """The same; scale: of an output in fp8, which is divided by it."""
    programs, rows, block, warps, _ = forward_launch(x)
    _layernorm_forward_kernel[(programs,)](
        out, mean, rstd, x, w, b, x if scale is None else scale, 0, 0, *x.shape, EPS, RMS=False, HEADS=0,
        LARGEST=0.0 if scale is None else finfo(out.dtype).max, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def backward_temps(
    dx: Tensor, dw: Tensor | None, db: Tensor | None, dbias: Tensor | None, again: Tensor | None, dout: Tensor,
    *_: object, accumulate_dx: bool, **__: object,
) -> Temps:  # fmt: skip
    """The programs' sums for dw, db and, if asked for, dbias."""
    return [((2 if dbias is None else 3, backward_launch(dout, accumulate_dx).programs, dout.shape[1]), float32)]


@backend("triton", temps=backward_temps)
def layernorm_backward(
    dx: Tensor, dw: Tensor | None, db: Tensor | None, dbias: Tensor | None, again: Tensor | None,
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor,
    *, accumulate_dx: bool, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """dx (n, C), dw, db, dbias (C) and again (n, C) from dout (n, C): see the reference. dx may be dout."""
    (part,) = scratch(backward_temps(dx, dw, db, dbias, again, dout, accumulate_dx=accumulate_dx))
    backward_rows(dx, again, part, dout, x, mean, rstd, w, b, accumulate_dx=accumulate_dx)
    column_sums([dw, db] if dbias is None else [dw, db, dbias], part, accumulate)


def backward_rows(
    dx: Tensor, again: Tensor | None, part: Tensor, dout: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor,
    w: Tensor, b: Tensor | None, *, accumulate_dx: bool, offset: float = 0.0,
) -> None:  # fmt: skip
    """The first stage: all but the sums over programs. Without mean and bias it is RMSNorm's."""
    heads = _heads(dx, dout, x, *(() if again is None else (again,)))
    programs, rows, block, warps, stages = backward_launch(dout, accumulate_dx, heads)
    again_ = dx if again is None else again
    C, rms = dout.shape[-1], mean is None
    _layernorm_backward_kernel[(programs,)](
        dx, again_, part, dout, x, rstd if rms else mean, rstd, w, w if rms else b,
        *(t.stride(0) if heads else 0 for t in (dx, again_, dout, x)), dout.numel() // C, C,
        ACCUMULATE_DX=accumulate_dx, DBIAS=part.shape[0] == 3, AGAIN=again is not None, RMS=rms, HEADS=heads,
        OFFSET=offset, ROWS=rows, BLOCK=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip


def _heads(*tensors: Tensor) -> int:
    """Heads of each token where rows are (n, heads, C), else 0."""
    if tensors[0].dim() == 2:
        assert all(x.is_contiguous() for x in tensors), "rows follow each other"
        return 0
    assert all(x[0].is_contiguous() for x in tensors), "a token's heads follow each other"
    return tensors[0].shape[1]


@backend("triton")
def rmsnorm_forward(
    out: Tensor, rstd: Tensor, x: Tensor, weight: Tensor,
    *, eps: float, offset: float = 0.0, add: Tensor | None = None,
) -> None:  # fmt: skip
    """out = x / sqrt(mean(x^2) + eps) * (offset + weight (C)) + add, rows (n, C) or, without add, (n, heads, C) whose
    heads follow each other."""
    rms_rows(out, rstd, x, weight, eps=eps, offset=offset, add=add)


def rms_rows(
    out: Tensor, rstd: Tensor, x: Tensor, weight: Tensor,
    *, eps: float, offset: float = 0.0, add: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """The same; scale: of an output in fp8, which is divided by it."""
    heads, C = _heads(out, x, *(() if add is None else (add,))), x.shape[-1]
    assert add is None or not heads, "add has rows of channels"
    programs, rows, block, warps, _ = forward_launch(x, heads)
    more, largest = scale if add is None else add, 0.0 if scale is None else finfo(out.dtype).max
    _layernorm_forward_kernel[(programs,)](
        out, rstd, rstd, x, weight, weight, x if more is None else more, out.stride(0), x.stride(0), x.numel() // C, C,
        eps, RMS=True, HEADS=heads, OFFSET=offset, ADD=add is not None, LARGEST=largest, ROWS=rows, BLOCK=block,
        num_warps=warps,
        # With one column a thread, a fused multiply-add would give each thread of a row its own last bit of the sum.
        enable_fp_fusion=block > 32,
    )  # fmt: skip


def rms_backward_temps(
    dx: Tensor, dweight: Tensor | None, rewrite: Tensor | None, dout: Tensor, x: Tensor, *_: object,
    accumulate_dx: bool, **__: object,
) -> Temps:  # fmt: skip
    """The programs' sums for dweight."""
    heads = _heads(dx, dout, x, *(() if rewrite is None else (rewrite,)))
    return [((1, backward_launch(dout, accumulate_dx, heads).programs, dout.shape[-1]), float32)]


@backend("triton", temps=rms_backward_temps)
def rmsnorm_backward(
    dx: Tensor, dweight: Tensor | None, rewrite: Tensor | None, dout: Tensor, x: Tensor, rstd: Tensor, weight: Tensor,
    *, accumulate_dx: bool, accumulate: bool, offset: float = 0.0, scratch: Scratch,
) -> None:  # fmt: skip
    """dx and rewrite like x, dweight (C) from dout: see the reference. dx may be dout."""
    (part,) = scratch(rms_backward_temps(dx, dweight, rewrite, dout, x, accumulate_dx=accumulate_dx))
    backward_rows(dx, rewrite, part, dout, x, None, rstd, weight, None, accumulate_dx=accumulate_dx, offset=offset)
    column_sums([dweight], part, accumulate)
