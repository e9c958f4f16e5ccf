"""Global gradient norm and AdamW (Loshchilov & Hutter 2019, algorithm 2) over flat buffers, in one pass.

m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p)

The exact parameter p lies in one of three layouts, told by `masters`:

fp32 or fp64 tensor  p itself; weights (compute dtype) are p rounded, or the same tensor where nothing is to round.
int16 tensor         fp32 p split in two: weights (bf16) hold p rounded, masters the 16 bits that are missing.
None                 weights (bf16) are all there is: p is computed in fp32 and rounded at random, with probabilities
                     that make the expected value p (Gupta et al. 2015, section 3).

fp32 p is rounded to the nearest bf16, a tie away from zero. Added to the bits of p, 0x8000 does that, and what p lacks
then always fits 16 bits: bits(p) = (bits(weight) << 16) + master. So both layouts train with the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, op, widen

FLAT_CHUNK = 1 << 20  # elements per pass: gradient, weight and moments of a chunk fit in the last-level cache
NAN_BITS = 0x7FC00000  # a NaN to which any 16 bits can be added
WORD = 0xFFFFFFFF
# Murmur3's finaliser (Appleby 2011): three shifts and two multipliers that let every input bit reach every output bit.
MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: sets apart what would otherwise be equal


def norm_temps(norm: Tensor, grads: Tensor) -> Temps:
    acc = acc_dtype(grads.dtype)
    chunks = -(-grads.numel() // FLAT_CHUNK)
    return [((chunks,), acc), ((min(FLAT_CHUNK, grads.numel()),), acc)]


@op("norm", temps=norm_temps)
def global_norm(norm: Tensor, grads: Tensor, *, scratch: Scratch) -> None:
    """norm (scalar, fp64) = the 2-norm of grads (N): chunk sums in fp32 or wider, their total in fp64."""
    partial, wide = scratch(norm_temps(norm, grads))
    for i, start in enumerate(range(0, grads.numel(), FLAT_CHUNK)):
        g = grads[start : start + FLAT_CHUNK]
        g = widen(g, wide[: g.numel()])
        torch.dot(g, g, out=partial[i])
    norm.copy_(partial.sum(dtype=torch.float64).sqrt())


def adamw_temps(weights: Tensor, masters: Tensor | None, m: Tensor, *_: object, **__: object) -> Temps:
    """Scaled gradient; then what rounding needs: bits and NaNs, p where it is no tensor of its own, random words."""
    N = min(FLAT_CHUNK, m.numel())
    rounded = N if weights.dtype != m.dtype else 0
    joined = rounded if masters is None or masters.dtype == torch.int16 else 0
    words = rounded if masters is None else 0
    return [
        ((N,), m.dtype), ((rounded,), torch.int32), ((joined,), torch.bool), ((joined,), m.dtype),
        ((words,), torch.int64), ((words,), torch.int64),
    ]  # fmt: skip


@op("weights", "masters", "m", "v", temps=adamw_temps)
def adamw_update(
    weights: Tensor, masters: Tensor | None, m: Tensor, v: Tensor, grads: Tensor, stats: Tensor, hyper: Tensor,
    *, beta1: float, beta2: float, eps: float, weight_decay: float, seed: int, offset: int, scratch: Scratch,
) -> None:  # fmt: skip
    """Update flat weights (N, compute dtype), masters (N, see above), m and v (N) in fp32 or fp64, from grads (N).

    stats (6,) fp64: stats[2] is the clip scale, stats[3] the skip flag (see kernels.guard). hyper (5,) fp64: learning
    rate, the update's number t from 1, (unused), 1 - beta1^t, 1 - beta2^t. A skipped update touches nothing, bit for
    bit. `weights` may be `masters`. seed and offset, the place of element 0 among all parameters, choose the random
    bits where there are no masters. This reference reads the scalars on the host and takes the powers itself.
    """
    if stats[3].item() != 0.0:
        return
    wide, bits_, nan_, joined, words, spare = scratch(adamw_temps(weights, masters, m))
    lr, t = hyper[0].item(), hyper[1:2].to(torch.float32)
    key = stream_key(seed)
    rounded = weights.dtype != m.dtype
    split = masters is not None and masters.dtype == torch.int16
    for start in range(0, m.numel(), FLAT_CHUNK):
        part = slice(start, min(start + FLAT_CHUNK, m.numel()))
        N = part.stop - start
        g, bits, nan, w = wide[:N], bits_[:N], nan_[:N], weights[part]
        if grads.dtype == g.dtype:
            torch.mul(grads[part], stats[2], out=g)
        else:  # widen first: the product of a narrow tensor would be rounded
            g.copy_(grads[part]).mul_(stats[2])
        if masters is None:
            p = joined[:N].copy_(w) if rounded else w
        else:
            p = _join(joined[:N], w, masters[part], bits) if split else masters[part]
        torch._fused_adamw_(
            [p], [g], [m[part]], [v[part]], [], [t], lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, amsgrad=False, maximize=False,
        )  # fmt: skip
        if rounded and masters is None:
            _round_randomly(w, p, nan, words[:N], spare[:N], offset + start, key, int(hyper[1].item()))
        elif rounded and split and masters is not None:
            _round_away(w, masters[part], p, bits, nan)
        elif rounded:  # the same for finite p, in one pass less: a set lowest bit makes a tie more than a tie
            torch.bitwise_or(p.view(torch.int32), 1, out=bits)
            w.copy_(bits.view(torch.float32))
        elif masters is not None and masters is not weights:
            w.copy_(p)


# ------------------------------------------------------------------------------------------------ rounding away from 0


def _round_away(weights: Tensor, low: Tensor | None, values: Tensor, bits: Tensor, nan: Tensor) -> None:
    """weights (bf16) = values (fp32) rounded, low (int16) = what is missing. bits (int32), nan (bool): temporaries.

    torch rounds ties to even; the lowest bit, set where the low half is 0x8000 or more, makes a tie more than a tie
    and changes no other result.
    """
    exact = values.view(torch.int32)
    torch.bitwise_right_shift(exact, 15, out=bits).bitwise_and_(1).bitwise_or_(exact)
    weights.copy_(bits.view(torch.float32))
    if low is not None:
        bits.copy_(weights.view(torch.int16)).bitwise_left_shift_(16)
        torch.sub(exact, bits, out=bits)
        low.copy_(bits.masked_fill_(torch.ne(values, values, out=nan), 0))


def _join(out: Tensor, weights: Tensor, low: Tensor, bits: Tensor) -> Tensor:
    """out (fp32) = the values that `_round_away` split. bits (int32): a temporary."""
    out.view(torch.int32).copy_(weights.view(torch.int16)).bitwise_left_shift_(16).add_(bits.copy_(low))
    return out


def exact_dtype(weights: torch.dtype, masters: torch.dtype | None) -> torch.dtype:
    """Of exact parameters, from the dtypes of weights and masters."""
    return weights if masters is None else torch.float32 if masters == torch.int16 else masters


def exact(weights: Tensor, masters: Tensor | None) -> Tensor:
    """Exact parameters of any layout (see above): a view, or of split ones a new tensor."""
    if masters is None or masters.dtype != torch.int16:
        return weights if masters is None else masters
    return join_masters(torch.empty_like(weights, dtype=torch.float32), weights, masters)


def set_exact(weights: Tensor, masters: Tensor | None, values: Tensor) -> None:
    """Set weights and masters of any layout from exact values of their shape, of any float dtype and device."""
    if masters is None:
        weights.copy_(values)
    elif masters.dtype == torch.int16:
        split_masters(weights, masters, values.to(weights.device, torch.float32))
    else:
        round_weights(weights, masters.copy_(values))


def round_weights(weights: Tensor, masters: Tensor) -> None:
    """weights (any shape) = masters (its shape) as an update rounds them: to bf16 with ties away from zero.

    Finite values that bf16 cannot hold, those from halfway beyond its largest on, become infinite.
    """
    if weights.dtype != torch.bfloat16 or masters.dtype != torch.float32:
        weights.copy_(masters)
        return
    for w, value in _flat_chunks(weights, masters):
        _round_away(
            w, None, value, torch.empty_like(value, dtype=torch.int32), torch.empty_like(value, dtype=torch.bool)
        )


def split_masters(weights: Tensor, low: Tensor, values: Tensor) -> None:
    """Split values (fp32, any shape) into weights (bf16, contiguous) and low (int16, contiguous) of the same shape.

    Exact for every value that is not NaN, subnormal and infinite ones and those whose weight overflows to infinity
    included: `join_masters` gives the same bits. A NaN stays one, of other bits.
    """
    for w, rest, value in _flat_chunks(weights, low, values):
        bits, nan = torch.empty_like(value, dtype=torch.int32), torch.empty_like(value, dtype=torch.bool)
        _round_away(w, rest, value, bits, nan)


def join_masters(out: Tensor, weights: Tensor, low: Tensor) -> Tensor:
    """out (fp32, contiguous, any shape) = what weights (bf16) and low (int16) were split from. Returns out."""
    for value, w, rest in _flat_chunks(out, weights, low):
        _join(value, w, rest, torch.empty_like(value, dtype=torch.int32))
    return out


def _flat_chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of FLAT_CHUNK elements each, so that temporaries stay small; only the last tensor may be strided."""
    assert len({x.shape for x in tensors}) == 1, "these tensors have one shape"
    flat = [x.view(-1) for x in tensors[:-1]] + [tensors[-1].reshape(-1)]
    return [tuple(x[i : i + FLAT_CHUNK] for x in flat) for i in range(0, flat[0].numel(), FLAT_CHUNK)]


