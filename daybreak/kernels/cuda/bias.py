"""Bias gradients: column sums in two stages, the same for every launch, so without atomics.

Stage one: each program adds up its own tiles of rows in fp32 and writes one row of partial sums. Stage two adds those
rows. Which rows meet in which partial sum depends on the shape and on PROGRAMS alone, never on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, float32

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton

PROGRAMS = 1056  # eight for each of an H100's 132 multiprocessors: one wave
ROWS, COLS, WARPS = 8, 512, 4  # tile of stage one: four loads of 16 bytes a thread under way at once
SUM_ROWS, SUM_COLS = 128, 32  # tile of stage two


@triton.jit
def _column_sums_kernel(
    out0, out1, out2, part, P, C,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out_k (C) = or += sum over P rows of part[k] (P, C), k = program_id(1). Sums in fp32, rounded once."""
    k = tl.program_id(1)
    rows, cols = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = cols < C
    part += k.to(tl.int64) * P * C
    at = rows[:, None] * C + cols[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, P, ROWS):
        acc += tl.load(part + at, mask=(start + rows < P)[:, None] & mask[None, :], other=0.0)
        part += ROWS * C
    total = tl.sum(acc, 0)
    out = out0
    if k == 1:
        out = out1
    if k == 2:
        out = out2
    if ACCUMULATE:
        total += tl.load(out + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + cols, total.to(out.dtype.element_ty), mask=mask)


def column_sums(outs: Sequence[Tensor | None], part: Tensor, accumulate: bool) -> None:
    """Each of one to three outs (C) = or += the column sums of its part (P, C) of `part` (3 or 1, P, C) in fp32. None
    is an output that nobody wants."""
    wanted = [(out, k) for k, out in enumerate(outs) if out is not None]
    if len(wanted) < len(outs):
        for out, k in wanted:
            column_sums([out], part[k : k + 1], accumulate)
        return
    _, P, C = part.shape
    _column_sums_kernel[(triton.cdiv(C, SUM_COLS), len(outs))](
        outs[0], outs[1 % len(outs)], outs[-1], part, P, C,
        ACCUMULATE=accumulate, ROWS=SUM_ROWS, COLS=SUM_COLS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _bias_partial_kernel(part, dout, n, O, ROWS: tl.constexpr, COLS: tl.constexpr):
    """part[s] (O) = sum of the row tiles s, s + S, s + 2 S, ... of dout (n, O), for s = program_id(1) of S.

    Tiles count from the last row to the first: the end of what the producer wrote is still in the L2 cache.
    """
    s, S = tl.program_id(1), tl.num_programs(1)
    rows, cols = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = cols < O
    step = (S * ROWS).to(tl.int64) * O
    at = (n - 1 - s * ROWS).to(tl.int64) * O
    inner = cols[None, :] - rows[:, None] * O
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(s * ROWS, n, S * ROWS):
        tile = tl.load(dout + at + inner, mask=(start + rows < n)[:, None] & mask[None, :], other=0.0)
        acc += tile.to(tl.float32)
        at -= step
    tl.store(part + s * O + cols, tl.sum(acc, 0), mask=mask)


def bias_temps(db: Tensor | None, dout: Tensor, **_: object) -> Temps:
    """Partial sums (1, S, O): S row slices for each block of columns, together about PROGRAMS programs."""
    n, O = dout.shape
    splits = min(max(1, PROGRAMS // triton.cdiv(O, COLS)), triton.cdiv(n, ROWS))
    return [((1, splits, O), float32)]


@backend("triton", temps=bias_temps)
def bias_backward(db: Tensor, dout: Tensor, *, accumulate: bool, scratch: Scratch) -> None:
    """db (O) = column sums of dout (n, O), added to db if `accumulate`; fp32 sums, rounded once."""
    (part,) = scratch(bias_temps(db, dout))
    n, O = dout.shape
    _bias_partial_kernel[(triton.cdiv(O, COLS), part.shape[1])](part, dout, n, O, ROWS=ROWS, COLS=COLS, num_warps=WARPS)
    column_sums([db], part, accumulate)
