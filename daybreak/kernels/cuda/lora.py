"""LoRA's narrow matmuls on GPUs; formulas in kernels/lora.py. All are bound by the memory of x, y and dy.

Three kernels serve all matmuls with a matrix of few columns, R of them with padding:

    narrow    u (n, r) = scale x (n, K) m (K, r)      a program reads its rows of x once, and m from the L2 cache
    widen     y (n, N) += scale u (n, r) m (r, N)     a program updates a tile of y
    gather    g (N, r) = scale x (n, N)^T u (n, r)    a program sums a run of rows for its columns of x

Gather's runs are summed in a second pass, in order, so that results are equal in every run. With more than WIDEST
columns torch takes over, since cuBLAS is good at such matmuls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import INTERPRET, tl, triton
from daybreak.kernels.cuda.attention import dot
from daybreak.kernels.lora import Columns, each_part

WIDEST = 64
STEP, COLS, WARPS, STAGES = 128, 128, 4, 3
MANY = 8192  # rows from which on half as many programs still fill a GPU
PROGRAMS, RUN = 512, 256  # of gather at about, and rows that one of them sums at least


@triton.jit
def _narrow_kernel(
    u, x, m, n, K, r, u_s, x_s, m_k, m_r, scale,
    R: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols, acc = tl.arange(0, R)[None, :], tl.zeros((ROWS, R), tl.float32)
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        left = tl.load(x + rows * x_s + k[None, :], mask=(rows < n) & (k[None, :] < K), other=0.0)
        right = tl.load(m + k[:, None] * m_k + cols * m_r, mask=(k[:, None] < K) & (cols < r), other=0.0)
        acc = dot(left, right, acc, PRECISION, UPCAST)
    tl.store(u + rows * u_s + cols, (acc * scale).to(u.dtype.element_ty), mask=(rows < n) & (cols < r))


@triton.jit
def _widen_kernel(
    y, u, m, n, N, r, y_s, u_s, m_r, m_n, scale,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols, k = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :], tl.arange(0, R)
    left = tl.load(u + rows * u_s + k[None, :], mask=(rows < n) & (k[None, :] < r), other=0.0)
    right = tl.load(m + k[:, None] * m_r + cols * m_n, mask=(k[:, None] < r) & (cols < N), other=0.0)
    at, mask = y + rows * y_s + cols, (rows < n) & (cols < N)
    old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    more = dot(left, right, tl.zeros((ROWS, COLS), tl.float32), PRECISION, UPCAST) * scale
    tl.store(at, (old + more).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gather_kernel(
    part, x, u, n, N, r, x_s, u_s, run,
    R: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    cols, k = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.arange(0, R)[None, :]
    first, acc = tl.program_id(1) * run, tl.zeros((COLS, R), tl.float32)
    stop = tl.minimum(first + run, n)
    for start in range(first, stop, STEP):
        rows = (start + tl.arange(0, STEP)).to(tl.int64)[:, None]
        left = tl.load(x + rows * x_s + cols[None, :], mask=(rows < stop) & (cols[None, :] < N), other=0.0)
        right = tl.load(u + rows * u_s + k, mask=(rows < stop) & (k < r), other=0.0)
        acc = dot(tl.trans(left), right, acc, PRECISION, UPCAST)
    at = (tl.program_id(1) * N + cols).to(tl.int64)[:, None] * R + k
    tl.store(part + at, acc, mask=cols[:, None] < N)


@triton.jit
def _gather_sum_kernel(
    out, part, N, r, runs, o_n, o_r, scale, ACCUMULATE: tl.constexpr, R: tl.constexpr, COLS: tl.constexpr
):
    cols, k = (tl.program_id(0) * COLS + tl.arange(0, COLS))[:, None], tl.arange(0, R)[None, :]
    mask, total = (cols < N) & (k < r), tl.zeros((COLS, R), tl.float32)
    for run in range(runs):
        total += tl.load(part + (run * N + cols).to(tl.int64) * R + k, mask=mask, other=0.0)
    total, at = total * scale, out + cols * o_n + k * o_r
    if ACCUMULATE:
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)


def _padded(r: int) -> int:
    """Columns of a tile of r: a matmul's tile has 16 at least."""
    return max(16, triton.next_power_of_2(r))


def _shape(r: int) -> dict[str, Any]:
    """The arguments of all kernels that multiply."""
    return {"R": _padded(r), "PRECISION": "ieee", "UPCAST": INTERPRET, "num_warps": WARPS}