# ----------------------------------------------------------------------------------------------------- random rounding


def mix(x: int) -> int:
    """Murmur3's finaliser of a 32-bit word."""
    for shift, multiplier in MIX:
        x = ((x ^ x >> shift) * multiplier) & WORD
    return x ^ x >> 16


def stream_key(seed: int) -> int:
    """A 32-bit word from the low 64 bits of a seed."""
    return mix(mix((seed + GOLDEN) & WORD) ^ (seed >> 32 & WORD))


def _mix_words(x: Tensor, spare: Tensor) -> Tensor:
    """`mix` of 32-bit words in int64, in place: products wrap at 2^64, their low words are right."""
    for shift, multiplier in MIX:
        x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=spare)).mul_(multiplier).bitwise_and_(WORD)
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=spare))


def _round_randomly(
    weights: Tensor, values: Tensor, nan: Tensor, words: Tensor, spare: Tensor, first: int, key: int, t: int
) -> None:
    """weights (bf16) = values (fp32), rounded away from zero where the low 16 bits plus 16 random bits carry over.

    The carry has probability (low 16 bits) / 65536, so the expected weight is the value; what bf16 holds, infinity
    included, stays. Finite values beyond the largest bf16 may become infinite, as in any rounding. The random bits of
    element i of all parameters in update t: with key = stream_key(seed), a = mix(key ^ t), b = mix(a + GOLDEN),
    mix(mix(low word of i ^ a) + b + GOLDEN * high word of i) >> 16. words, spare: int64.
    """
    a = mix(key ^ t & WORD)
    b = mix((a + GOLDEN) & WORD)
    torch.arange(first, first + values.numel(), out=words)
    _mix_words(words.bitwise_and_(WORD).bitwise_xor_(a), spare)
    torch.arange(first, first + values.numel(), out=spare)
    words.add_(spare.bitwise_right_shift_(32).mul_(GOLDEN)).add_(b).bitwise_and_(WORD)
    _mix_words(words, spare).bitwise_right_shift_(16)
    torch.ne(values, values, out=nan)
    spare.copy_(values.view(torch.int32)).masked_fill_(nan, NAN_BITS).add_(words).bitwise_right_shift_(16)
    weights.view(torch.int16).copy_(spare)
