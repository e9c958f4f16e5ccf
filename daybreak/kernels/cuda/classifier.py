"""Softmax cross-entropy in place and the sum of the losses; formulas in kernels/classifier.py.

A program takes whole rows, and a row twice: once for its largest logit and the sum of exponentials (online, Milakov and
Gimelshein 2018), once for the gradient. The second reading comes from the cache, so memory sees one read and one write:
PROGRAMS rows are under way at once, 27 MB at a vocabulary of 50304 in bf16, and of its 50 MB an H100's L2 cache
keeps little more from one reading to the next. No result depends on PROGRAMS.
"""

from __future__ import annotations

from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import LN2, LOG2E, tl, triton

PROGRAMS = 264  # two for each of an H100's 132 multiprocessors, which then hold all their threads,
WARPS, REGISTERS = 32, 32  # with so many registers each
VECTOR = 16  # bytes that a thread loads at a time, and as many again under way
CAPPED_WARPS, CAPPED_REGISTERS = 16, 64  # with a soft-cap, whose slope needs more of them
CAP_BLOCK = 1024
SUM_BLOCK, SUM_WARPS = 8192, 32


@triton.jit
def _online(m, s, x):
    """m, s (LANES): largest logit in powers of two and sum of 2^(logit - m) so far, continued by x (LANES, VEC).

    Arithmetic bounds the time as memory does, and an exponential as 2^(x log2(e) - m) is an instruction less. It
    keeps its last bits if that is rounded once (fma): m itself was rounded, but is the same number everywhere. From
    logits of 2^31 / log2(e) = 1.5e9 on, what m lost can be 128: the loss of such a row need not be finite.
    """
    largest = tl.maximum(m, tl.max(x, 1) * LOG2E)
    return largest, s * tl.exp2(m - largest) + tl.sum(tl.exp2(tl.fma(x, LOG2E, -largest[:, None])), 1)


@triton.jit
def capped(x, CAP: tl.constexpr):
    """CAP tanh(x / CAP), or x itself without a cap."""
    if CAP > 0.0:
        x = CAP * (2.0 / (1.0 + tl.exp2(x * (-2.0 / CAP * LOG2E))) - 1.0)
    return x


@triton.jit
def _sloped(d, x, CAP: tl.constexpr):
    """d times the slope of the cap, where x is capped already."""
    if CAP > 0.0:
        d *= 1.0 - x * x * (1.0 / (CAP * CAP))
    return d


