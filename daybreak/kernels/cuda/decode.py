"""The products of one row or two, as writing text makes them: bound by reading the weights once.

A program asks for its whole tile of w before anything else, so that all of w is on its way at once. The layernorm of
the input, which every program computes for itself, costs no launch.
"""

from __future__ import annotations

from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.gelu import sigmoid_2u
from daybreak.kernels.norm import EPS

TILE = 1 << 14  # weights of one program, which it holds in registers
PROGRAMS = 3 * 132  # as few rows to a program as it takes to have so many; of any card, for the same bits on all


@triton.jit
def _decode_matmul_kernel(
    out, x, w, b, add, lnw, lnb, n, I, O, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside, real = cols < I, rows < O
    at = rows.to(tl.int64)[:, None] * I + cols[None, :]
    tile = tl.load(w + at, mask=real[:, None] & inside[None, :], other=0.0)
    if BIAS:
        bias = tl.load(b + rows, mask=real, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(lnw + cols, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(lnb + cols, mask=inside, other=0.0).to(tl.float32)
    for row in range(n):
        xf = tl.load(x + row * I + cols, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            xf = tl.where(inside, xf - tl.sum(xf, 0) / I, 0.0)
            xf = xf * (1.0 / tl.sqrt(tl.sum(xf * xf, 0) / I + eps)) * scale + shift
            xf = xf.to(x.dtype.element_ty).to(tl.float32)  # as the layernorm of a whole batch is stored
        y = tl.sum(tile.to(tl.float32) * xf[None, :], 1)
        if BIAS:
            y += bias
        if GELU:
            y = y.to(out.dtype.element_ty).to(tl.float32)  # likewise
            y *= sigmoid_2u(y)
        if ADD:
            y += tl.load(add + row * O + rows, mask=real, other=0.0).to(tl.float32)
        tl.store(out + row * O + rows, y.to(out.dtype.element_ty), mask=real)


def _tile(I: int, O: int) -> tuple[int, int, int]:
    """Rows and columns of w that a program takes, and its warps."""
    cols = 1 << (I - 1).bit_length()
    rows = max(1, TILE // cols)
    while rows > 1 and -(-O // rows) < PROGRAMS:
        rows //= 2
    return rows, cols, min(8, max(1, cols // 256))


@backend("triton")
def matmul_decode(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None,
    lnw: Tensor | None = None, lnb: Tensor | None = None, *, gelu: bool = False,
) -> None:  # fmt: skip
    """out (n, O) = act(norm(x (n, I)) @ w (O, I)^T + b (O)) + add (n, O), all contiguous; for small n."""
    (n, I), O = x.shape, w.shape[0]
    rows, cols, warps = _tile(I, O)
    _decode_matmul_kernel[(-(-O // rows),)](
        out, x, w, w if b is None else b, x if add is None else add, w if lnw is None else lnw,
        w if lnb is None else lnb, n, I, O, EPS, NORM=lnw is not None, BIAS=b is not None, ADD=add is not None,
        GELU=gelu, ROWS=rows, COLS=cols, num_warps=warps,
    )  # fmt: skip
