"""Rounding to fp8 on GPUs. Formats and rules are in kernels/fp8.py.

The fp8 matmuls of these GPUs sum over neighbours in memory. So most matrices are written twice, as they are and
transposed. One kernel does both in a pass over memory, and takes the largest magnitude meanwhile:

    bf16 (n, C)           a program's tile, 128 rows by 64 columns        fp8 (n, C) and (C, n)

    | . . . . . . |        | x = tile in fp32             |               | . q . . . . |
    | . t . . . . |  --->  | amax = max(amax, |x|)        |  --------->   | . . . . . . |     | . . |
    | . . . . . . |        | q = x / scale, rounded       |         |                       | q^T . |
                                                                    '---------------------> | . . |

A thread reads four rows that follow each other. Of each column it then has four bytes of the transposed copy, a word of
32 bits, and words are what threads exchange. So there is a fourth as much to exchange.

The tile may go through GELU, a norm or the gate of an MLP first, or be multiplied by GELU's derivative, whose column
sums are a bias gradient.

The largest magnitude is found with atomics on its bits as an integer. A maximum is the same in any order, so they keep
every bit; and NaN and infinity are larger than all numbers.
"""

from __future__ import annotations

from torch import Tensor, int32

from daybreak.kernels.cuda import INTERPRET, tl, triton
from daybreak.kernels.cuda.gelu import sigmoid_2u
from daybreak.kernels.cuda.glu import gate_sigmoid
from daybreak.kernels.operand import Operand

COMPILED = tl.constexpr(not INTERPRET)
ROWS, COLS, WARPS = 128, 64, 4  # of a tile: 64 bytes of a row of the result, 128 of a column
WIDE = 32, 256, 8  # where nobody wants columns
MULTIPLE = 16  # of rows and columns


def _instructions(kind: str) -> str:
    """PTX for four columns of four rows: $8 to $23, in fp32 and row by row, become the bytes of each row in $0 to $3,
    and those of each column in $4 to $7. cvt rounds to nearest even, saturates, and keeps NaN."""
    pairs = (f"cvt.rn.satfinite.{kind}x2.f32 pair{i}, ${2 * i + 9}, ${2 * i + 8};" for i in range(8))
    rows = (f"mov.b32 row{i}, {{pair{2 * i}, pair{2 * i + 1}}}; mov.b32 ${i}, row{i};" for i in range(4))
    # A digit of a selector takes one of the first operand's bytes 0 to 3 or of the second's 4 to 7, the lowest first.
    columns = (
        "prmt.b32 left01, row0, row1, 0x5140; prmt.b32 right01, row0, row1, 0x7362;",
        "prmt.b32 left23, row2, row3, 0x5140; prmt.b32 right23, row2, row3, 0x7362;",
        "prmt.b32 $4, left01, left23, 0x5410; prmt.b32 $5, left01, left23, 0x7632;",
        "prmt.b32 $6, right01, right23, 0x5410; prmt.b32 $7, right01, right23, 0x7632;",
    )
    registers = ".reg .b16 pair<8>; .reg .b32 row<4>, left01, left23, right01, right23;"
    return "\n".join(("{", registers, *pairs, *rows, *columns, "}"))


E4M3_BYTES, E5M2_BYTES = tl.constexpr(_instructions("e4m3")), tl.constexpr(_instructions("e5m2"))
REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 16))  # all operands are read before a result is written


@triton.jit
def rounded(x, scale, LARGEST: tl.constexpr, kind: tl.constexpr):
    """x / scale, which is a power of two, rounded; larger values become the largest, and NaN stays."""
    return _saturated(x * _inverse(scale), LARGEST, kind)


@triton.jit
def _saturated(x, LARGEST: tl.constexpr, kind: tl.constexpr):
    if COMPILED:
        asm: tl.constexpr = (
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;"
            if kind == tl.float8e4nv
            else "cvt.rn.satfinite.e5m2x2.f32 $0, $2, $1;"
        )
        return _as(tl.inline_asm_elementwise(asm, "=h,r,r", [x], tl.int8, is_pure=True, pack=2), kind)
    return tl.where(x != x, x, tl.minimum(tl.maximum(x, -LARGEST), LARGEST)).to(kind)


