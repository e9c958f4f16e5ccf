"""Causal attention in Triton: FlashAttention-2 (Dao 2023), forward and a deterministic backward.

A program owns ROWS rows of one head, and it walks the other side in order, STEP rows at a time. So every sum has one
fixed order and no atomics are needed. The triangle of scores, and the two walks through it:

                 keys 0 1 2 3 4 5                       keys 0 1 2 3 4 5
    queries 0         x                                      x
            1         x x                                    x x
            2         x x x                                  x x[x]      <- first the diagonal block, with a mask
            3         x x x x                                x x[x x]
            4        [x x x x|x]   <- first the whole        x x[x x]x   <- then the whole blocks below it
            5        [x x x x|x x]    blocks, then the       x x[x x]x x
                                      diagonal, masked
              one program owns 2 queries                one program owns 2 keys
              forward: out, lse; backward: dq, delta    backward: dk, dv

The walk over keys in forward is the online softmax. m is the largest score of a row so far, total the sum of 2^(S - m),
acc the sum of 2^(S - m) v. When m grows, total and acc are first multiplied by 2^(old m - new m). At the end
out = acc / total, and lse = m + log2(total) in natural units.

The backward has two kernels. The first owns queries, and computes dq and delta = sum(do * o) of each row. The second
owns keys, reads delta, and computes dk and dv. Both recompute P = softmax(q k^T) from lse, and dS = P (do v^T - delta).

Where a window or documents limit a query, it sees keys from its `first` one on. Blocks that nobody sees are left out.
A walk over keys first takes those that not every query of the block sees, with a mask (LIMIT), then the whole ones.

Heads in a GROUP share keys and values. The kernel that owns keys walks over the queries of its group, one head after
the other, so dk and dv are sums in one fixed order again.

Softmax is in base 2, so S includes the factor scale * log2(e). P and dS are rounded to the compute dtype before their
matmuls, and all sums are in fp32. If T is not a multiple of the blocks, rows beyond T are loaded as zeros and never
stored. HS is padded with zeros to a power of two. Block sizes depend on the dtype, HS and the kind of GPU. They are
constants, since they decide the order of the sums.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import INTERPRET, LN2, LOG2E, tl, triton

Config = tuple[int, int, int, int]  # rows owned, rows per step of the walk, warps, pipeline stages

# By padded head size, for (forward, dq, dk and dv). A GPU of compute capability 9 or 10 has 227 KB of shared memory per
# block, but some others have 99. fp32 matmuls without tensor cores hold their operands in registers. Large blocks would
# spill.
LARGE: dict[int, tuple[Config, Config, Config]] = {
    64: ((128, 64, 4, 3), (128, 32, 4, 4), (128, 32, 4, 4)),
    128: ((128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)),
    256: ((128, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
}
SMALL: dict[int, tuple[Config, Config, Config]] = {
    64: ((128, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    128: ((128, 32, 4, 2), (64, 32, 4, 1), (64, 32, 4, 1)),
    256: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
FP32: dict[int, tuple[Config, Config, Config]] = {
    64: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    128: ((32, 16, 8, 1), (16, 16, 8, 1), (32, 16, 8, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
FORWARD, QUERIES, KEYS = range(3)
SCAN = tl.constexpr(1024)  # queries whose first keys are looked at together


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b in fp32. Triton's interpreter multiplies bf16 wrongly, so there both are first widened to fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load(base, start, rows, columns, stride, T, HS: tl.constexpr, EVEN: tl.constexpr):
    """Rows start + rows of a head (zeros beyond T), padded to a power of two of columns (zeros beyond HS)."""
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    D: tl.constexpr = columns.shape[0]
    if EVEN:
        if HS == D:
            return tl.load(pointers)
        return tl.load(pointers, mask=columns[None, :] < HS, other=0.0)
    return tl.load(pointers, mask=(start + rows[:, None] < T) & (columns[None, :] < HS), other=0.0)


@triton.jit
def _store(base, start, rows, columns, stride, T, HS: tl.constexpr, x):
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    mask = (start + rows[:, None] < T) & (columns[None, :] < HS)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _first_keys(lo, at, T, LO: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that each of the queries `at` sees. Beyond T it is 0, or one of a window."""
    first = 0 * at
    if LO:
        first = tl.load(lo + at, mask=at < T, other=0)
    if WINDOW > 0:
        first = tl.maximum(first, at - WINDOW + 1)
    return first


