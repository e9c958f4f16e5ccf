"""Rotary positions in one pass, in place: a program turns the heads of one token; formulas in kernels/rope.py.

Triton's own sine has a path for huge angles that keeps numbers in local memory. Angles here are places in a text, at
most: they are first reduced to an eighth of a turn on either side, where short polynomials have the accuracy of fp32.
"""

from __future__ import annotations

from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import overlapping, tl, triton

TILE = 2048  # pairs of one program, at most


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of 0 <= angle < 2^20, with an error of about 1e-7.

    Quarters of a turn are subtracted in two parts, pi / 2 to 24 bits and the rest: with one rounding, the multiple of
    the first is exact (Cody, Waite 1980)."""
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = tl.fma(turns, -1.5707962512969971, angle)
    x = tl.fma(turns, -7.5497894158615964e-08, x)
    z = x * x
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quarter = turns.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def angles(columns, freq, place, half, attention):
    """Cosine and sine for each column of a head at this place, times `attention`."""
    j = tl.where(columns >= half, columns - half, columns)
    cos, sin = _cos_sin(place.to(tl.float32) * tl.load(freq + j, mask=columns < 2 * half, other=0.0))
    return cos * attention, sin * attention


@triton.jit
def turned(x, columns, real, half, cos, sin):
    """The head that begins at x, turned and rounded as `_rope_kernel` does it. real: which columns there are."""
    turns, second = columns < 2 * half, columns >= half
    own = tl.load(x + columns, mask=real, other=0.0)
    mate = tl.load(x + tl.where(second, columns - half, columns + half), mask=turns, other=0.0).to(tl.float32)
    wide = own.to(tl.float32)
    y = tl.where(second, wide * cos + mate * sin, wide * cos - mate * sin)
    return tl.where(turns, y.to(x.dtype.element_ty), own)


@triton.jit
def _rope_kernel(
    x, freq, positions, x_b, x_t, x_h, T, heads, half, attention,
    GIVEN: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """Some heads of one token. Its place is its place in a sequence of T, or is read from `positions` if GIVEN.

    OVERLAP: the launch began while the one before it ran (see decode.py)."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    b, t = token // T, token % T
    place = t.to(tl.int64)
    if GIVEN:
        place = tl.load(positions + b)
    head, j = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    cos, sin = _cos_sin(place.to(tl.float32) * tl.load(freq + j, mask=j < half, other=0.0))
    cos, sin = (cos * attention)[None, :], (sin * attention)[None, :]
    if BACK:
        sin = -sin
    at = x + b.to(tl.int64) * x_b + t.to(tl.int64) * x_t + head.to(tl.int64)[:, None] * x_h + j[None, :]
    here = (head < heads)[:, None] & (j < half)[None, :]
    x1 = tl.load(at, mask=here, other=0.0).to(tl.float32)
    x2 = tl.load(at + half, mask=here, other=0.0).to(tl.float32)
    tl.store(at, (x1 * cos - x2 * sin).to(x.dtype.element_ty), mask=here)
    tl.store(at + half, (x2 * cos + x1 * sin).to(x.dtype.element_ty), mask=here)


def launch(heads: int, half: int) -> tuple[int, int, int]:
    """Heads of one program, padded pairs of a head, and warps: 8 pairs to a thread."""
    pairs = triton.next_power_of_2(half)
    tile = min(triton.next_power_of_2(heads), max(1, TILE // pairs))
    return tile, pairs, min(max(tile * pairs // 256, 1), 8)


@backend("triton")
def rope(
    x: Tensor, freq: Tensor, positions: Tensor | None = None, *, attention: float = 1.0, back: bool = False
) -> None:
    """Turn x (B, T, heads, HS) in place: see the reference. Elements of a head must follow each other."""
    B, T, heads, _ = x.shape
    assert x.stride(3) == freq.stride(0) == 1, "heads must be contiguous"
    tile, pairs, warps = launch(heads, freq.numel())
    _rope_kernel[(B * T, triton.cdiv(heads, tile))](
        x, freq, freq if positions is None else positions, *x.stride()[:3], T, heads, freq.numel(), attention,
        GIVEN=positions is not None, BACK=back, HEADS=tile, HALF=pairs, num_warps=warps,
        **({} if positions is None else overlapping(x.device)),
    )  # fmt: skip
