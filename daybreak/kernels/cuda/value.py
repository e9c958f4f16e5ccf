"""Value embeddings with gates, a token to a program; formulas in kernels/value.py.

The rows of the table are read where they lie, so no copy of them is kept for backward. A program of backward takes
several tokens, in strides, and keeps its sums for the gates' weight in registers. How many programs there are depends
on the shape alone.
"""

from __future__ import annotations

from torch import Tensor, float32

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.cuda.bias import column_sums
from daybreak.kernels.cuda.rounding import mixed
from daybreak.kernels.value import GATE

PROGRAMS = 132 * 8  # of backward


@triton.jit
def _gates(
    w, x, x0, rstd, a, b, t, C, NH,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, GATE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """g (HEADS) of token t, the norm's first channels (LANES), and the weight (HEADS, LANES)."""
    h, k = tl.arange(0, HEADS), tl.arange(0, LANES)
    at = t.to(tl.int64) * C + k
    xf = tl.load(x + at, mask=k < CHANNELS, other=0.0).to(tl.float32)
    x0f = tl.load(x0 + at, mask=k < CHANNELS, other=0.0).to(tl.float32)
    y = mixed(xf, x0f, tl.load(a).to(tl.float32), tl.load(b).to(tl.float32)) * tl.load(rstd + t)
    here = (h < NH)[:, None] & (k < CHANNELS)[None, :]
    wf = tl.load(w + h[:, None] * CHANNELS + k[None, :], mask=here, other=0.0).to(tl.float32)
    return GATE / (1.0 + tl.exp(-tl.sum(wf * y[None, :], 1))), y, wf


@triton.jit
def _value_forward_kernel(
    v, tokens, table, w, x, x0, rstd, a, b, v_t, C, NH, HS, CHANNELS: tl.constexpr, GATE: tl.constexpr,
    LANES: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    g, _, _ = _gates(w, x, x0, rstd, a, b, t, C, NH, CHANNELS, HEADS, GATE, LANES)
    h, j = tl.arange(0, HEADS)[:, None], tl.arange(0, SIZE)[None, :]
    mask, inner = (h < NH) & (j < HS), h * HS + j
    u = tl.load(table + tl.load(tokens + t) * (NH * HS) + inner, mask=mask, other=0.0).to(tl.float32)
    at = v + t.to(tl.int64) * v_t + inner
    old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (old + g[:, None] * u).to(v.dtype.element_ty), mask=mask)


@triton.jit
def _value_backward_kernel(
    du, dy, part, dv, tokens, table, w, x, x0, rstd, a, b, dv_t, n, C, NH, HS, CHANNELS: tl.constexpr,
    GATE: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """part (programs, NH CHANNELS): this program's sums for w, in fp32."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    h, j, k = tl.arange(0, HEADS), tl.arange(0, SIZE), tl.arange(0, LANES)
    mask, inner = (h < NH)[:, None] & (j < HS)[None, :], h[:, None] * HS + j[None, :]
    dw = tl.zeros((HEADS, LANES), tl.float32)
    for i in range(0, n - pid, programs):
        t = pid + i
        g, y, wf = _gates(w, x, x0, rstd, a, b, t, C, NH, CHANNELS, HEADS, GATE, LANES)
        u = tl.load(table + tl.load(tokens + t) * (NH * HS) + inner, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dv + t.to(tl.int64) * dv_t + inner, mask=mask, other=0.0).to(tl.float32)
        tl.store(du + t.to(tl.int64) * (NH * HS) + inner, (d * g[:, None]).to(du.dtype.element_ty), mask=mask)
        ds = tl.sum(d * u, 1) * g * (1.0 - g / GATE)
        dw += ds[:, None] * y[None, :]
        at = dy + t.to(tl.int64) * C + k
        old = tl.load(at, mask=k < CHANNELS, other=0.0).to(tl.float32)
        tl.store(at, (old + tl.sum(ds[:, None] * wf, 0)).to(dy.dtype.element_ty), mask=k < CHANNELS)
    to = part + pid * NH * CHANNELS + h[:, None] * CHANNELS + k[None, :]
    tl.store(to, dw, mask=(h < NH)[:, None] & (k < CHANNELS)[None, :])


def launch(heads: Tensor, w: Tensor) -> tuple[dict[str, int], int]:
    """Padded sizes, and warps: 16 values to a thread."""
    (_, NH, HS), next_power = heads.shape, triton.next_power_of_2
    sizes = {"LANES": next_power(w.shape[1]), "HEADS": next_power(NH), "SIZE": next_power(HS)}
    return sizes, min(max(sizes["HEADS"] * sizes["SIZE"] // 512, 1), 16)


@backend("triton")
def value_forward(
    v: Tensor, tokens: Tensor, table: Tensor, w: Tensor, x: Tensor, x0: Tensor, rstd: Tensor, a: Tensor, b: Tensor
) -> None:
    """v (n, NH, HS), whose tokens may lie apart, += gates * table[tokens]: see the reference."""
    (n, NH, HS), (sizes, warps) = v.shape, launch(v, w)
    assert v[0].is_contiguous(), "a token's heads follow each other"
    _value_forward_kernel[(n,)](
        v, tokens, table, w, x, x0, rstd, a, b, v.stride(0), x.shape[1], NH, HS,
        CHANNELS=w.shape[1], GATE=GATE, **sizes, num_warps=warps,
    )  # fmt: skip


def backward_temps(
    du: Tensor, dy: Tensor, dw: Tensor | None, dv: Tensor, tokens: Tensor, table: Tensor, w: Tensor,
    *_: object, **__: object,
) -> Temps:  # fmt: skip
    """The programs' sums for w."""
    return [((1, min(PROGRAMS, len(dv)), w.numel()), float32)]


@backend("triton", temps=backward_temps)
def value_backward(
    du: Tensor, dy: Tensor, dw: Tensor | None, dv: Tensor, tokens: Tensor, table: Tensor, w: Tensor,
    x: Tensor, x0: Tensor, rstd: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """du (n, NH HS) and dw (NH, 12) from dv (n, NH, HS); adds to dy (n, C): see the reference."""
    (part,) = scratch(backward_temps(du, dy, dw, dv, tokens, table, w))
    (n, NH, HS), (sizes, warps) = dv.shape, launch(dv, w)
    assert dv[0].is_contiguous(), "a token's heads follow each other"
    _value_backward_kernel[(part.shape[1],)](
        du, dy, part, dv, tokens, table, w, x, x0, rstd, a, b, dv.stride(0), n, x.shape[1], NH, HS,
        CHANNELS=w.shape[1], GATE=GATE, **sizes, num_warps=warps,
    )  # fmt: skip
    column_sums([None if dw is None else dw.view(-1)], part, accumulate)
