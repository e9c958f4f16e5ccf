"""The element-wise parts of Muon's update on a GPU. kernels/muon.py has the formulas.

The speed of memory limits all of them. A program of muon_momentum has one row, so that the row's norm is known before
the row is written. muon_update is two launches: one program makes the factors, and many use them.
"""

from __future__ import annotations

import math

from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.optimizer import layout_of, load_exact, signed_key, store_exact
from daybreak.kernels.muon import ABOVE, LEAST, LEAST_SECOND

ROWS, COLS = 32, 64  # of a tile whose columns are summed
BLOCK = 1024  # elements of a row that a program updates


def _warps(elements: int) -> int:
    """32 elements a thread at most, up to 16 warps."""
    return min(16, max(4, elements // 1024))


@triton.jit
def _momentum_kernel(x, momentum, grads, stats, hyper, c, shrink, least, BLOCK: tl.constexpr):
    if tl.load(stats + 3) == 0.0:
        cols = tl.arange(0, BLOCK)
        mask = cols < c
        at = tl.program_id(0).to(tl.int64) * c + cols
        g = tl.load(grads + at, mask=mask, other=0.0).to(tl.float32) * tl.load(stats + 2).to(tl.float32)
        mu = tl.load(hyper + 3).to(tl.float32)
        m = tl.load(momentum + at, mask=mask, other=0.0)
        m += (1.0 - mu) * (g - m)
        u = g + mu * (m - g)
        norm = tl.sqrt(tl.maximum(tl.sum(u * u, 0), least))
        tl.store(momentum + at, m, mask=mask)
        tl.store(x + at, (u / (norm * shrink)).to(x.dtype.element_ty), mask=mask)


@backend("triton")
def muon_momentum(x: Tensor, momentum: Tensor, grads: Tensor, stats: Tensor, hyper: Tensor) -> None:
    """x (r, c, bf16 or fp32) and momentum (r, c, fp32), from grads (r, c)."""
    r, c = x.shape
    block = triton.next_power_of_2(c)
    _momentum_kernel[(r,)](
        x, momentum, grads, stats, hyper, c, ABOVE * math.sqrt(r), LEAST, BLOCK=block, num_warps=_warps(block)
    )


@triton.jit
def _row_sums_kernel(sums, x, c, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    u = tl.load(x + row.to(tl.int64) * c + cols, mask=cols < c, other=0.0).to(tl.float32)
    tl.store(sums + row, tl.sum(u * u, 0))


@triton.jit
def _column_sums_kernel(sums, x, r, c, ROWS: tl.constexpr, COLS: tl.constexpr):
    unit = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, r, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        u = tl.load(x + (unit * r + rows) * c + cols, mask=(rows < r) & (cols < c), other=0.0).to(tl.float32)
        acc += u * u
    at = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tl.store(sums + unit * c + at, tl.sum(acc, 0), mask=at < c)


@backend("triton")
def muon_sums(sums: Tensor, x: Tensor) -> None:
    """sums (n, max(r, c), fp32) of x (n, r, c)."""
    n, r, c = x.shape
    if r >= c:
        block = triton.next_power_of_2(c)
        _row_sums_kernel[(n * r,)](sums, x, c, BLOCK=block, num_warps=_warps(block))
    else:
        _column_sums_kernel[(triton.cdiv(c, COLS), n)](sums, x, r, c, ROWS=ROWS, COLS=COLS, num_warps=4)


@triton.jit
def _factors_kernel(second, sums, stats, n, small, beta2, rest2, least, least_second, BLOCK: tl.constexpr):
    """second, and in place of the sums f, of one matrix: one program."""
    if tl.load(stats + 3) == 0.0:
        lanes = tl.arange(0, BLOCK)
        mask = lanes < n
        s = tl.load(sums + lanes, mask=mask, other=0.0)
        v = beta2 * tl.load(second + lanes, mask=mask, other=0.0) + rest2 * (s / tl.maximum(tl.sum(s, 0), least))
        root = 1.0 / tl.sqrt(tl.maximum(v, least_second))
        now = tl.maximum(tl.sum(s * root * root, 0), least)
        tl.store(second + lanes, v, mask=mask)
        tl.store(sums + lanes, root * tl.sqrt(small / now), mask=mask)


@triton.jit
def _update_kernel(
    weights, masters, factors, x, stats, hyper, c, shape, weight_decay, offset, key,
    BY_ROW: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(stats + 3) == 0.0:
        row = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask, at = cols < c, row * c + cols
        u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        p = load_exact(weights, masters, at, mask, LAYOUT)
        u *= tl.load(factors + row) if BY_ROW else tl.load(factors + cols, mask=mask, other=0.0)
        u += tl.where(u * p >= 0.0, weight_decay * tl.load(hyper + 4).to(tl.float32) * p, 0.0)
        p -= tl.load(hyper).to(tl.float32) * shape * u
        store_exact(weights, masters, p, at, mask, at + offset, key, hyper, LAYOUT)


@backend("triton")
def muon_update(
    weights: Tensor, masters: Tensor | None, second: Tensor, sums: Tensor, x: Tensor, stats: Tensor, hyper: Tensor,
    *, beta2: float, weight_decay: float, seed: int, offset: int,
) -> None:  # fmt: skip
    """One matrix in fp32, scalars read on the device; weights in bf16 or fp32."""
    (r, c), (layout, exact), n = x.shape, layout_of(weights, masters), second.numel()
    block = triton.next_power_of_2(n)
    _factors_kernel[(1,)](
        second, sums, stats, n, float(min(r, c)), beta2, 1.0 - beta2, LEAST, LEAST_SECOND,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    _update_kernel[(r, triton.cdiv(c, BLOCK))](
        weights, exact, sums, x, stats, hyper, c, math.sqrt(max(1.0, r / c)), weight_decay, offset, signed_key(seed),
        BY_ROW=r >= c, LAYOUT=layout, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