@triton.jit
def _limits(first, start, rows, T, STEP: tl.constexpr):
    """For a block of queries from `start` on: where its walk over blocks of keys begins, and where the mask ends."""
    here = start + rows < T
    begin = tl.min(tl.where(here, first, start), 0) // STEP * STEP
    full = (tl.max(tl.where(here, first, 0), 0) + STEP - 1) // STEP * STEP
    return begin, tl.minimum(full, start)


@triton.jit
def _walk_keys(
    acc, m, total, q, k_base, v_base, k_stride, v_stride, lo, hi, start_q, rows, columns, first, T, scale2,
    HS: tl.constexpr, STEP: tl.constexpr, DIAGONAL: tl.constexpr, LIMIT: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over keys [lo, hi). DIAGONAL: hide keys behind each query. LIMIT: and those
    before its first one, which may be all of a block: then m stays -inf."""
    keys = tl.arange(0, STEP)
    for start in range(lo, hi, STEP):
        k = _load(k_base, start, keys, columns, k_stride, T, HS, EVEN)
        S = dot(q, tl.trans(k), tl.zeros((rows.shape[0], STEP), tl.float32), PRECISION, UPCAST) * scale2
        if DIAGONAL:
            S = tl.where(start_q + rows[:, None] >= start + keys[None, :], S, float("-inf"))
        if LIMIT:
            S = tl.where(start + keys[None, :] >= first[:, None], S, float("-inf"))
        new_m = tl.maximum(m, tl.max(S, 1))
        base = new_m
        if LIMIT:
            base = tl.where(new_m == float("-inf"), 0.0, new_m)
        P = tl.exp2(S - base[:, None])
        shrink = tl.exp2(m - base)
        total = total * shrink + tl.sum(P, 1)
        v = _load(v_base, start, keys, columns, v_stride, T, HS, EVEN)
        acc = dot(P.to(v.dtype), v, acc * shrink[:, None], PRECISION, UPCAST)
        m = new_m
    return acc, m, total


@triton.jit
def _forward_kernel(
    out, lse, q, k, v, lo, out_b, out_t, out_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, NH, scale2,
    HS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, LO: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The blocks of one head run at the same time, so its keys stay in the L2 cache. The longest walk starts first.
    LIMIT: tl.constexpr = LO or WINDOW > 0
    blocks = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // blocks
    start_q = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    b, h = (head // NH).to(tl.int64), (head % NH).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    k_base, v_base = k + b * k_b + h // GROUP * k_h, v + b * v_b + h // GROUP * v_h
    Q = _load(q + b * q_b + h * q_h, start_q, rows, columns, q_t, T, HS, EVEN)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    first, full = rows, 0 * start_q
    if LIMIT:
        first = _first_keys(lo + b * T, start_q + rows, T, LO, WINDOW)
        begin, full = _limits(first, start_q, rows, T, STEP)
        acc, m, total = _walk_keys(
            acc, m, total, Q, k_base, v_base, k_t, v_t, begin, full, start_q, rows, columns, first, T, scale2,
            HS, STEP, False, True, True, PRECISION, UPCAST,
        )  # fmt: skip
    acc, m, total = _walk_keys(
        acc, m, total, Q, k_base, v_base, k_t, v_t, full, start_q, start_q, rows, columns, first, T, scale2,
        HS, STEP, False, False, True, PRECISION, UPCAST,
    )  # fmt: skip
    acc, m, total = _walk_keys(
        acc, m, total, Q, k_base, v_base, k_t, v_t, start_q, tl.minimum(start_q + ROWS, T), start_q, rows, columns,
        first, T, scale2, HS, STEP, True, LIMIT, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    _store(out + b * out_b + h * out_h, start_q, rows, columns, out_t, T, HS, acc / total[:, None])
    tl.store(lse + head.to(tl.int64) * T + start_q + rows, (m + tl.log2(total)) * LN2, mask=start_q + rows < T)


@triton.jit
def _walk_keys_again(
    dq, q, do, lse2, delta, k_base, v_base, k_stride, v_stride, lo, hi, start_q, rows, columns, first, T, scale2,
    HS: tl.constexpr, STEP: tl.constexpr, DIAGONAL: tl.constexpr, LIMIT: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add to dq / scale of a block of queries the part of keys [lo, hi)."""
    keys = tl.arange(0, STEP)
    zeros = tl.zeros((rows.shape[0], STEP), tl.float32)
    for start in range(lo, hi, STEP):
        k = _load(k_base, start, keys, columns, k_stride, T, HS, EVEN)
        v = _load(v_base, start, keys, columns, v_stride, T, HS, EVEN)
        P = tl.exp2(dot(q, tl.trans(k), zeros, PRECISION, UPCAST) * scale2 - lse2[:, None])
        if DIAGONAL:
            P = tl.where(start_q + rows[:, None] >= start + keys[None, :], P, 0.0)
        if LIMIT:
            P = tl.where(start + keys[None, :] >= first[:, None], P, 0.0)
        dS = P * (dot(do, tl.trans(v), zeros, PRECISION, UPCAST) - delta[:, None])
        dq = dot(dS.to(k.dtype), k, dq, PRECISION, UPCAST)
    return dq


@triton.jit
def _backward_queries_kernel(
    dq, delta, dout, q, k, v, out, lse, lo, dq_b, dq_t, dq_h, do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h,
    v_b, v_t, v_h, out_b, out_t, out_h, T, NH, scale, HS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, LO: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    LIMIT: tl.constexpr = LO or WINDOW > 0
    blocks = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // blocks
    start_q = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    b, h = (head // NH).to(tl.int64), (head % NH).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    here = start_q + rows < T
    statistics = head.to(tl.int64) * T + start_q + rows
    k_base, v_base = k + b * k_b + h // GROUP * k_h, v + b * v_b + h // GROUP * v_h
    do = _load(dout + b * do_b + h * do_h, start_q, rows, columns, do_t, T, HS, EVEN)
    o = _load(out + b * out_b + h * out_h, start_q, rows, columns, out_t, T, HS, EVEN)
    sums = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + statistics, sums, mask=here)
    Q = _load(q + b * q_b + h * q_h, start_q, rows, columns, q_t, T, HS, EVEN)
    lse2 = tl.load(lse + statistics, mask=here, other=float("inf")) * LOG2E  # inf: P is 0 in rows beyond T
    scale2 = scale * LOG2E
    acc = tl.zeros((ROWS, D), tl.float32)
    first, full = rows, 0 * start_q
    if LIMIT:
        first = _first_keys(lo + b * T, start_q + rows, T, LO, WINDOW)
        begin, full = _limits(first, start_q, rows, T, STEP)
        acc = _walk_keys_again(
            acc, Q, do, lse2, sums, k_base, v_base, k_t, v_t, begin, full, start_q, rows, columns, first, T, scale2,
            HS, STEP, False, True, True, PRECISION, UPCAST,
        )  # fmt: skip
    acc = _walk_keys_again(
        acc, Q, do, lse2, sums, k_base, v_base, k_t, v_t, full, start_q, start_q, rows, columns, first, T, scale2,
        HS, STEP, False, False, True, PRECISION, UPCAST,
    )  # fmt: skip
    acc = _walk_keys_again(
        acc, Q, do, lse2, sums, k_base, v_base, k_t, v_t, start_q, tl.minimum(start_q + ROWS, T), start_q, rows,
        columns, first, T, scale2, HS, STEP, True, LIMIT, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    _store(dq + b * dq_b + h * dq_h, start_q, rows, columns, dq_t, T, HS, acc * scale)


@triton.jit
def _end_of_queries(lo, start, T, ROWS: tl.constexpr, LO: tl.constexpr, WINDOW: tl.constexpr):
    """Behind which query none sees a key of the block from `start` on."""
    end = T
    if WINDOW > 0:
        end = tl.minimum(end, start + ROWS + WINDOW - 1)
    if LO:
        last = start
        for i in range(start, end, SCAN):
            at = i + tl.arange(0, SCAN)
            first = tl.load(lo + at, mask=at < end, other=T)
            last = tl.maximum(last, tl.max(tl.where(first < start + ROWS, at + 1, 0), 0))
        end = tl.minimum(last, end)
    return end


@triton.jit
def _walk_queries(
    dk, dv, k, v, q_base, do_base, lse, delta, limits, q_h, q_stride, do_h, do_stride, lo, hi, start_k, keys, columns,
    T, scale2, HS: tl.constexpr, STEP: tl.constexpr, DIAGONAL: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    LO: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add to dk / scale and dv of a block of keys the part of queries [lo, hi) of each head of a group. Scores are
    transposed, keys first."""
    rows = tl.arange(0, STEP)
    zeros = tl.zeros((keys.shape[0], STEP), tl.float32)
    span = tl.cdiv(hi - lo, STEP) * STEP
    for i in range(lo, lo + GROUP * span if GROUP > 1 else hi, STEP):
        start, q_head, do_head, lse_head, delta_head = i, q_base, do_base, lse, delta
        if GROUP > 1:  # one loop over heads and queries: two loops would want more registers than there are
            g = (i - lo) // span
            start -= g * span
            q_head += g * q_h
            do_head += g * do_h
            lse_head += g * T
            delta_head += g * T
        q = _load(q_head, start, rows, columns, q_stride, T, HS, EVEN)
        do = _load(do_head, start, rows, columns, do_stride, T, HS, EVEN)
        if EVEN:
            lse2, sums = tl.load(lse_head + start + rows) * LOG2E, tl.load(delta_head + start + rows)
        else:
            here = start + rows < T
            lse2 = tl.load(lse_head + start + rows, mask=here, other=float("inf")) * LOG2E
            sums = tl.load(delta_head + start + rows, mask=here, other=0.0)
        P = tl.exp2(dot(k, tl.trans(q), zeros, PRECISION, UPCAST) * scale2 - lse2[None, :])
        if DIAGONAL:
            P = tl.where(start + rows[None, :] >= start_k + keys[:, None], P, 0.0)
        if LO or WINDOW > 0:
            first = _first_keys(limits, start + rows, T, LO, WINDOW)
            P = tl.where(start_k + keys[:, None] >= first[None, :], P, 0.0)
        dv = dot(P.to(do.dtype), do, dv, PRECISION, UPCAST)
        dS = P * (dot(v, tl.trans(do), zeros, PRECISION, UPCAST) - sums[None, :])
        dk = dot(dS.to(q.dtype), q, dk, PRECISION, UPCAST)
    return dk, dv


@triton.jit
def _backward_keys_kernel(
    dk, dv, dout, q, k, v, lse, delta, lo, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, do_b, do_t, do_h, q_b, q_t, q_h,
    k_b, k_t, k_h, v_b, v_t, v_h, T, NKV, scale, HS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, LO: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // blocks
    start_k = (tl.program_id(0) % blocks) * ROWS
    b, h = (head // NKV).to(tl.int64), (head % NKV).to(tl.int64)
    keys, columns = tl.arange(0, ROWS), tl.arange(0, D)
    q_base, do_base = q + b * q_b + h * GROUP * q_h, dout + b * do_b + h * GROUP * do_h
    statistics = head.to(tl.int64) * GROUP * T
    lse_base, delta_base = lse + statistics, delta + statistics
    K = _load(k + b * k_b + h * k_h, start_k, keys, columns, k_t, T, HS, EVEN)
    V = _load(v + b * v_b + h * v_h, start_k, keys, columns, v_t, T, HS, EVEN)
    scale2 = scale * LOG2E
    acc_k, acc_v = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32)
    # Shared keys and limits take one walk with all masks, others two: the diagonal's, then the one without a mask.
    below = tl.minimum(start_k + ROWS, T)
    if GROUP > 1 or LO or WINDOW > 0:
        below = _end_of_queries(lo + b * T, start_k, T, ROWS, LO, WINDOW)
    acc_k, acc_v = _walk_queries(
        acc_k, acc_v, K, V, q_base, do_base, lse_base, delta_base, lo + b * T, q_h, q_t, do_h, do_t, start_k, below,
        start_k, keys, columns, T, scale2, HS, STEP, True, EVEN, GROUP, LO, WINDOW, PRECISION, UPCAST,
    )  # fmt: skip
    if GROUP == 1 and not LO and WINDOW == 0:
        acc_k, acc_v = _walk_queries(
            acc_k, acc_v, K, V, q_base, do_base, lse_base, delta_base, lo, q_h, q_t, do_h, do_t, below, T,
            start_k, keys, columns, T, scale2, HS, STEP, False, EVEN, GROUP, LO, WINDOW, PRECISION, UPCAST,
        )  # fmt: skip
    _store(dk + b * dk_b + h * dk_h, start_k, keys, columns, dk_t, T, HS, acc_k * scale)
    _store(dv + b * dv_b + h * dv_h, start_k, keys, columns, dv_t, T, HS, acc_v)


@cache
def _is_large(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@cache
def _configs(HS: int, wide: bool, large: bool) -> tuple[int, tuple[Config, Config, Config]]:
    """Padded head size (a tensor core needs 16) and the blocks of the three kernels."""
    D = max(16, triton.next_power_of_2(HS))
    if D > 256:
        raise ValueError(f"attention heads of {HS} elements: the Triton kernels take at most 256")
    return D, (FP32 if wide else LARGE if large else SMALL)[max(64, D)]


def _setting(q: Tensor, k: Tensor, kernel: int, lo: Tensor | None, window: int) -> tuple[int, dict[str, Any]]:
    """Blocks of rows per head, and the constants of a launch."""
    T, HS = q.shape[1], q.shape[3]
    wide = q.dtype == torch.float32
    D, configs = _configs(HS, wide, _is_large(q.device))
    rows, step, warps, stages = configs[kernel]
    tf32 = wide and torch.backends.cuda.matmul.allow_tf32
    assert lo is None or lo.is_contiguous()
    window, group = window if window < T else 0, q.shape[2] // k.shape[2]
    if kernel == KEYS and (window or group > 1 or lo is not None):
        warps = 8  # the one walk with all masks has more in its registers
    return -(-T // rows), {
        "HS": HS, "D": D, "ROWS": rows, "STEP": step, "EVEN": T % rows == 0, "GROUP": group,
        "LO": lo is not None, "WINDOW": window, "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": INTERPRET, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    """Strides over b, t and h of each (B, T, NH, HS) view, whose last dimension must be contiguous."""
    assert all(x.stride(3) == 1 or x.shape[3] == 1 for x in tensors), "heads must be contiguous"
    return [s for x in tensors for s in x.stride()[:3]]


@backend("triton")
def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    *, scale: float, lo: Tensor | None = None, window: int = 0,
) -> None:  # fmt: skip
    """out (B, T, NH, HS) = causal attention of strided q, k, v; lse (B, NH, T) fp32, the natural log-sum-exp. Limits
    and shared keys as in the reference."""
    B, T, NH, _ = q.shape
    assert lse.is_contiguous()
    blocks, setting = _setting(q, k, FORWARD, lo, window)
    _forward_kernel[(blocks * B * NH,)](
        out,
        lse,
        q,
        k,
        v,
        lse if lo is None else lo,
        *_strides(out, q, k, v),
        T,
        NH,
        scale * math.log2(math.e),
        **setting,
    )


def backward_temps(dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, *_: object, **__: object) -> Temps:
    """delta (B, NH, T), fp32."""
    B, T, NH, _ = q.shape
    return [((B, NH, T), torch.float32)]


@backend("triton", temps=backward_temps)
def attention_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, scale: float, lo: Tensor | None = None, window: int = 0, scratch: Scratch,
) -> None:  # fmt: skip
    """dq (B, T, NH, HS), dk, dv (B, T, NKV, HS) from dout and the tensors of forward; all strided views but lse."""
    B, T, NH, _ = q.shape
    assert lse.is_contiguous()
    (delta,) = scratch(backward_temps(dq, dk, dv, dout, q))
    limits, NKV = lse if lo is None else lo, k.shape[2]
    blocks, setting = _setting(q, k, QUERIES, lo, window)
    _backward_queries_kernel[(blocks * B * NH,)](
        dq, delta, dout, q, k, v, out, lse, limits, *_strides(dq, dout, q, k, v, out), T, NH, scale, **setting
    )
    blocks, setting = _setting(q, k, KEYS, lo, window)
    _backward_keys_kernel[(blocks * B * NKV,)](
        dk, dv, dout, q, k, v, lse, delta, limits, *_strides(dk, dv, dout, q, k, v), T, NKV, scale, **setting
    )
