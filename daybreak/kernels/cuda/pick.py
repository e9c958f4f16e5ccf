"""Picked rows, forward and backward; the meaning of `at` is in kernels/pick.py.

A program takes ROWS of the n rows and COLS of their columns. COLS divides C where it can, so no lane is idle. Rows that
are left out are not read. Both kernels go from the last row to the first: the end of what the producer wrote is still
in the L2 cache.
"""

from __future__ import annotations

from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import tl, triton

TILE, WARPS = 2048, 4  # elements of a program: two loads of 16 bytes a thread in bf16
LEAST_COLS, MOST_COLS = 64, 512  # 64 in bf16 are a line of the cache


@triton.jit
def _tile(at, n, r, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows, its first column, its columns, which of its elements exist, the places of its rows, and
    whether they are picked."""
    blocks = tl.cdiv(C, COLS)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row, start = pid // blocks * ROWS + tl.arange(0, ROWS), pid % blocks * COLS
    col = start + tl.arange(0, COLS)
    place = tl.load(at + row, mask=row < n, other=r)
    mask = (row < n)[:, None] & (col < C)[None, :]
    return row.to(tl.int64), start, col, mask, place.to(tl.int64), place < r


@triton.jit
def _pick_forward_kernel(out, picked, x, targets, at, n, r, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, start, col, mask, place, given = _tile(at, n, r, C, ROWS, COLS)
    mask &= given[:, None]
    value = tl.load(x + row[:, None] * C + col[None, :], mask=mask)
    tl.store(out + place[:, None] * C + col[None, :], value, mask=mask)
    once = given & (start == 0)
    tl.store(picked + place, tl.load(targets + row, mask=once), mask=once)


@triton.jit
def _pick_backward_kernel(dx, d_out, at, n, r, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, _, col, mask, place, given = _tile(at, n, r, C, ROWS, COLS)
    value = tl.load(d_out + place[:, None] * C + col[None, :], mask=mask & given[:, None], other=0.0)
    tl.store(dx + row[:, None] * C + col[None, :], value, mask=mask)


def launch(n: int, C: int) -> tuple[tuple[int], dict[str, int]]:
    """Programs, and the rows, columns and warps of each. Its columns are a power of two that divides C, if one can."""
    cols = min(max(C & -C, LEAST_COLS), MOST_COLS)
    rows = TILE // cols
    return (triton.cdiv(n, rows) * triton.cdiv(C, cols),), {"ROWS": rows, "COLS": cols, "num_warps": WARPS}


@backend("triton")
def pick_forward(out: Tensor, picked: Tensor, x: Tensor, targets: Tensor, at: Tensor) -> None:
    """out (r, C) and picked (r) are rows of x (n, C) and targets (n) int64: row i becomes row at[i], unless that is r
    or more. All contiguous."""
    (n, C), r, (grid, how) = x.shape, len(out), launch(*x.shape)
    _pick_forward_kernel[grid](out, picked, x, targets, at, n, r, C, **how)


@backend("triton")
def pick_backward(dx: Tensor, d_out: Tensor, at: Tensor) -> None:
    """dx (n, C): row i is row at[i] of d_out (r, C), or zeros where at (n) int32 is r or more. All contiguous."""
    (n, C), r, (grid, how) = dx.shape, len(d_out), launch(*dx.shape)
    _pick_backward_kernel[grid](dx, d_out, at, n, r, C, **how)
