"""Decoding one token of one or two sequences: matmuls bound by reading the weights once, and attention over the cache.

A program asks for its whole tile of w before anything else, so that all of w is on its way at once. The layernorm of
the input, which every program computes for itself, costs no launch.

On Hopper and later each of these launches begins while the one before it still runs (programmatic dependent launch),
and asks for what no such launch writes: weights, and the keys and values of earlier tokens. All else is read and
written after the wait for the end of the one before. Every program has to wait, since that end tells of all before it
only if none ends without waiting.
"""

from __future__ import annotations

import math

from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import overlapping, tl, triton
from daybreak.kernels.cuda.gelu import sigmoid_2u
from daybreak.kernels.cuda.glu import gate_sigmoid
from daybreak.kernels.cuda.rope import angles, turned
from daybreak.kernels.norm import EPS

TILE = 1 << 14  # weights of one program, which it holds in registers
# As few rows to a program as it takes to have so many; on any card, for the same bits on all. A matrix that fits into
# one wave stays there: the launch after it can only begin once all programs have. GPT-2's kind has its own number.
WAVE, PROGRAMS, GPT2_PROGRAMS = 2 * 132, 3 * 132, 6 * 132
GATES = {"": 0, "silu": 1, "gelu": 2}
# Elements of the keys that attention looks at together, also in heads of 128 in 16 bits, and its warps.
KEYS, WIDE_KEYS, WARPS = 1 << 14, 1 << 15, 8


# ------------------------------------------------------------------------------------------------------------ matmuls


