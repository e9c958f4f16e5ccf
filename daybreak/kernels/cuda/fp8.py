"""Matmuls in fp8 on GPUs: cuBLASLt multiplies, and one Triton kernel makes all that they read. Formats: kernels/fp8.py.

The fp8 matmuls of these GPUs sum over neighbours in memory. So each matrix is written twice, as it is and transposed.
One kernel does both in a pass over memory, and takes the largest magnitude meanwhile:

    bf16 (n, C)           a program's tile, 128 rows by 64 columns        fp8 (n, C) and (C, n)

    | . . . . . . |        | x = tile in fp32             |               | . q . . . . |
    | . t . . . . |  --->  | amax = max(amax, |x|)        |  --------->   | . . . . . . |     | . . |
    | . . . . . . |        | q = x / scale, rounded       |         |                       | q^T . |
                                                                    '---------------------> | . . |

The tile may go through GELU first, or be multiplied by its derivative, whose column sums are a bias gradient.

The largest magnitude is found with atomics on its bits as an integer. A maximum is the same in any order, so they keep
every bit; and NaN and infinity are larger than all numbers.

Forward and input gradients use the fast accumulation of Hopper's tensor cores, which keeps 14 bits while it adds up.
Weight gradients sum over all rows of a micro-step, so they use the slow one, which adds up in fp32 every 128 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import OPS, Scratch, Temps, backend
from daybreak.kernels.cuda import INTERPRET, bias, cublaslt, glu, missing_backends, norm, tl, triton
from daybreak.kernels.cuda.gelu import sigmoid_2u
from daybreak.kernels.fp8 import READS
from daybreak.kernels.operand import Matrix, Operand

NAME = "fp8 cuda"
COMPILED = tl.constexpr(not INTERPRET)
ROWS, COLS, WARPS = 128, 64, 8  # of a tile: 64 bytes of a row of the result, 128 of a column
TILES = 4  # that a program takes, below each other
assert all((glu, norm)), "their kernels are registered before they are made for fp8"


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
def _rounded(x, scale, LARGEST: tl.constexpr, kind: tl.constexpr):
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
            q = _rounded(y, s, LARGEST, value.dtype.element_ty)
            if VALUE:
                tl.store(value + at + inner, q, mask=here)
            if TRANSPOSED:
                tl.store(transposed + to + turned, tl.trans(q), mask=there)
            if AGAIN:
                r = _rounded(p * g, tl.load(again_scale), AGAIN_LARGEST, again.dtype.element_ty)
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
            out.scale, out.amax.view(torch.int32), x, x if pre is None else pre,
            some if other is None else other, again.scale if again else out.scale,
            out.scale if part is None else part, *x.shape,
            MEASURE=measure, CURRENT=out.current, ACT=act, VALUE=out.value is not None,
            TRANSPOSED=out.transposed is not None, AGAIN=other is not None, LARGEST=out.format.largest,
            AGAIN_LARGEST=again.format.largest if again else 0.0, ROWS=ROWS, COLS=COLS, TILES=TILES, num_warps=WARPS,
        )  # fmt: skip


def usable(capability: tuple[int, int]) -> str | None:
    """What training in fp8 lacks on a GPU of this compute capability, or None."""
    if capability < (8, 9):
        return f"a GPU of compute capability 8.9 or higher, not {capability[0]}.{capability[1]}"
    return "Triton, which is not installed" if "triton" in missing_backends() else None


@backend(NAME)
def quantise(out: Operand, x: Tensor) -> None:
    """out = x (n, C), rounded to out's format."""
    write(out, x)


# ------------------------------------------------------------------------------------------------ matmuls


def _product(
    d: Tensor, a: Tensor | None, b: Tensor | None, of: tuple[Operand, Operand], scratch: Scratch, **more: Any
) -> bool:
    """d (n, m) = b (n, k) a (m, k)^T, parts of two operands. False: the library cannot do it."""
    assert a is not None, "an operand's part was made for who reads it"
    assert b is not None, "an operand's part was made for who reads it"
    kind = "bias" if more.get("bias") is not None else "plain"
    return cublaslt.gemm("tn", kind, d, a, b, scratch, scales=(of[0].scale, of[1].scale), **more)


def _must(done: bool, d: Tensor, a: Operand, b: Operand) -> None:
    if not done:
        shapes = f"{tuple(d.shape)} of {a.format.dtype} and {b.format.dtype} matrices {a.shape} and {b.shape}"
        raise RuntimeError(f"cuBLASLt has no fp8 matmul {shapes}; use precision.compute bf16")


