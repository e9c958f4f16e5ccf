"""Rotary positions in one pass, in place or with QK-norm: a program turns the heads of one token; formulas in
kernels/rope.py.

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


@triton.jit
def _rope_norm_kernel(
    to, x, freq, positions, to_t, x_t, T, heads, half, eps,
    GIVEN: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, turned and normed. BACK: `to` holds the gradient, and takes that of x."""
    token = tl.program_id(0)
    place = token % T
    if GIVEN:
        place = tl.load(positions + token)
    head, j = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    cos, sin = _cos_sin(place.to(tl.float32) * tl.load(freq + j, mask=j < half, other=0.0))
    cos, sin = cos[None, :], sin[None, :]
    inner = head[:, None] * (2 * half) + j[None, :]
    here = (head < heads)[:, None] & (j < half)[None, :]
    at = x + token.to(tl.int64) * x_t + inner
    to += token.to(tl.int64) * to_t + inner
    x1 = tl.load(at, mask=here, other=0.0).to(tl.float32)
    x2 = tl.load(at + half, mask=here, other=0.0).to(tl.float32)
    if BACK:
        d1 = tl.load(to, mask=here, other=0.0).to(tl.float32)
        d2 = tl.load(to + half, mask=here, other=0.0).to(tl.float32)
    r = (1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * half) + eps))[:, None]
    if BACK:
        g1, g2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
        x1, x2 = x1 * r, x2 * r
        mean = (tl.sum(g1 * x1 + g2 * x2, 1) / (2 * half))[:, None]
        y1, y2 = (g1 - x1 * mean) * r, (g2 - x2 * mean) * r
    else:
        y1, y2 = (x1 * cos - x2 * sin) * r, (x2 * cos + x1 * sin) * r
    tl.store(to, y1.to(to.dtype.element_ty), mask=here)
    tl.store(to + half, y2.to(to.dtype.element_ty), mask=here)


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


def norm_launch(heads: int, half: int) -> tuple[int, int, int]:
    """The same for heads that are normed: 16 pairs to a thread, whose angles then serve more than one head."""
    tile, pairs, _ = launch(heads, half)
    return tile, pairs, min(max(tile * pairs // 512, 1), 8)


def _rope_norm(
    to: Tensor, x: Tensor, freq: Tensor, positions: Tensor | None, T: int, eps: float, back: bool = False
) -> None:
    """Both of the following."""
    n, heads, HS = x.shape
    assert 2 * freq.numel() == HS, "whole heads turn"
    assert x[0].is_contiguous(), "a token's heads follow each other"
    assert to[0].is_contiguous(), "a token's heads follow each other"
    tile, pairs, warps = norm_launch(heads, freq.numel())
    _rope_norm_kernel[(n, triton.cdiv(heads, tile))](
        to, x, freq, freq if positions is None else positions, to.stride(0), x.stride(0), T, heads, freq.numel(), eps,
        GIVEN=positions is not None, BACK=back, HEADS=tile, HALF=pairs, num_warps=warps,
    )  # fmt: skip


@backend("triton")
def rope_norm_forward(
    out: Tensor, x: Tensor, freq: Tensor, positions: Tensor | None = None, *, T: int, eps: float
) -> None:
    """out (n, heads, HS) = the heads x, turned and normed: see the reference."""
    _rope_norm(out, x, freq, positions, T, eps)


@backend("triton")
def rope_norm_backward(
    d: Tensor, x: Tensor, freq: Tensor, positions: Tensor | None = None, *, T: int, eps: float
) -> None:
    """d (n, heads, HS), the gradient of the output, becomes that of x: see the reference."""
    _rope_norm(d, x, freq, positions, T, eps, back=True)
