"""nanochat's smear, a token's row to a program; formulas in kernels/smear.py.

A program of backward takes several tokens, in strides, and keeps its sums for the gate in registers. How many programs
there are depends on the shape alone.
"""

from __future__ import annotations

from torch import Tensor, float32

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.bias import column_sums
from daybreak.kernels.smear import GATE

PROGRAMS = 132 * 8  # of backward
LANES = tl.constexpr(32)  # that hold the gate's channels


@triton.jit
def _first(positions, t, T, GIVEN: tl.constexpr):
    """Whether token t begins a text."""
    if GIVEN:
        return tl.load(positions + t) == 0
    return t % T == 0


@triton.jit
def _sigmoid(e, w, C, GATE: tl.constexpr):
    """sigmoid(s) of a token with embedding e, and what it is of."""
    k = tl.arange(0, LANES)
    x = tl.load(e + k, mask=k < GATE, other=0.0).to(tl.float32)
    wf = tl.load(w + k, mask=k < GATE, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-tl.sum(x * wf, 0))), x, wf


@triton.jit
def _smear_forward_kernel(
    out, e, w, factor, positions, T, C, GIVEN: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    at = t.to(tl.int64) * C + cols
    first = _first(positions, t, T, GIVEN)
    s, _, _ = _sigmoid(e + t.to(tl.int64) * C, w, C, GATE)
    g = tl.load(factor).to(tl.float32) * s
    x = tl.load(e + at, mask=cols < C, other=0.0).to(tl.float32)
    before = tl.load(e + at - C, mask=(cols < C) & (first == 0), other=0.0).to(tl.float32)
    tl.store(out + at, (x + g * before).to(out.dtype.element_ty), mask=cols < C)


@triton.jit
def _smear_backward_kernel(
    de, part_w, part_l, dout, e, w, factor, positions, n, T, C,
    GIVEN: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part_w (programs, 24), part_l (programs): this program's sums for the gate, in fp32."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols, k = tl.arange(0, BLOCK), tl.arange(0, LANES)
    mask = cols < C
    l = tl.load(factor).to(tl.float32)
    w_cols = tl.load(w + cols, mask=cols < GATE, other=0.0).to(tl.float32)
    sum_w = tl.zeros((LANES,), tl.float32)
    sum_l = 0.0
    for i in range(0, n - pid, programs):
        t = pid + i
        row = t.to(tl.int64) * C
        first = _first(positions, t, T, GIVEN)
        last = (t + 1 == n) | _first(positions, tl.minimum(t + 1, n - 1), T, GIVEN)
        s, x, _ = _sigmoid(e + row, w, C, GATE)
        after, _, _ = _sigmoid(e + tl.where(last, row, row + C), w, C, GATE)
        d = tl.load(dout + row + cols, mask=mask, other=0.0).to(tl.float32)
        following = tl.load(dout + row + C + cols, mask=mask & (last == 0), other=0.0).to(tl.float32)
        before = tl.load(e + row - C + cols, mask=mask & (first == 0), other=0.0).to(tl.float32)
        p = tl.sum(d * before, 0)
        ds = p * l * s * (1.0 - s)
        sum_l += p * s
        sum_w += ds * x
        tl.store(de + row + cols, (d + l * after * following + ds * w_cols).to(de.dtype.element_ty), mask=mask)
    tl.store(part_w + pid * GATE + k, sum_w, mask=k < GATE)
    tl.store(part_l + pid, sum_l)


@triton.jit
def _smear_decode_kernel(
    out, cache, e, w, factor, positions, c_b, c_h, c_t, C, HS, GATE: tl.constexpr, BLOCK: tl.constexpr
):
    b = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    row = b.to(tl.int64) * C
    place = tl.load(positions + b)
    s, _, _ = _sigmoid(e + row, w, C, GATE)
    g = tl.load(factor).to(tl.float32) * s
    here = cache + b.to(tl.int64) * c_b + (cols // HS).to(tl.int64) * c_h + cols % HS + place * c_t
    x = tl.load(e + row + cols, mask=cols < C, other=0.0)
    before = tl.load(here - c_t, mask=(cols < C) & (place > 0), other=0.0).to(tl.float32)
    tl.store(here, x, mask=cols < C)
    tl.store(out + row + cols, (x.to(tl.float32) + g * before).to(out.dtype.element_ty), mask=cols < C)


def launch(C: int) -> tuple[int, int]:
    """The padded channels of a row, and warps: 8 channels to a thread."""
    block = triton.next_power_of_2(max(C, 32))
    return block, min(max(block // 256, 1), 16)


@backend("triton")
def smear_forward(out: Tensor, e: Tensor, w: Tensor, factor: Tensor, positions: Tensor | None = None) -> None:
    """out (B, T, C) from e (B, T, C), both contiguous, w (24) and factor (1): see the reference."""
    B, T, C = e.shape
    block, warps = launch(C)
    _smear_forward_kernel[(B * T,)](
        out, e, w, factor, e if positions is None else positions, T, C,
        GIVEN=positions is not None, GATE=GATE, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def backward_temps(de: Tensor, dw: Tensor | None, dl: Tensor | None, dout: Tensor, *_: object, **__: object) -> Temps:
    """The programs' sums for w and factor."""
    programs = min(PROGRAMS, dout.shape[0] * dout.shape[1])
    return [((1, programs, GATE), float32), ((1, programs, 1), float32)]


@backend("triton", temps=backward_temps)
def smear_backward(
    de: Tensor, dw: Tensor | None, dfactor: Tensor | None, dout: Tensor, e: Tensor, w: Tensor, factor: Tensor,
    positions: Tensor | None = None, *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """de (B, T, C), dw (24), dfactor (1) from dout (B, T, C), all contiguous: see the reference."""
    part_w, part_l = scratch(backward_temps(de, dw, dfactor, dout))
    B, T, C = e.shape
    block, warps = launch(C)
    _smear_backward_kernel[(part_w.shape[1],)](
        de, part_w, part_l, dout, e, w, factor, e if positions is None else positions, B * T, T, C,
        GIVEN=positions is not None, GATE=GATE, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    column_sums([dw], part_w, accumulate)
    column_sums([dfactor], part_l, accumulate)


@backend("triton")
def smear_decode(out: Tensor, cache: Tensor, e: Tensor, w: Tensor, factor: Tensor, positions: Tensor) -> None:
    """out (b, C) from e (b, C) and the cache (b, NH, T, HS) of earlier embeddings, which takes e: see the reference."""
    b, C = e.shape
    block, warps = launch(C)
    assert cache.stride(3) == 1, "heads must be contiguous"
    _smear_decode_kernel[(b,)](
        out, cache, e, w, factor, positions, *cache.stride()[:3], C, cache.shape[3],
        GATE=GATE, BLOCK=block, num_warps=warps,
    )  # fmt: skip