@triton.jit
def _inverse(scale):
    """1 / scale, which is a power of two."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    """gelu.py's sigmoid_2u, by instructions that take numbers below 2^-126 for 0: all that come of them round to 0."""
    if COMPILED:
        e = -1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        asm: tl.constexpr = (
            "{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }"
        )
        return tl.inline_asm_elementwise(asm, "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1)
    return sigmoid_2u(x)


@triton.jit
def _slope(x, s):
    """gelu'(x), given s = _sigmoid(x)."""
    return s + s * (1.0 - s) * x * (1.5957691216057308 + 0.21406626995640576 * x * x)


@triton.jit
def _bytes(y0, y1, y2, y3, kind: tl.constexpr, LARGEST: tl.constexpr):
    """Four tiles of fp32, rounded, and a tile of words that hold the four values of a place, the first one lowest."""
    if COMPILED:
        asm: tl.constexpr = E4M3_BYTES if kind == tl.float8e4nv else E5M2_BYTES
        q0, q1, q2, q3, words = tl.inline_asm_elementwise(
            asm, REGISTERS, [y0, y1, y2, y3], (tl.int8, tl.int8, tl.int8, tl.int8, tl.int32), is_pure=True, pack=4
        )
        return _as(q0, kind), _as(q1, kind), _as(q2, kind), _as(q3, kind), words
    q0, q1 = _saturated(y0, LARGEST, kind), _saturated(y1, LARGEST, kind)
    q2, q3 = _saturated(y2, LARGEST, kind), _saturated(y3, LARGEST, kind)
    words = _as(q0, tl.uint8).to(tl.int32) | (_as(q1, tl.uint8).to(tl.int32) << 8)
    words |= (_as(q2, tl.uint8).to(tl.int32) << 16) | (_as(q3, tl.uint8).to(tl.int32) << 24)
    return q0, q1, q2, q3, words


@triton.jit
def _as(x, kind: tl.constexpr):
    return x.to(kind, bitcast=True)


@triton.jit
def _four(x, C, here):
    """Rows 0, 4, 8, ... of a tile, rows 1, 5, 9, ... and so on, in fp32. x: addresses of the first."""
    return (
        tl.load(x, mask=here, other=0.0).to(tl.float32),
        tl.load(x + C, mask=here, other=0.0).to(tl.float32),
        tl.load(x + 2 * C, mask=here, other=0.0).to(tl.float32),
        tl.load(x + 3 * C, mask=here, other=0.0).to(tl.float32),
    )


@triton.jit
def _larger(a, b):
    """The larger magnitude; NaN if one of both is."""
    return tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _normed(x, mean, rstd, w, b, row, n):
    """layernorm of rows x, as norm.py computes it: 0 where there is no row."""
    m, r = _of_row(mean, row, n), _of_row(rstd, row, n)
    return tl.where((row < n)[:, None], (x - m) * r * w + b, 0.0)


@triton.jit
def mixed(x, y, a, b):
    """a x + b y in fp32. The fused multiply-add is written out: who computes it once more has the same bits."""
    return tl.fma(x, a, y * b)


@triton.jit
def _of_row(x, row, n):
    """A number of each row, as a column."""
    return tl.load(x + row, mask=row < n, other=0.0)[:, None]


@triton.jit
def _quantise_kernel(
    value, transposed, scale, amax, x, pre, again, again_scale, part, mean, rstd, w, b, n, C,
    MEASURE: tl.constexpr, CURRENT: tl.constexpr, ACT: tl.constexpr, VALUE: tl.constexpr, TRANSPOSED: tl.constexpr,
    AGAIN: tl.constexpr, LARGEST: tl.constexpr, AGAIN_LARGEST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, OFFSET: tl.constexpr = 0.0, SUMS: tl.constexpr = False,
):  # fmt: skip
    """value (n, C) and transposed (C, n) = act(x (n, C)) / scale, rounded; amax, as an integer, takes |act(x)|.

    ACT: none, gelu, relu2, norm, rms, or slope, which multiplies by gelu'(pre); silu and gated gelu make (n, C) of
    x (n, 2 C). unit: rms without a weight, of x; mix: of w x + b pre, where w and b are one number each. SUMS: column
    sums of act(x) go to `part`, a row for each program_id(1). MEASURE: only amax. CURRENT: the
    scale is made of amax. AGAIN: again (C, n) = gelu(pre), rounded.
    """
    down, across = tl.arange(0, ROWS // 4), tl.arange(0, COLS)
    column, row = tl.program_id(0) * COLS, tl.program_id(1) * ROWS
    s = tl.load(scale)
    if CURRENT and not MEASURE:
        bound = tl.div_rn(tl.load(amax).to(tl.float32, bitcast=True), tl.full((), LARGEST, tl.float32))
        bits = (bound.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        s = tl.where(bound == 0.0, 1.0, bits.to(tl.float32, bitcast=True))
        s = tl.minimum(tl.maximum(s, 7.888609052210118e-31), 1.2676506002282294e30)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scale, s)
    here = (down < (n - row) // 4)[:, None] & (across < C - column)[None, :]
    there = (across < C - column)[:, None] & (down < (n - row) // 4)[None, :]
    at = row.to(tl.int64) * C + column + (down[:, None] * (4 * C) + across[None, :])
    to = (column.to(tl.int64) * n + row) // 4 + (across[:, None] * (n // 4) + down[None, :])
    if ACT == "silu" or ACT == "gated gelu":
        left = x + at + (row.to(tl.int64) * C + down[:, None] * (4 * C))
        y0, y1, y2, y3 = _four(left, 2 * C, here)
        u0, u1, u2, u3 = _four(left + C, 2 * C, here)
        G: tl.constexpr = ACT == "gated gelu"
        y0, y1 = y0 * gate_sigmoid(y0, G) * u0, y1 * gate_sigmoid(y1, G) * u1
        y2, y3 = y2 * gate_sigmoid(y2, G) * u2, y3 * gate_sigmoid(y3, G) * u3
    else:
        y0, y1, y2, y3 = _four(x + at, C, here)
    if ACT == "relu2":
        y0, y1, y2, y3 = tl.maximum(y0, 0.0), tl.maximum(y1, 0.0), tl.maximum(y2, 0.0), tl.maximum(y3, 0.0)
        y0, y1, y2, y3 = y0 * y0, y1 * y1, y2 * y2, y3 * y3
    if ACT == "gelu":
        y0, y1, y2, y3 = y0 * _sigmoid(y0), y1 * _sigmoid(y1), y2 * _sigmoid(y2), y3 * _sigmoid(y3)
    if ACT == "norm":
        wf = tl.load(w + column + across, mask=across < C - column, other=0.0).to(tl.float32)[None, :]
        bf = tl.load(b + column + across, mask=across < C - column, other=0.0).to(tl.float32)[None, :]
        first = row + 4 * down
        y0, y1 = _normed(y0, mean, rstd, wf, bf, first, n), _normed(y1, mean, rstd, wf, bf, first + 1, n)
        y2, y3 = _normed(y2, mean, rstd, wf, bf, first + 2, n), _normed(y3, mean, rstd, wf, bf, first + 3, n)
    if ACT == "rms":
        wf = tl.load(w + column + across, mask=across < C - column, other=0.0).to(tl.float32)[None, :]
        if OFFSET != 0.0:
            wf += OFFSET
        first = row + 4 * down
        y0, y1 = y0 * _of_row(rstd, first, n) * wf, y1 * _of_row(rstd, first + 1, n) * wf
        y2, y3 = y2 * _of_row(rstd, first + 2, n) * wf, y3 * _of_row(rstd, first + 3, n) * wf
    if ACT == "mix":
        fa, fb = tl.load(w).to(tl.float32), tl.load(b).to(tl.float32)
        p0, p1, p2, p3 = _four(pre + at, C, here)
        y0, y1, y2, y3 = mixed(y0, p0, fa, fb), mixed(y1, p1, fa, fb), mixed(y2, p2, fa, fb), mixed(y3, p3, fa, fb)
    if ACT == "mix" or ACT == "unit":
        first = row + 4 * down
        y0, y1 = y0 * _of_row(rstd, first, n), y1 * _of_row(rstd, first + 1, n)
        y2, y3 = y2 * _of_row(rstd, first + 2, n), y3 * _of_row(rstd, first + 3, n)
    if ACT == "slope":
        p0, p1, p2, p3 = _four(pre + at, C, here)
        g0, g1, g2, g3 = _sigmoid(p0), _sigmoid(p1), _sigmoid(p2), _sigmoid(p3)
        if AGAIN:
            r = _inverse(tl.load(again_scale))
            kind: tl.constexpr = again.dtype.element_ty
            q0, q1, q2, q3, words = _bytes(p0 * g0 * r, p1 * g1 * r, p2 * g2 * r, p3 * g3 * r, kind, AGAIN_LARGEST)
            tl.store(again.to(tl.pointer_type(tl.int32), bitcast=True) + to, tl.trans(words), mask=there)
        y0, y1, y2, y3 = y0 * _slope(p0, g0), y1 * _slope(p1, g1), y2 * _slope(p2, g2), y3 * _slope(p3, g3)
    if SUMS:
        sums = tl.sum((y0 + y1) + (y2 + y3), 0)
        tl.store(part + tl.program_id(1) * C + column + across, sums, mask=across < C - column)
    largest = _larger(_larger(y0, y1), _larger(y2, y3))
    if not MEASURE:
        r = _inverse(s)
        q0, q1, q2, q3, words = _bytes(y0 * r, y1 * r, y2 * r, y3 * r, value.dtype.element_ty, LARGEST)
        if VALUE:
            tl.store(value + at, q0, mask=here)
            tl.store(value + C + at, q1, mask=here)
            tl.store(value + 2 * C + at, q2, mask=here)
            tl.store(value + 3 * C + at, q3, mask=here)
        if TRANSPOSED:
            tl.store(transposed.to(tl.pointer_type(tl.int32), bitcast=True) + to, tl.trans(words), mask=there)
    found = tl.max(tl.ravel(largest.to(tl.int32, bitcast=True)), 0)
    if found > tl.load(amax):  # it only grows, so an old value costs an atomic, and no bit
        tl.atomic_max(amax, found)


def tile(act: str, transposed: bool) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    if act in ("norm", "rms", "unit", "mix"):
        return ROWS, COLS, 2 * WARPS  # its threads hold more
    return (ROWS, COLS, WARPS) if transposed or act == "slope" else WIDE


def programs(n: int, C: int, rows: int = ROWS, cols: int = COLS) -> tuple[int, int]:
    """The launch for a matrix (n, C)."""
    return triton.cdiv(C, cols), triton.cdiv(n, rows)


def write(
    out: Operand, x: Tensor, act: str = "", pre: Tensor | None = None, again: Operand | None = None,
    part: Tensor | None = None, norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, offset: float = 0.0,
) -> None:  # fmt: skip
    """out = act(x (n, C)), or x itself. act: "gelu", "relu2", "norm", or "slope", x * gelu'(pre (n, C)); then
    again.transposed = gelu(pre) too. part (programs, C) takes the column sums in fp32. norm: mean, rstd (n) in fp32,
    weight and bias (C) of a layernorm. "rms" reads of these rstd and the weight, to which offset is added; "unit" reads
    rstd alone; and "mix" reads rstd, and numbers a and b in place of weight and bias, for the norm of a x + b pre.
    "silu" and "gated gelu" make (n, C) of x (n, 2 C): the left half's act times the right half. n and C are multiples
    of 16."""
    assert x.is_contiguous(), "rows follow each other"
    assert out.amax is not None, "fp8 has slots"
    n, C = out.shape
    assert n % MULTIPLE == C % MULTIPLE == 0, f"a matrix ({n}, {C}) has odd rows or columns"
    other = again.transposed if again else None
    some = out.value if out.transposed is None else out.transposed
    rows, cols, warps = tile(act, out.transposed is not None)
    for measure in (True, False) if out.current else (False,):
        _quantise_kernel[programs(n, C, rows, cols)](
            some if out.value is None else out.value, some if out.transposed is None else out.transposed,
            out.scale, out.amax.view(int32), x, x if pre is None else pre,
            some if other is None else other, again.scale if again else out.scale,
            out.scale if part is None else part, *(norm or (out.scale, out.scale, x, x)), n, C,
            MEASURE=measure, CURRENT=out.current, ACT=act, VALUE=out.value is not None,
            TRANSPOSED=out.transposed is not None, AGAIN=other is not None, LARGEST=out.format.largest,
            AGAIN_LARGEST=again.format.largest if again else 0.0, ROWS=rows, COLS=cols, OFFSET=offset,
            SUMS=part is not None, num_warps=warps,
        )  # fmt: skip
