"""Rounding to fp8 on GPUs. Formats and rules are in kernels/fp8.py.

The fp8 matmuls of these GPUs sum over neighbours in memory. So most matrices are written twice, as they are and
transposed. One kernel does both in a pass over memory, and takes the largest magnitude meanwhile:

    bf16 (n, C)           a program's tile, 128 rows by 64 columns        fp8 (n, C) and (C, n)

    | . . . . . . |        | x = tile in fp32             |               | . q . . . . |
    | . t . . . . |  --->  | amax = max(amax, |x|)        |  --------->   | . . . . . . |     | . . |
    | . . . . . . |        | q = x / scale, rounded       |         |                       | q^T . |
                                                                    '---------------------> | . . |

The tile may go through GELU first, or be multiplied by its derivative, whose column sums are a bias gradient.

The largest magnitude is found with atomics on its bits as an integer. A maximum is the same in any order, so they keep
every bit; and NaN and infinity are larger than all numbers.
"""

from __future__ import annotations

from torch import Tensor, int32

from daybreak.kernels.cuda import INTERPRET, tl, triton
from daybreak.kernels.cuda.gelu import sigmoid_2u
from daybreak.kernels.operand import Operand

COMPILED = tl.constexpr(not INTERPRET)
ROWS, COLS, WARPS = 128, 64, 8  # of a tile: 64 bytes of a row of the result, 128 of a column
TILES = 4  # that a program takes, below each other


@triton.jit
def _widened(x):
    """bf16 as fp32: its bits, and 16 zeros.

    By an instruction of its own: where Triton sees a cast, it turns the tile before it, as that has fewer bytes. Then
    all of the arithmetic is done twice, for the tile as it is and for the turned one."""
    if COMPILED:
        pack: tl.constexpr = "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }"
        bits = tl.inline_asm_elementwise(pack, "=r,h", [x], dtype=tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(x, scale, LARGEST: tl.constexpr, kind: tl.constexpr):
    """x / scale, which is a power of two, rounded; larger values become the largest, and NaN stays."""
    y = x * (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(y != y, y, tl.minimum(tl.maximum(y, -LARGEST), LARGEST)).to(kind)


@triton.jit
def _quantise_kernel(
    value, transposed, scale, amax, x, pre, again, again_scale, part, n, C,
    MEASURE: tl.constexpr, CURRENT: tl.constexpr, ACT: tl.constexpr, VALUE: tl.constexpr, TRANSPOSED: tl.constexpr,
    AGAIN: tl.constexpr, LARGEST: tl.constexpr, AGAIN_LARGEST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """value (n, C) and transposed (C, n) = act(x (n, C)) / scale, rounded; amax, as an integer, takes |act(x)|.

    ACT: none, gelu, or slope, which multiplies by gelu'(pre) and writes column sums to `part`, a row for each
    program_id(1). MEASURE: only amax. CURRENT: the scale is made of amax. AGAIN: again (C, n) = gelu(pre), rounded.
    """
    down, across = tl.arange(0, ROWS), tl.arange(0, COLS)
    column = tl.program_id(0) * COLS
    inner, turned = down[:, None] * C + across[None, :], across[:, None] * n + down[None, :]
    largest = tl.zeros((COLS,), tl.int32)
    sums = tl.zeros((COLS,), tl.float32)
    s = tl.load(scale)
    if CURRENT and not MEASURE:
        bound = tl.div_rn(tl.load(amax).to(tl.float32, bitcast=True), tl.full((), LARGEST, tl.float32))
        bits = (bound.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        s = tl.where(bound == 0.0, 1.0, bits.to(tl.float32, bitcast=True))
        s = tl.minimum(tl.maximum(s, 7.888609052210118e-31), 1.2676506002282294e30)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scale, s)
    for i in range(TILES):
        row = (tl.program_id(1) * TILES + i) * ROWS
        here = (down < n - row)[:, None] & (across < C - column)[None, :]
        there = (across < C - column)[:, None] & (down < n - row)[None, :]
        at, to = row.to(tl.int64) * C + column, column.to(tl.int64) * n + row
        y = _widened(tl.load(x + at + inner, mask=here, other=0.0))
        if ACT == "gelu":
            y = y * sigmoid_2u(y)
        if ACT == "slope":
            p = _widened(tl.load(pre + at + inner, mask=here, other=0.0))
            g = sigmoid_2u(p)
            y *= g + g * (1.0 - g) * p * (1.5957691216057308 + 0.21406626995640576 * p * p)
            sums += tl.sum(y, 0)
        largest = tl.maximum(largest, tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
        if not MEASURE:
            q = rounded(y, s, LARGEST, value.dtype.element_ty)
            if VALUE:
                tl.store(value + at + inner, q, mask=here)
            if TRANSPOSED:
                tl.store(transposed + to + turned, tl.trans(q), mask=there)
            if AGAIN:
                r = rounded(p * g, tl.load(again_scale), AGAIN_LARGEST, again.dtype.element_ty)
                tl.store(again + to + turned, tl.trans(r), mask=there)
    if ACT == "slope":
        tl.store(part + tl.program_id(1) * C + column + across, sums, mask=across < C - column)
    found = tl.max(largest, 0)
    if found > tl.load(amax):  # it only grows, so an old value costs an atomic, and no bit
        tl.atomic_max(amax, found)


def programs(n: int, C: int) -> tuple[int, int]:
    """The launch for a matrix (n, C)."""
    return triton.cdiv(C, COLS), triton.cdiv(n, ROWS * TILES)


def write(
    out: Operand, x: Tensor, act: str = "", pre: Tensor | None = None, again: Operand | None = None,
    part: Tensor | None = None,
) -> None:  # fmt: skip
    """out = act(x (n, C)), or x itself. act: "gelu", or "slope", x * gelu'(pre (n, C)) with its column sums in part
    (programs, C); then again.transposed = gelu(pre) too."""
    assert x.is_contiguous(), "rows follow each other"
    assert out.amax is not None, "fp8 has slots"
    other = again.transposed if again else None
    some = out.value if out.transposed is None else out.transposed
    for measure in (True, False) if out.current else (False,):
        _quantise_kernel[programs(*x.shape)](
            some if out.value is None else out.value, some if out.transposed is None else out.transposed,
            out.scale, out.amax.view(int32), x, x if pre is None else pre,
            some if other is None else other, again.scale if again else out.scale,
            out.scale if part is None else part, *x.shape,
            MEASURE=measure, CURRENT=out.current, ACT=act, VALUE=out.value is not None,
            TRANSPOSED=out.transposed is not None, AGAIN=other is not None, LARGEST=out.format.largest,
            AGAIN_LARGEST=again.format.largest if again else 0.0, ROWS=ROWS, COLS=COLS, TILES=TILES, num_warps=WARPS,
        )  # fmt: skip