@backend(NAME, temps=cublaslt.workspace, parts=READS["matmul_forward"])
def matmul_forward(
    out: Tensor, x: Operand, w: Operand, b: Tensor | None = None, add: Tensor | None = None, *, scratch: Scratch
) -> None:
    """out (n, O) = x (n, I) @ w (O, I)^T + b (O) + add (n, O), rounded once if the library adds in its epilogue."""
    if add is not None and _product(out, w.value, x.value, (w, x), scratch, bias=b, c=add):
        return
    _must(_product(out, w.value, x.value, (w, x), scratch, bias=b), out, w, x)
    if add is not None and not out.is_meta:
        out.add_(add)


@backend(NAME, temps=cublaslt.workspace, parts=READS["matmul_forward"])
def matmul_gelu_forward(out: Matrix, pre: Tensor, x: Operand, w: Operand, b: Tensor, *, scratch: Scratch) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T + b (O); out (n, O) = gelu(pre), from pre after its rounding."""
    _must(_product(pre, w.value, x.value, (w, x), scratch, bias=b), pre, w, x)
    assert isinstance(out, Operand), "the linear layers before and after GELU are in fp8 together"
    write(out, pre, "gelu")


@backend(NAME, temps=cublaslt.workspace, parts=READS["matmul_backward_input"])
def matmul_backward_input(dx: Tensor, dout: Operand, w: Operand, *, scratch: Scratch) -> None:
    """dx (n, I) = dout (n, O) @ w (O, I)."""
    _must(_product(dx, w.transposed, dout.value, (w, dout), scratch), dx, w, dout)


def gelu_temps(dpre: Operand, gelu: Operand | None, db: Tensor | None, *_: object, **__: object) -> Temps:
    """cuBLASLt's workspace, the gradient of GELU's output, and partial sums of the bias gradient."""
    n, I = dpre.shape
    return [*cublaslt.workspace(), ((n, I), torch.bfloat16), ((1, triton.cdiv(n, ROWS * TILES), I), torch.float32)]


@backend(NAME, temps=gelu_temps, parts=READS["matmul_gelu_backward"])
def matmul_gelu_backward(
    dpre: Operand, gelu: Operand | None, db: Tensor | None, dout: Operand, w: Operand, pre: Tensor,
    *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """dpre (n, I) = (dout (n, O) @ w (O, I)) * gelu'(pre (n, I)), and db (I) = its column sums before rounding. If gelu
    (n, I) is given, its transposed copy becomes gelu(pre), in the scale that forward used."""
    _, grad, part = scratch(gelu_temps(dpre, gelu, db))
    _must(_product(grad, w.transposed, dout.value, (w, dout), scratch), grad, w, dout)
    write(dpre, grad, "slope", pre, gelu, part[0])
    bias.column_sums([db], part, accumulate)


@backend(NAME, temps=cublaslt.workspace, parts=READS["matmul_backward_weight"])
def matmul_backward_weight(dw: Tensor, dout: Operand, x: Operand, *, accumulate: bool, scratch: Scratch) -> None:
    """dw (O, I) = dout (n, O)^T @ x (n, I), added to dw in fp32 if `accumulate`, rounded once."""
    add = dw if accumulate else None
    _must(_product(dw, x.transposed, dout.transposed, (x, dout), scratch, c=add, slow=True), dw, x, dout)


# ------------------------------------------------------------------------------------------------ other kernels


def _in_two(name: str) -> tuple[Callable[..., None], Callable[..., Temps]]:
    """An operation that writes an Operand: Triton's writes bf16 into scratch, which is then rounded."""
    plain, names, writes = OPS[name].impls["triton"], OPS[name].parameters, OPS[name].writes

    def whole(args: Any, made: Callable[[Operand], Tensor]) -> tuple[list[Any], list[tuple[Operand, Tensor]]]:
        """The arguments with a tensor in place of each Operand, and both of those."""
        pairs = {k: (x, made(x)) for k, x in zip(names, args, strict=False) if isinstance(x, Operand)}
        assert set(pairs) <= set(writes), f"{name} reads no fp8"
        return [pairs[k][1] if k in pairs else x for k, x in zip(names, args, strict=False)], list(pairs.values())

    def temps(*args: Any, **kwargs: Any) -> Temps:
        given, pairs = whole(args, lambda x: torch.empty(x.shape, dtype=torch.bfloat16, device="meta"))
        rest = plain.temps(*given, **kwargs) if plain.temps else ()
        return [*((x.shape, torch.bfloat16) for x, _ in pairs), *rest]

    def run(*args: Any, scratch: Scratch, **kwargs: Any) -> None:
        pieces = iter(scratch(temps(*args, **kwargs)))
        given, pairs = whole(args, lambda _: next(pieces))
        rest = list(pieces)
        plain.fn(*given, **kwargs, **({"scratch": lambda _: rest} if plain.temps else {}))
        for out, x in pairs:
            write(out, x)

    run.__name__ = name
    return run, temps


for _name in (name for name, reads in READS.items() if not reads):
    _fn, _temps = _in_two(_name)
    backend(NAME, temps=_temps)(_fn)