@triton.jit
def _decode_matmul_kernel(
    out, x, w, b, add, lnw, lnb, n, I, O, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, OVERLAP: tl.constexpr, RMS: tl.constexpr = False, OFFSET: tl.constexpr = 0.0,
    GATE: tl.constexpr = 0, REST: tl.constexpr = 0,
):  # fmt: skip
    """NORM: layernorm of x. RMS: RMSNorm. GATE, one of GATES: w is gate and up, rows of which are taken in turn.
    REST: columns of a second tile, which has what the first leaves of a row (see _tile)."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside, real = cols < I, rows < O
    if GATE:
        rows = rows // 2 + rows % 2 * (O // 2)
    at = rows.to(tl.int64)[:, None] * I + cols[None, :]
    tile = tl.load(w + at, mask=real[:, None] & inside[None, :], other=0.0)
    if REST:
        others = COLS + tl.arange(0, REST)
        there = others < I
        at = rows.to(tl.int64)[:, None] * I + others[None, :]
        more = tl.load(w + at, mask=real[:, None] & there[None, :], other=0.0)
        if RMS:
            scale_more = tl.load(lnw + others, mask=there, other=0.0).to(tl.float32) + OFFSET
    if BIAS:
        bias = tl.load(b + rows, mask=real, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(lnw + cols, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(lnb + cols, mask=inside, other=0.0).to(tl.float32)
    if RMS:
        scale = tl.load(lnw + cols, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for row in range(n):
        xf = tl.load(x + row * I + cols, mask=inside, other=0.0).to(tl.float32)
        if REST:
            xm = tl.load(x + row * I + others, mask=there, other=0.0).to(tl.float32)
        if RMS:
            squares = tl.sum(xf * xf, 0)
            if REST:
                squares += tl.sum(xm * xm, 0)
            rstd = 1.0 / tl.sqrt(squares / I + eps)
            xf = (xf * rstd * scale).to(x.dtype.element_ty).to(tl.float32)
            if REST:
                xm = (xm * rstd * scale_more).to(x.dtype.element_ty).to(tl.float32)
        if NORM:
            xf = tl.where(inside, xf - tl.sum(xf, 0) / I, 0.0)
            xf = xf * (1.0 / tl.sqrt(tl.sum(xf * xf, 0) / I + eps)) * scale + shift
            xf = xf.to(x.dtype.element_ty).to(tl.float32)  # as the layernorm of a whole batch is stored
        y = tl.sum(tile.to(tl.float32) * xf[None, :], 1)
        if REST:
            y += tl.sum(more.to(tl.float32) * xm[None, :], 1)
        if BIAS:
            y += bias
        if GELU:
            y = y.to(out.dtype.element_ty).to(tl.float32)  # likewise
            y *= sigmoid_2u(y)
        if ADD:
            y += tl.load(add + row * O + rows, mask=real, other=0.0).to(tl.float32)
        if GATE:
            gate, up = tl.split(tl.reshape(y.to(out.dtype.element_ty).to(tl.float32), (ROWS // 2, 2)))
            y = gate * gate_sigmoid(gate, GATE == 2) * up
            to = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
            tl.store(out + row * (O // 2) + to, y.to(out.dtype.element_ty), mask=to < O // 2)
        else:
            tl.store(out + row * O + rows, y.to(out.dtype.element_ty), mask=real)


def _tile(I: int, O: int, gpt2: bool = False) -> tuple[int, int, int, int]:
    """Rows and columns of w that a program takes, the columns of its second tile, and its warps.

    A row of 1,536 is 1,024 and 512 columns, and so no column is masked, as it would be in 2,048. gpt2: one tile, whose
    sums have the bits that they always had.
    """
    cols, rest = triton.next_power_of_2(I), 0
    half = cols // 2
    if not gpt2 and half + (more := triton.next_power_of_2(I - half)) < cols:
        cols, rest = half, more
    rows = 1 << (max(1, TILE // (cols + rest)).bit_length() - 1)
    least = WAVE // 2 if -(-O // rows) <= WAVE else GPT2_PROGRAMS if gpt2 else PROGRAMS
    while rows > 1 and -(-O // rows) < least:
        rows //= 2
    return rows, cols, rest, min(8, max(1, cols // 256))


@backend("triton")
def matmul_decode(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None,
    lnw: Tensor | None = None, lnb: Tensor | None = None, *, gelu: bool = False,
) -> None:  # fmt: skip
    """out (n, O) = act(norm(x (n, I)) @ w (O, I)^T + b (O)) + add (n, O), all contiguous; for small n."""
    (n, I), O = x.shape, w.shape[0]
    rows, cols, rest, warps = _tile(I, O, b is not None or lnw is not None)
    _decode_matmul_kernel[(-(-O // rows),)](
        out, x, w, w if b is None else b, x if add is None else add, w if lnw is None else lnw,
        w if lnb is None else lnb, n, I, O, EPS, NORM=lnw is not None, BIAS=b is not None, ADD=add is not None,
        GELU=gelu, ROWS=rows, COLS=cols, REST=rest, num_warps=warps, **overlapping(out.device),
    )  # fmt: skip


@backend("triton")
def matmul_rms_decode(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None, normw: Tensor,
    *, eps: float, offset: float = 0.0, gate: str = "",
) -> None:  # fmt: skip
    """out (n, O) = norm(x (n, I)) @ w (O, I)^T + b (O), or with a gate (n, O / 2), all contiguous; for small n."""
    n, (O, I) = x.shape[0], w.shape
    rows, cols, rest, warps = _tile(I, O)
    rows = max(rows, 2) if gate else rows
    _decode_matmul_kernel[(-(-O // rows),)](
        out, x, w, w if b is None else b, x, normw, w, n, I, O, eps, NORM=False, BIAS=b is not None, ADD=False,
        GELU=False, ROWS=rows, COLS=cols, RMS=True, OFFSET=offset, GATE=GATES[gate], REST=rest, num_warps=warps,
        **overlapping(out.device),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- attention


@triton.jit
def _more_keys(K, V, before, query, m, total, acc):
    """Largest logit, sum of exponentials and weighted values, with those of more keys."""
    S = tl.where(before, tl.sum(K.to(tl.float32) * query[None, :], 1), float("-inf"))
    new_m = tl.maximum(m, tl.max(S, 0))
    P, shrink = tl.exp2(S - new_m), tl.exp2(m - new_m)
    return new_m, total * shrink + tl.sum(P, 0), acc * shrink + tl.sum(P[:, None] * V.to(tl.float32), 0)


@triton.jit
def _decode_attention_kernel(
    out, cache, q, k, v, positions, freq, out_b, q_b, k_b, v_b, cache_v, cache_b, cache_h, scale2, half, attention,
    HS: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr,
    ROPE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one row: the newest key and value go into the cache, and the query walks over those before them. The
    heads of a GROUP walk over the same keys at the same time, so they come from memory once. ROPE: both turn first."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns, keys = tl.arange(0, D), tl.arange(0, STEP)
    real = columns < HS
    place = tl.load(positions + b).to(tl.int32)
    shared = h // GROUP
    base = cache + b * cache_b + shared * cache_h
    first = 0 * place
    if WINDOW > 0:
        first = tl.maximum(place - WINDOW + 1, 0)
        base += first.to(tl.int64) * HS
    block = keys[:, None] * HS + columns[None, :]
    before = first + keys < place
    mask = before[:, None] & real[None, :]
    K = tl.load(base + block, mask=mask, other=0.0)
    V = tl.load(base + cache_v + block, mask=mask, other=0.0)
    if ROPE:
        cos, sin = angles(columns, freq, place, half, attention)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    query, key = q + b * q_b + h * HS, k + b * k_b + shared * HS
    value = tl.load(v + b * v_b + shared * HS + columns, mask=real, other=0.0)
    if ROPE:
        query, key = turned(query, columns, real, half, cos, sin), turned(key, columns, real, half, cos, sin)
    else:
        query, key = tl.load(query + columns, mask=real, other=0.0), tl.load(key + columns, mask=real, other=0.0)
    query = query.to(tl.float32) * scale2
    newest = base + (place - first) * HS + columns
    mine = real & (h % GROUP == 0)
    tl.store(newest, key, mask=mine)
    tl.store(newest + cache_v, value, mask=mine)
    m, total = tl.sum(query * key.to(tl.float32), 0), tl.sum(tl.where(columns == 0, 1.0, 0.0), 0)
    acc = value.to(tl.float32)
    m, total, acc = _more_keys(K, V, before, query, m, total, acc)
    for start in range(STEP, place - first, STEP):
        before = first + start + keys < place
        mask = before[:, None] & real[None, :]
        K = tl.load(base + start * HS + block, mask=mask, other=0.0)
        V = tl.load(base + cache_v + start * HS + block, mask=mask, other=0.0)  # on its way while K is at work
        m, total, acc = _more_keys(K, V, before, query, m, total, acc)
    tl.store(out + b * out_b + h * HS + columns, (acc / total).to(out.dtype.element_ty), mask=real)


@backend("triton")
def attention_decode(
    out: Tensor, cache: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, scale: float, window: int = 0,
    freq: Tensor | None = None, attention: float = 1.0,
) -> None:  # fmt: skip
    """One query a row over its cached keys: q, out (b, NH, HS) and k, v (b, NKV, HS), heads next to each other; cache
    (2, b, NKV, T, HS). freq: as in the reference."""
    b, NH, HS = q.shape
    assert all(x[0].is_contiguous() for x in (out, q, k, v)), "heads must be contiguous"
    assert cache[0, 0, 0].is_contiguous(), "a head's keys must be contiguous"
    D = max(16, triton.next_power_of_2(HS))
    keys = WIDE_KEYS if D == 128 and cache.element_size() == 2 else KEYS
    _decode_attention_kernel[(b, NH)](
        out, cache, q, k, v, positions, positions if freq is None else freq, *(x.stride(0) for x in (out, q, k, v)),
        *cache.stride()[:3], scale * math.log2(math.e), 0 if freq is None else freq.numel(), attention, HS=HS, D=D,
        STEP=max(1, keys // D), GROUP=NH // k.shape[1], WINDOW=window, ROPE=freq is not None,
        num_warps=WARPS, **overlapping(out.device),
    )  # fmt: skip