@triton.jit
def _classifier_kernel(
    losses, logits, targets, scale, n, V, Vp,
    BACKWARD: tl.constexpr, CAP: tl.constexpr, Z_LOSS: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A tile is (TILE / VEC, VEC): a thread holds whole rows of it, so the running sums need no other thread.

    Loads are masked by Vp, which is a multiple of 16, and not by V, which is not: else they would be of single values.
    """
    cols = tl.arange(0, TILE // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    factor = tl.load(scale).to(tl.float32)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        row = n - 1 - i  # the last first: the end of the matmul's output is still in the L2 cache
        target = tl.load(targets + row).to(tl.int32)
        z = logits + row.to(tl.int64) * Vp
        # A row without a target is one of no columns: the first pass reads nothing, the second writes zeros.
        columns = tl.where(target < 0, 0, V)
        full = columns // TILE * TILE
        picked = capped(tl.load(z + tl.maximum(target, 0)).to(tl.float32), CAP)

        m = tl.full((TILE // VEC,), -3.4e38, tl.float32)  # finite, so that m - m is 0
        s = tl.zeros((TILE // VEC,), tl.float32)
        following = tl.load(z + cols, mask=full > 0, other=0.0, eviction_policy="evict_last")
        for start in range(0, full, TILE):
            x = capped(following.to(tl.float32), CAP)
            at = start + TILE + cols
            following = tl.load(z + at, mask=start + TILE < full, other=0.0, eviction_policy="evict_last")
            m, s = _online(m, s, x)
        for start in range(full, columns, TILE):
            x = capped(tl.load(z + start + cols, mask=start + cols < Vp, other=0.0).to(tl.float32), CAP)
            m, s = _online(m, s, tl.where(start + cols < columns, x, float("-inf")))
        largest = tl.max(m, 0)
        total = tl.where(target < 0, 1.0, tl.sum(s * tl.exp2(m - largest), 0))
        loss = tl.log(total) - tl.fma(picked, LOG2E, -largest) * LN2
        tl.store(losses + row, tl.where(target < 0, 0.0, loss))

        # Backwards through the columns: those read last are the nearest. Written lines leave the cache first.
        if BACKWARD:
            inverse = factor / total
            if Z_LOSS > 0.0:
                inverse *= 1.0 + 2.0 * Z_LOSS * (tl.log(total) + tl.where(target < 0, 0.0, largest) * LN2)
            for start in range(full, Vp, TILE):
                at = start + cols
                x = capped(tl.load(z + at, mask=at < Vp, other=0.0).to(tl.float32), CAP)
                e = tl.where(at < columns, x, float("-inf"))
                d = tl.exp2(tl.fma(e, LOG2E, -largest)) * inverse - tl.where(at == target, factor, 0.0)
                d = _sloped(d, tl.where(at < columns, x, 0.0), CAP)
                tl.store(z + at, d.to(logits.dtype.element_ty), mask=at < Vp, cache_modifier=".cs")
            following = tl.load(z + full - TILE + cols, mask=full > 0, other=0.0)
            for done in range(0, full, TILE):
                start = full - TILE - done
                at = start + cols
                x = capped(following.to(tl.float32), CAP)
                following = tl.load(z + at - TILE, mask=done + TILE < full, other=0.0)
                d = tl.exp2(tl.fma(x, LOG2E, -largest)) * inverse
                if (target >= start) & (target < start + TILE):
                    d -= tl.where(at == target, factor, 0.0)
                d = _sloped(d, x, CAP)
                tl.store(z + at, d.to(logits.dtype.element_ty), cache_modifier=".cs")


@backend("triton")
def classifier(
    losses: Tensor, logits: Tensor, targets: Tensor, scale: Tensor,
    *, V: int, backward: bool, softcap: float = 0.0, z_loss: float = 0.0,
) -> None:  # fmt: skip
    """losses (n) of logits (n, Vp) for targets (n) int64; with `backward`, logits become d_logits. scale is 0-d."""
    n, Vp = logits.shape
    vec = VECTOR // logits.element_size()
    warps, registers = (CAPPED_WARPS, CAPPED_REGISTERS) if softcap else (WARPS, REGISTERS)
    _classifier_kernel[(min(n, PROGRAMS),)](
        losses, logits, targets, scale, n, V, Vp,
        BACKWARD=backward, CAP=softcap, Z_LOSS=z_loss if backward else 0.0, TILE=32 * warps * vec, VEC=vec,
        num_warps=warps, maxnreg=registers,
    )  # fmt: skip


@triton.jit
def _cap_logits_kernel(logits, size, CAP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = capped(tl.load(logits + at, mask=at < size, other=0.0).to(tl.float32), CAP)
    tl.store(logits + at, x.to(logits.dtype.element_ty), mask=at < size)


@backend("triton")
def cap_logits(logits: Tensor, *, cap: float) -> None:
    """logits (r, Vp), contiguous, become cap tanh(logits / cap)."""
    size = logits.numel()
    _cap_logits_kernel[(triton.cdiv(size, CAP_BLOCK),)](logits, size, CAP=cap, BLOCK=CAP_BLOCK, num_warps=4)


@triton.jit
def _loss_sum_kernel(total, losses, scale, n, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """All of it in one program and in fp64: n is small, and a second launch would cost more than it saves."""
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        acc += tl.load(losses + start + lanes, mask=start + lanes < n, other=0.0).to(tl.float64)
    value = tl.sum(acc, 0) * tl.load(scale).to(tl.float64)
    if ACCUMULATE:
        value += tl.load(total)
    tl.store(total, value)


@backend("triton")
def loss_sum(total: Tensor, losses: Tensor, scale: Tensor, *, accumulate: bool) -> None:
    """total (0-d, fp64) = sum of losses (n) * scale (0-d), added to it if `accumulate`."""
    _loss_sum_kernel[(1,)](
        total, losses, scale, losses.numel(), ACCUMULATE=accumulate, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS
    )