def _narrow(u: Tensor, x: Tensor, m: Tensor, scale: float) -> None:
    """u (n, r) = scale x (n, K) m (K, r)."""
    (n, K), r = x.shape, m.shape[1]
    if r > WIDEST:
        torch.addmm(u, x, m, beta=0, alpha=scale, out=u)
        return
    rows = 64 if n >= MANY else 32
    _narrow_kernel[(triton.cdiv(n, rows),)](
        u, x, m, n, K, r, u.stride(0), x.stride(0), *m.stride(), scale,
        ROWS=rows, STEP=STEP if x.dtype == torch.bfloat16 else STEP // 4, num_stages=STAGES, **_shape(r),
    )  # fmt: skip


def _widen(y: Tensor, u: Tensor, m: Tensor, scale: float) -> None:
    """y (n, N) += scale u (n, r) m (r, N)."""
    (n, N), r = y.shape, m.shape[0]
    if r > WIDEST:
        y.addmm_(u, m, alpha=scale)
        return
    rows, columns = (64, COLS) if y.dtype == torch.bfloat16 else (32, COLS // 2)
    _widen_kernel[(triton.cdiv(N, columns), triton.cdiv(n, rows))](
        y, u, m, n, N, r, y.stride(0), u.stride(0), *m.stride(), scale, ROWS=rows, COLS=columns, **_shape(r)
    )


def _runs(n: int, N: int) -> int:
    """Runs of rows that gather sums apart."""
    return max(1, min(PROGRAMS // triton.cdiv(N, COLS), triton.cdiv(n, RUN)))


def _partial(n: int, N: int, r: int) -> Temps:
    """Gather's sums of each run."""
    return [((_runs(n, N), N, _padded(r)), torch.float32)] if r <= WIDEST else []


def _gather(out: Tensor, x: Tensor, u: Tensor, scale: float, accumulate: bool, scratch: Scratch) -> None:
    """out (N, r) = scale x (n, N)^T u (n, r), added to out if `accumulate`."""
    (n, N), r = x.shape, u.shape[1]
    if r > WIDEST:
        out.addmm_(x.t(), u, beta=int(accumulate), alpha=scale)
        return
    (part,), runs = scratch(_partial(n, N, r)), _runs(n, N)
    _gather_kernel[(triton.cdiv(N, COLS), runs)](
        part, x, u, n, N, r, x.stride(0), u.stride(0), triton.cdiv(n, runs),
        COLS=COLS, STEP=64 if x.dtype == torch.bfloat16 else 32, num_stages=STAGES, **_shape(r),
    )  # fmt: skip
    _gather_sum_kernel[(triton.cdiv(N, 32),)](
        out, part, N, r, runs, *out.stride(), scale, ACCUMULATE=accumulate, R=part.shape[2], COLS=32, num_warps=WARPS
    )


@backend("triton")
def lora_forward(y: Tensor, u: Tensor, x: Tensor, a: Tensor, b: Tensor, *, scale: float, columns: Columns) -> None:
    """u (n, r parts) = x (n, I) @ a (r parts, I)^T; y (n, O) += scale u @ b^T, in the columns of each part."""
    _narrow(u, x, a.t(), 1.0)
    for out, u_part, b_part in each_part(y, u, b, columns):
        _widen(out, u_part, b_part.t(), scale)


def backward_temps(du: Tensor, db: Tensor, dy: Tensor, *_: object, columns: Columns, **__: object) -> Temps:
    widest = max((stop - first for first, stop in columns), key=lambda N: _runs(dy.shape[0], N) * N)
    return _partial(dy.shape[0], widest, db.shape[1])


@backend("triton", temps=backward_temps)
def lora_backward(
    du: Tensor, db: Tensor, dy: Tensor, u: Tensor, b: Tensor, *, scale: float, columns: Columns, accumulate: bool,
    scratch: Scratch,
) -> None:  # fmt: skip
    """du (n, r parts) = scale dy @ b; db (as b) = scale dy^T @ u, added to db if `accumulate`."""
    for (grad, du_part, b_part), (_, u_part, db_part) in zip(
        each_part(dy, du, b, columns), each_part(dy, u, db, columns), strict=True
    ):
        _narrow(du_part, grad, b_part, scale)
        _gather(db_part, grad, u_part, scale, accumulate, scratch)


@backend("triton")
def lora_backward_input(dx: Tensor, du: Tensor, a: Tensor) -> None:
    """dx (n, I) += du (n, r parts) @ a (r parts, I)."""
    _widen(dx, du, a, 1.0)


def weight_temps(da: Tensor, du: Tensor, x: Tensor, **_: object) -> Temps:
    return _partial(*x.shape, du.shape[1])


@backend("triton", temps=weight_temps)
def lora_backward_weight(da: Tensor, du: Tensor, x: Tensor, *, accumulate: bool, scratch: Scratch) -> None:
    """da (r parts, I) = du (n, r parts)^T @ x (n, I), added to da if `accumulate`."""
    _gather(da.t(), x, du, 1.0, accumulate, scratch)
