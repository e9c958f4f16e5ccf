"""The residual stream of nanochat, mixed and normed in one pass over memory each way; formulas in kernels/mix.py.

In the forward pass each program takes two rows, as in norm.py. In the backward pass it loops over rows in strides, and
fetches the next ones to shared memory meanwhile. It writes each scalar's sum once. The number of programs depends on
the shape alone, so the order of sums is the same on every GPU.
"""

from __future__ import annotations

from torch import Tensor, finfo, float32

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.bias import column_sums
from daybreak.kernels.cuda.norm import AHEAD, BACKWARD_WARPS, MIN_PROGRAMS, Launch, backward_launch, forward_launch
from daybreak.kernels.cuda.rounding import mixed, rounded

BLOCK, WARPS = 2048, 4


@triton.jit
def _mix_norm_forward_kernel(
    res, out, rstd, x, y, a, b, scale, factor, n, C, eps,
    RES: tl.constexpr, A: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RES: res is added and written, and the norm is that of what was written. LARGEST: out is in fp8, whose largest
    value this is, with this scale."""
    cols = tl.arange(0, BLOCK)[None, :]
    row = n - 1 - (tl.program_id(0) * ROWS + tl.arange(0, ROWS))
    at = row.to(tl.int64)[:, None] * C + cols
    here = (cols < C) & (row >= 0)[:, None]
    xf = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    yf = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    fa = 1.0
    if A:
        fa = tl.load(a).to(tl.float32)
    m = mixed(xf, yf, fa, tl.load(b).to(tl.float32) * factor)
    if RES:
        m = (m + tl.load(res + at, mask=here, other=0.0).to(tl.float32)).to(res.dtype.element_ty)
        tl.store(res + at, m, mask=here)
        m = m.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(m * m, 1) / C + eps)
    normed, to = m * r[:, None], out + at
    if LARGEST > 0.0:
        normed = rounded(normed, tl.load(scale), LARGEST, out.dtype.element_ty)
        to = tl.max_contiguous(to, [1, 8])
    tl.store(to, normed.to(out.dtype.element_ty), mask=here)
    tl.store(rstd + row, r, mask=row >= 0)


@triton.jit
def _mix_norm_backward_kernel(
    dx, dy, again, part, d, dout, x, y, rstd, a, b, add, factor, n, C,
    ACCUMULATE_DY: tl.constexpr, AGAIN: tl.constexpr, STORED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part (2, programs) in fp32: this program's sums of the gradient of m times x, and times factor y. ADD: add is
    added to dx. STORED: m is x, as it was stored with the term b factor y, and has no gradient from elsewhere.

    Rows travel ahead of the stores to dx, which may be d: no row is another one's."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)[None, :]
    fa, fb = tl.load(a).to(tl.float32), tl.load(b).to(tl.float32) * factor
    sum_a = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    row = n - 1 - (pid * ROWS + tl.arange(0, ROWS))
    r_next = tl.load(rstd + row, mask=row >= 0, other=0.0)  # a turn ahead by hand, as in norm.py
    for i in tl.range(pid * ROWS, n, programs * ROWS, num_stages=STAGES):
        row = n - 1 - (i + tl.arange(0, ROWS))
        at = row.to(tl.int64)[:, None] * C + cols
        here = (cols < C) & (row >= 0)[:, None]  # where a row is none, all that is read is 0 and adds nothing
        g = tl.load(dout + at, mask=here, other=0.0).to(tl.float32)
        xf = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        yf = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        if not STORED:
            grad = tl.load(d + at, mask=here, other=0.0).to(tl.float32)
        if ADD:
            more = tl.load(add + at, mask=here, other=0.0).to(tl.float32)
        if ACCUMULATE_DY:
            old = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
        r = r_next[:, None]
        row -= programs * ROWS
        r_next = tl.load(rstd + row, mask=row >= 0, other=0.0)
        if STORED:
            xhat = xf * r
        else:
            xhat = mixed(xf, yf, fa, fb) * r
        if AGAIN:
            tl.store(again + at, xhat.to(again.dtype.element_ty), mask=here)
        if STORED:
            grad = (g - xhat * (tl.sum(g * xhat, 1)[:, None] / C)) * r
            d_x = grad
        else:
            grad += (g - xhat * (tl.sum(g * xhat, 1)[:, None] / C)) * r
            sum_a += grad * xf
            d_x = grad * fa
        sum_b += grad * yf
        if ADD:
            d_x += more
        tl.store(dx + at, d_x.to(dx.dtype.element_ty), mask=here)
        grad *= fb
        if ACCUMULATE_DY:
            grad += old
        tl.store(dy + at, grad.to(dy.dtype.element_ty), mask=here)
    tl.store(part + pid, tl.sum(tl.sum(sum_a, 1), 0))
    tl.store(part + programs + pid, tl.sum(tl.sum(sum_b, 1), 0) * factor)


@triton.jit
def _mix_add_kernel(out, x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xf = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    yf = tl.load(y + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, (xf + yf).to(out.dtype.element_ty), mask=at < size)


@backend("triton")
def mix_norm_forward(
    res: Tensor | None, out: Tensor, rstd: Tensor, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor,
    *, eps: float, factor: float = 1.0,
) -> None:  # fmt: skip
    """out (n, C) = the norm of a x + factor b y, or of res (n, C), to which that is added: see the reference."""
    mixed_rows(res, out, rstd, x, y, a, b, eps=eps, factor=factor)


def mixed_rows(
    res: Tensor | None, out: Tensor, rstd: Tensor, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor,
    *, eps: float, factor: float = 1.0, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """The same; scale: of an output in fp8, which is divided by it."""
    assert all(z.is_contiguous() for z in (out, x, y, x if res is None else res)), "rows follow each other"
    programs, rows, block, warps, _ = forward_launch(x)
    _mix_norm_forward_kernel[(programs,)](
        x if res is None else res, out, rstd, x, y, b if a is None else a, b, x if scale is None else scale, factor,
        *x.shape, eps, RES=res is not None, A=a is not None, LARGEST=0.0 if scale is None else finfo(out.dtype).max,
        ROWS=rows, BLOCK=block, num_warps=warps, enable_fp_fusion=block > 32,  # as in norm.py
    )  # fmt: skip


def mix_norm_launch(d: Tensor, extra: int = 0) -> Launch:
    """The launch of backward for d (n, C): half as many columns to a thread as for a norm, since there are more
    accumulators and more inputs. Rows of five tensors are on their way, and `extra` bytes an element more."""
    _, rows, block, warps, stages = backward_launch(d, True)
    warps, tile = min(2 * warps, 32 if block > 8192 else 16), rows * block * (5 * d.element_size() + extra)
    programs = min(triton.cdiv(len(d), rows), max(MIN_PROGRAMS, BACKWARD_WARPS // warps))
    return Launch(programs, rows, block, warps, min(stages, 1 + AHEAD // tile))


def mix_norm_backward_temps(
    dx: Tensor, dy: Tensor, da: Tensor | None, db: Tensor | None, rewrite: Tensor | None, d: Tensor,
    *_: object, **__: object,
) -> Temps:  # fmt: skip
    """The programs' two sums."""
    return [((2, mix_norm_launch(d).programs, 1), float32)]


@backend("triton", temps=mix_norm_backward_temps)
def mix_norm_backward(
    dx: Tensor, dy: Tensor, da: Tensor | None, db: Tensor | None, rewrite: Tensor | None,
    d: Tensor, dout: Tensor, x: Tensor, y: Tensor, rstd: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None,
    *, accumulate_dy: bool, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of a x + b y and its norm, all contiguous: see the reference. dx may be d."""
    (part,) = scratch(mix_norm_backward_temps(dx, dy, da, db, rewrite, d))
    _backward_rows(dx, dy, rewrite, part, d, dout, x, y, rstd, a, b, add, accumulate_dy)
    column_sums([da, db], part, accumulate)


def _backward_rows(
    dx: Tensor, dy: Tensor, rewrite: Tensor | None, part: Tensor, d: Tensor, dout: Tensor, x: Tensor, y: Tensor,
    rstd: Tensor, a: Tensor, b: Tensor, add: Tensor | None, accumulate_dy: bool, factor: float = 1.0,
    stored: bool = False,
) -> None:  # fmt: skip
    """All but the sums over programs."""
    programs, rows, block, warps, stages = mix_norm_launch(x, 0 if add is None else add.element_size())
    _mix_norm_backward_kernel[(programs,)](
        dx, dy, dx if rewrite is None else rewrite, part, d, dout, x, y, rstd, a, b, x if add is None else add, factor,
        *x.shape, ACCUMULATE_DY=accumulate_dy, AGAIN=rewrite is not None, STORED=stored, ADD=add is not None,
        ROWS=rows, BLOCK=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip


@backend("triton")
def mix_add(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out (n, C) = x + y, all contiguous; out may be x or y."""
    _mix_add_kernel[(triton.cdiv(x.numel(), BLOCK),)](out, x, y, x.numel(), BLOCK=BLOCK, num_warps=WARPS)


def mix_backward_temps(dx: Tensor, *_: object, **__: object) -> Temps:
    """The programs' sums: none, and for b."""
    return [((2, mix_norm_launch(dx).programs, 1), float32)]


@backend("triton", temps=mix_backward_temps)
def mix_backward(
    dx: Tensor, dy: Tensor, db: Tensor | None, dout: Tensor, x: Tensor, y: Tensor, rstd: Tensor, b: Tensor,
    *, factor: float = 1.0, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of the norm of x (n, C), which has the term factor b y, all contiguous: see the reference."""
    (part,) = scratch(mix_backward_temps(dx))
    _backward_rows(dx, dy, None, part, dout, dout, x, y, rstd, b, b, None, False, factor, stored=True)
    column_sums([None, db], part, accumulate)
