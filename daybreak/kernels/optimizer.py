"""Global gradient norm and AdamW (Loshchilov & Hutter 2019, algorithm 2) over flat buffers, in one pass.

m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p)

The exact parameter p (fp32 master weights) has one of three layouts. The argument `masters` decides:

fp32 or fp64 tensor  p itself; weights (compute dtype) are p rounded, or the same tensor if the dtypes are equal.
int16 tensor         fp32 p split in two: weights (bf16) hold p rounded, masters the 16 bits that are missing.
None                 only weights (bf16) exist. p is computed in fp32 and rounded at random, with probabilities that
                     make the expected value p (Gupta et al. 2015, section 3).

The split saves two bytes a parameter, since the weight is part of p. Its rounding is to the nearest bf16, and a tie
goes away from zero. Adding 0x8000 to the bits of p and keeping the upper 16 does that. The difference is 16 bits:

    bits(p)            0x3F80 C000      p = 1.005859375     0x3F80 4000
    + 0x8000           0x3F81 4000                          0x3F80 C000
    weight = upper 16  0x3F81           1.0078125           0x3F80
    master             0xC000 = -0x4000, as an int16        0x4000
    to join them       (0x3F81 << 16) - 0x4000 = 0x3F80 C000

So bits(p) = (bits(weight) << 16) + master, exactly, and both layouts with masters train with the same bits. An update
joins the split layout, updates it as fp32 and splits it again, one chunk of FLAT_CHUNK parameters at a time.

m and v are fp32 (fp64 for fp64 weights), or bf16, which saves four bytes a parameter. An update widens bf16 moments,
changes p by them, and rounds them at random as weights without masters. Rounding to nearest would lose most of what a
step adds to v: with b2 = 0.999 that is a thousandth, and neighbours in bf16 lie up to 1/128 apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, op, widen

FLAT_CHUNK = 1 << 20  # elements per pass: gradient, weight and moments of a chunk fit in the last-level cache
NAN_BITS = 0x7FC00000  # a NaN to which any 16 bits can be added
WORD = 0xFFFFFFFF
# Murmur3's finaliser (Appleby 2011): three shifts and two multipliers that let every input bit reach every output bit.
MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
M_STREAM, V_STREAM = 1, 2
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: added so that equal words differ


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


def layout_temps(weights: Tensor, masters: Tensor | None, acc: torch.dtype, N: int) -> Temps:
    """For rounding N values: bits, NaNs, p if it has no tensor of its own, random words twice."""
    rounded = N if weights.dtype != acc else 0
    joined = rounded if masters is None or masters.dtype == torch.int16 else 0
    words = rounded if masters is None else 0
    bits = [((rounded,), torch.int32), ((joined,), torch.bool)]
    return [*bits, ((joined,), acc), ((words,), torch.int64), ((words,), torch.int64)]


def adamw_temps(weights: Tensor, masters: Tensor | None, m: Tensor, *_: object, **__: object) -> Temps:
    """The scaled gradient, those for rounding weights, and for narrow moments: m, v, NaNs, random words twice."""
    N, acc = min(FLAT_CHUNK, m.numel()), acc_dtype(weights.dtype)
    narrow = (N if m.dtype != acc else 0,)
    moments = [(narrow, dtype) for dtype in (acc, acc, torch.bool, torch.int64, torch.int64)]
    return [((N,), acc), *layout_temps(weights, masters, acc, N), *moments]


def read_too(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that an update reads before it writes: weights only where they are part of the exact parameter."""
    masters = given.get("masters")
    return ("weights", "masters") if masters is None or masters.dtype == torch.int16 else ("masters",)


