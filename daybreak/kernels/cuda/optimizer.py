"""The global norm and AdamW on a GPU. kernels/optimizer.py has the formulas, layouts and random bits.

Both read flat buffers once, and the speed of memory limits them. A thread takes 4 neighbouring elements, which are 16
bytes of every fp32 buffer. So all buffers are distributed over threads in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.optimizer import M_STREAM, V_STREAM, stream_key

ADAMW_BLOCK, ADAMW_WARPS = 1024, 8
NORM_BLOCK, NORM_WARPS = 4096, 8
FIRST, SECOND = tl.constexpr(M_STREAM), tl.constexpr(V_STREAM)  # of the moments
NORM_PROGRAMS = 4096  # on every GPU; more than run at once, so that few are still running at the end


# -------------------------------------------------------------------------------------------------------- global norm


@triton.jit
def _square_sums_kernel(partial, grads, n, stride, BLOCK: tl.constexpr):
    """partial[program] (fp64) = the sum of squares of every `stride`-th block of BLOCK elements."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK, n, stride):
        g = tl.load(grads + start + lanes, mask=start + lanes < n, other=0.0).to(tl.float32)
        acc += g * g
    tl.store(partial + program, tl.sum(acc.to(tl.float64), 0))


@triton.jit
def _norm_kernel(norm, partial, programs, BLOCK: tl.constexpr):
    """norm (fp64) = the square root of the sum of `programs` <= BLOCK partial sums."""
    lanes = tl.arange(0, BLOCK)
    x = tl.load(partial + lanes, mask=lanes < programs, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(x, 0)))


def norm_temps(norm: Tensor, grads: Tensor) -> Temps:
    return [((min(NORM_PROGRAMS, triton.cdiv(grads.numel(), NORM_BLOCK)),), torch.float64)]


@backend("triton", temps=norm_temps)
def global_norm(norm: Tensor, grads: Tensor, *, scratch: Scratch) -> None:
    """norm = the 2-norm of grads. Sums of a lane in fp32, of a program and all programs in fp64. NaN and inf stay."""
    (partial,) = scratch(norm_temps(norm, grads))
    programs = partial.numel()
    _square_sums_kernel[(programs,)](
        partial, grads, grads.numel(), programs * NORM_BLOCK, BLOCK=NORM_BLOCK, num_warps=NORM_WARPS
    )
    _norm_kernel[(1,)](norm, partial, programs, BLOCK=NORM_PROGRAMS, num_warps=4)


# -------------------------------------------------------------------------------------------------------------- AdamW