@op("weights", "masters", "m", "v", temps=adamw_temps, adds=lambda given: (*read_too(given), "m", "v"))
def adamw_update(
    weights: Tensor, masters: Tensor | None, m: Tensor, v: Tensor, grads: Tensor, stats: Tensor, hyper: Tensor,
    *, beta1: float, beta2: float, eps: float, weight_decay: float, seed: int, offset: int, scratch: Scratch,
) -> None:  # fmt: skip
    """Update flat weights (N, compute dtype), masters (N, see above), m and v (N, see above), from grads (N).

    stats (6,) fp64: stats[2] is the clip scale, stats[3] the skip flag (see kernels.guard). hyper (5,) fp64: learning
    rate, the update's number t from 1, (unused), 1 - beta1^t, 1 - beta2^t. A skipped update changes no bit. `weights`
    may be `masters`. Where something is rounded at random, seed and offset choose the bits; offset is the place of
    element 0 among all parameters. This reference reads the scalars on the host and computes the powers itself.
    """
    if stats[3].item() != 0.0:
        return
    wide, *temps = scratch(adamw_temps(weights, masters, m))
    temps, moments = temps[:-5], temps[-5:]
    lr, t = hyper[0].item(), hyper[1:2].to(torch.float32)
    for start in range(0, m.numel(), FLAT_CHUNK):
        part = slice(start, min(start + FLAT_CHUNK, m.numel()))
        g = scaled(wide[: part.stop - start], grads[part], stats)
        p = open_exact(weights, masters, part, temps)
        m1, v1 = (_open_moment(x[part], wider) for x, wider in zip((m, v), moments, strict=False))
        torch._fused_adamw_(
            [p], [g], [m1], [v1], [], [t], lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        close_exact(weights, masters, part, p, temps, offset, seed, hyper)
        for x, value, stream in ((m, m1, M_STREAM), (v, v1, V_STREAM)) if moments[0].numel() else ():
            nan, words, spare = (y[: len(value)] for y in moments[2:])
            key = moment_key(stream_key(seed), stream)
            _round_randomly(x[part], value, nan, words, spare, offset + start, key, int(hyper[1].item()))


def _open_moment(stored: Tensor, wider: Tensor) -> Tensor:
    """A part of m or v, to be changed in place: itself, or widened into a temporary."""
    return wider[: len(stored)].copy_(stored) if wider.numel() else stored


def scaled(out: Tensor, grads: Tensor, stats: Tensor) -> Tensor:
    """out = grads times the clip scale."""
    if grads.dtype == out.dtype:
        return torch.mul(grads, stats[2], out=out)
    return out.copy_(grads).mul_(stats[2])  # widen first: a product in the narrow dtype would be rounded


def open_exact(weights: Tensor, masters: Tensor | None, part: slice, temps: list[Tensor]) -> Tensor:
    """The exact parameters of a part, to be changed in place. temps: see `layout_temps`."""
    bits, _, joined, _, _ = (x[: part.stop - part.start] for x in temps)
    if masters is None:
        return joined.copy_(weights[part]) if joined.numel() else weights[part]
    return _join(joined, weights[part], masters[part], bits) if masters.dtype == torch.int16 else masters[part]


def close_exact(
    weights: Tensor, masters: Tensor | None, part: slice, p: Tensor, temps: list[Tensor], offset: int, seed: int,
    hyper: Tensor,
) -> None:  # fmt: skip
    """Round the exact parameters p that `open_exact` gave, and were changed since, to weights and masters."""
    bits, nan, _, words, spare = (x[: part.stop - part.start] for x in temps)
    w = weights[part]
    if masters is None:
        if bits.numel():
            _round_randomly(w, p, nan, words, spare, offset + part.start, stream_key(seed), int(hyper[1].item()))
    elif masters.dtype == torch.int16:
        _round_away(w, masters[part], p, bits, nan)
    elif bits.numel():  # the same for finite p, in one pass less: the lowest bit breaks a tie away from zero
        torch.bitwise_or(p.view(torch.int32), 1, out=bits)
        w.copy_(bits.view(torch.float32))
    elif masters is not weights:
        w.copy_(p)


# ------------------------------------------------------------------------------------------------ rounding away from 0


def _round_away(weights: Tensor, low: Tensor | None, values: Tensor, bits: Tensor, nan: Tensor) -> None:
    """weights (bf16) = values (fp32) rounded, low (int16) = the missing bits. bits (int32), nan (bool): temporaries.

    torch rounds ties to even. So the lowest bit is set where the low half is 0x8000 or more. A tie then lies above the
    middle and is rounded away from zero, and no other result changes.
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
    """The dtype of exact parameters, from the dtypes of weights and masters."""
    return weights if masters is None else torch.float32 if masters == torch.int16 else masters


def exact(weights: Tensor, masters: Tensor | None) -> Tensor:
    """Exact parameters of any layout (see above): the tensor that holds them, or a new one if they are split."""
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
    """weights (any shape) = fp32 master weights (same shape), rounded as in an update: bf16, ties away from zero.

    Finite values too large for bf16 become infinite: those from the middle between its largest and the next step on.
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

    Exact for every value but NaN: `join_masters` gives the same bits. This includes subnormal and infinite values, and
    those whose weight overflows to infinity. A NaN remains a NaN, with other bits.
    """
    for w, rest, value in _flat_chunks(weights, low, values):
        bits, nan = torch.empty_like(value, dtype=torch.int32), torch.empty_like(value, dtype=torch.bool)
        _round_away(w, rest, value, bits, nan)


def join_masters(out: Tensor, weights: Tensor, low: Tensor) -> Tensor:
    """out (fp32, contiguous, any shape) = the values split into weights (bf16) and low (int16). Returns out."""
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


def moment_key(key: int, stream: int) -> int:
    """The key of other random bits than those of weights, for M_STREAM or V_STREAM."""
    return mix(key ^ stream)


def _mix_words(x: Tensor, spare: Tensor) -> Tensor:
    """`mix` of 32-bit words in int64, in place. Products wrap at 2^64, but their low words are right."""
    for shift, multiplier in MIX:
        x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=spare)).mul_(multiplier).bitwise_and_(WORD)
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=spare))


def _round_randomly(
    weights: Tensor, values: Tensor, nan: Tensor, words: Tensor, spare: Tensor, first: int, key: int, t: int
) -> None:
    """weights (bf16) = values (fp32), rounded away from zero where the low 16 bits plus 16 random bits carry over.

    The carry has probability (low 16 bits) / 65536, so the expected weight is the value. Values that bf16 can hold,
    infinity included, stay. Finite values beyond the largest bf16 may become infinite, as in any rounding. The
    random bits of element i of all parameters in update t are, with key = stream_key(seed), a = mix(key ^ t) and
    b = mix(a + GOLDEN): mix(mix(low word of i ^ a) + b + GOLDEN * high word of i) >> 16. words, spare: int64.
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