@triton.jit
def _mix(x):
    """Murmur3's finaliser of 32-bit words (kernels.optimizer.mix)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _random_bf16(bits, index, key, hyper):
    """fp32 values, given as int32 bits, rounded to bf16 at random: its 16 bits (kernels.optimizer._round_randomly)."""
    a = _mix((key ^ tl.load(hyper + 1).to(tl.int32)).to(tl.uint32))
    b = _mix(a + 0x9E3779B9)
    word = _mix(index.to(tl.uint32) ^ a) + b + (index >> 32).to(tl.uint32) * 0x9E3779B9
    return (bits + (_mix(word) >> 16).to(tl.int32)) >> 16


@triton.jit
def _store_moment(moment, x, lanes, mask, index, key, hyper, STREAM: tl.constexpr):
    """Store x (fp32), a part of m or v, as fp32, or rounded at random."""
    if moment.dtype.element_ty == tl.bfloat16:
        bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
        own = _mix((key ^ STREAM).to(tl.uint32)).to(tl.int32, bitcast=True)
        rounded = _random_bf16(bits, index, own, hyper)
        tl.store(moment + lanes, rounded.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(moment + lanes, x, mask=mask)


@triton.jit
def load_exact(weights, masters, lanes, mask, LAYOUT: tl.constexpr):
    """The exact parameters (fp32). LAYOUT says where they are stored: "plain" in weights, "masters" in masters with
    weights rounded from them, "split" in both, "none" in weights with random rounding."""
    if LAYOUT == "split" or LAYOUT == "none":
        high = tl.load(weights + lanes, mask=mask).to(tl.int16, bitcast=True).to(tl.int32) << 16
        if LAYOUT == "split":
            high += tl.load(masters + lanes, mask=mask).to(tl.int32)
        p = high.to(tl.float32, bitcast=True)
    else:
        p = tl.load(masters + lanes, mask=mask)
    return p


@triton.jit
def store_exact(weights, masters, p, lanes, mask, index, key, hyper, LAYOUT: tl.constexpr):
    """Store the exact parameters p. index: their places among all parameters; key: from the seed (`signed_key`)."""
    if LAYOUT == "plain":
        tl.store(weights + lanes, p, mask=mask)
    elif LAYOUT == "masters" and weights.dtype.element_ty == tl.float32:
        tl.store(masters + lanes, p, mask=mask)
        tl.store(weights + lanes, p, mask=mask)
    else:
        is_nan = p != p
        bits = tl.where(is_nan, 0x7FC00000, p.to(tl.int32, bitcast=True))
        if LAYOUT == "none":
            rounded = _random_bf16(bits, index, key, hyper)
        else:
            rounded = (bits + 0x8000) >> 16
        tl.store(weights + lanes, rounded.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        if LAYOUT == "masters":
            tl.store(masters + lanes, p, mask=mask)
        elif LAYOUT == "split":
            tl.store(masters + lanes, tl.where(is_nan, 0, bits - (rounded << 16)).to(tl.int16), mask=mask)


@triton.jit
def _adamw_kernel(
    weights, masters, m, v, grads, stats, hyper, n, offset, key,
    beta1, rest1, beta2, rest2, eps, weight_decay, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of adamw_update. rest = 1 - beta.

    Every product that is added to something is written as a fused multiply-add, and the compiler may fuse no other. The
    bits must not depend on the layout.
    """
    if tl.load(stats + 3) == 0.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        lanes = tl.arange(0, BLOCK)
        mask = start + lanes < n
        weights += start
        masters += start
        m += start
        v += start
        # All loads come before the first use, so that they run at the same time and hide the latency of memory.
        g = tl.load(grads + start + lanes, mask=mask)
        m1 = tl.load(m + lanes, mask=mask).to(tl.float32)
        v1 = tl.load(v + lanes, mask=mask).to(tl.float32)
        p = load_exact(weights, masters, lanes, mask, LAYOUT)

        scale = tl.load(stats + 2).to(tl.float32)
        lr = tl.load(hyper).to(tl.float32)
        unbias1 = tl.div_rn(1.0, tl.load(hyper + 3).to(tl.float32))
        unbias2 = tl.div_rn(1.0, tl.load(hyper + 4).to(tl.float32))
        g = g.to(tl.float32) * scale
        m1 = tl.fma(m1, beta1, g * rest1)
        v1 = tl.fma(v1, beta2, g * rest2 * g)
        step = tl.div_rn(m1 * unbias1, tl.sqrt_rn(v1 * unbias2) + eps)
        p = tl.fma(tl.fma(p, weight_decay, step), -lr, p)

        index = start + lanes + offset
        _store_moment(m, m1, lanes, mask, index, key, hyper, FIRST)
        _store_moment(v, v1, lanes, mask, index, key, hyper, SECOND)
        store_exact(weights, masters, p, lanes, mask, index, key, hyper, LAYOUT)


def layout_of(weights: Tensor, masters: Tensor | None) -> tuple[str, Tensor]:
    """LAYOUT, and a tensor for `masters` of kernels."""
    if masters is None:
        return "plain" if weights.dtype == torch.float32 else "none", weights
    return "plain" if masters is weights else "split" if masters.dtype == torch.int16 else "masters", masters


def signed_key(seed: int) -> int:
    """`stream_key` as a signed integer."""
    key = stream_key(seed)
    return key - (key >> 31 << 32)


@backend("triton")
def adamw_update(
    weights: Tensor, masters: Tensor | None, m: Tensor, v: Tensor, grads: Tensor, stats: Tensor, hyper: Tensor,
    *, beta1: float, beta2: float, eps: float, weight_decay: float, seed: int, offset: int,
) -> None:  # fmt: skip
    """One pass in fp32, scalars read on the device; gradients, weights and moments in bf16 or fp32."""
    (layout, exact), n = layout_of(weights, masters), m.numel()
    _adamw_kernel[(triton.cdiv(n, ADAMW_BLOCK),)](
        weights, exact, m, v, grads, stats, hyper, n, offset, signed_key(seed),
        beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, weight_decay,
        LAYOUT=layout, BLOCK=ADAMW_BLOCK, num_warps=ADAMW_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
