"""Training in fp8 on GPUs: cuBLASLt multiplies, and one Triton kernel (rounding.py) makes all that it reads.

Forward and input gradients use the fast accumulation of Hopper's tensor cores, which keeps 14 bits while it adds up.
Weight gradients sum over all rows of a micro-step, so they use the slow one, which adds up in fp32 every 128 rows.

Kernels write matrices in fp8 at once, rounded from fp32. The one that rounds also computes activations and gates, and
a norm's transposed copy, from its input. The norm's own kernel writes rows, as its scale is a bound: it needs no
magnitude.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import bias, cublaslt, glu, mix, norm, relu
from daybreak.kernels.cuda.rounding import programs, tile, write
from daybreak.kernels.fp8 import READS
from daybreak.kernels.operand import Matrix, Operand

NAME = "fp8 cuda"


def usable(capability: tuple[int, int], missing: Collection[str]) -> str | None:
    """Why training in fp8 cannot run on a GPU of this compute capability without the `missing` backends, or None."""
    if capability < (8, 9):
        return f"a GPU of compute capability 8.9 or higher, not {capability[0]}.{capability[1]}"
    return "Triton, which is missing or lacks a C compiler" if "triton" in missing else None


def sums_temps(out: Operand, x: Tensor, db: Tensor | None = None, **_: object) -> Temps:
    """Partial column sums, a row for each program of the kernel that rounds."""
    n, C = x.shape
    return [] if db is None else [((1, programs(n, C, *tile("", out.transposed is not None)[:2])[1], C), torch.float32)]


@backend(NAME, temps=sums_temps)
def quantise(out: Operand, x: Tensor, db: Tensor | None = None, *, accumulate: bool = False, scratch: Scratch) -> None:
    """out = x (n, C), rounded to out's format; db (C), if given, = x's column sums, added to db if `accumulate`."""
    if db is None:
        write(out, x)
        return
    (part,) = scratch(sums_temps(out, x, db))
    write(out, x, part=part[0])
    bias.column_sums([db], part, accumulate)


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
    if not pre.is_meta:  # which is for `cublaslt.listed`
        write(out, pre, "gelu")


@backend(NAME, temps=cublaslt.workspace, parts=READS["matmul_backward_input"])
def matmul_backward_input(dx: Tensor, dout: Operand, w: Operand, *, scratch: Scratch) -> None:
    """dx (n, I) = dout (n, O) @ w (O, I)."""
    _must(_product(dx, w.transposed, dout.value, (w, dout), scratch), dx, w, dout)


def gelu_temps(dpre: Operand, gelu: Operand | None, db: Tensor | None, *_: object, **__: object) -> Temps:
    """cuBLASLt's workspace, the gradient of GELU's output, and partial sums of the bias gradient."""
    n, I = dpre.shape
    return [*cublaslt.workspace(), ((n, I), torch.bfloat16), ((1, programs(n, I)[1], I), torch.float32)]


@backend(NAME, temps=gelu_temps, parts=READS["matmul_gelu_backward"])
def matmul_gelu_backward(
    dpre: Operand, gelu: Operand | None, db: Tensor | None, dout: Operand, w: Operand, pre: Tensor,
    *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """dpre (n, I) = (dout (n, O) @ w (O, I)) * gelu'(pre (n, I)), and db (I) = its column sums before rounding. If gelu
    (n, I) is given, its transposed copy becomes gelu(pre), in the scale that forward used."""
    _, grad, part = scratch(gelu_temps(dpre, gelu, db))
    _must(_product(grad, w.transposed, dout.value, (w, dout), scratch), grad, w, dout)
    if pre.is_meta:
        return
    write(dpre, grad, "slope", pre, gelu, part[0])
    bias.column_sums([db], part, accumulate)


@backend(NAME, temps=cublaslt.workspace, parts=READS["matmul_backward_weight"])
def matmul_backward_weight(dw: Tensor, dout: Operand, x: Operand, *, accumulate: bool, scratch: Scratch) -> None:
    """dw (O, I) = dout (n, O)^T @ x (n, I), added to dw in fp32 if `accumulate`, rounded once."""
    add = dw if accumulate else None
    _must(_product(dw, x.transposed, dout.transposed, (x, dout), scratch, c=add, slow=True), dw, x, dout)


# ------------------------------------------------------------------------------------------------ other kernels
# The parts that forward writes, and those that backward writes once more (`again`, `rewrite`): only transposed copies,
# as in READS.


@backend(NAME)
def layernorm_forward(out: Operand, mean: Tensor, rstd: Tensor, x: Tensor, w: Tensor, b: Tensor) -> None:
    """out (n, C) = layernorm(x (n, C)) * w (C) + b (C); mean, rstd (n) in fp32 are kept for backward."""
    assert out.value is not None, "forward reads it"
    assert not out.current, "rows are rounded before their largest magnitude is known"
    norm.forward_rows(out.value, mean, rstd, x, w, b, out.scale)
    if out.transposed is not None:
        write(replace(out, value=None), x, "norm", norm=(mean, rstd, w, b))


def norm_backward_temps(
    dx: Tensor, dw: Tensor | None, db: Tensor | None, dbias: Tensor | None, again: Operand, *args: Tensor, **how: Any
) -> Temps:  # fmt: skip
    return norm.backward_temps(dx, dw, db, dbias, None, *args, **how)


@backend(NAME, temps=norm_backward_temps)
def layernorm_backward(
    dx: Tensor, dw: Tensor | None, db: Tensor | None, dbias: Tensor | None, again: Operand, dout: Tensor, x: Tensor,
    mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor, *, scratch: Scratch, **how: Any,
) -> None:  # fmt: skip
    """dx (n, C), dw, db, dbias (C) and again (n, C) from dout (n, C): see the reference. dx may be dout."""
    write(again, x, "norm", norm=(mean, rstd, w, b))
    norm.layernorm_backward(dx, dw, db, dbias, None, dout, x, mean, rstd, w, b, scratch=scratch, **how)


@backend(NAME)
def rmsnorm_forward(out: Operand, rstd: Tensor, x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> None:
    """out (n, C) = x / sqrt(mean(x^2) + eps) * (offset + weight (C)); rstd (n) in fp32 is kept for backward."""
    assert out.value is not None, "forward reads it"
    assert not out.current, "rows are rounded before their largest magnitude is known"
    norm.rms_rows(out.value, rstd, x, weight, eps=eps, offset=offset, scale=out.scale)
    if out.transposed is not None:
        write(replace(out, value=None), x, "rms", norm=(rstd, rstd, weight, weight), offset=offset)


def rms_backward_temps(dx: Tensor, dweight: Tensor | None, rewrite: Operand, *args: Tensor, **how: Any) -> Temps:
    return norm.rms_backward_temps(dx, dweight, None, *args, **how)


@backend(NAME, temps=rms_backward_temps)
def rmsnorm_backward(
    dx: Tensor, dweight: Tensor | None, rewrite: Operand, dout: Tensor, x: Tensor, rstd: Tensor, weight: Tensor,
    *, offset: float = 0.0, scratch: Scratch, **how: Any,
) -> None:  # fmt: skip
    """dx (n, C), dweight (C) and rewrite (n, C) from dout (n, C): see the reference. dx may be dout."""
    write(rewrite, x, "rms", norm=(rstd, rstd, weight, weight), offset=offset)
    norm.rmsnorm_backward(dx, dweight, None, dout, x, rstd, weight, offset=offset, scratch=scratch, **how)


@backend(NAME)
def mix_norm_forward(
    res: Tensor | None, out: Operand, rstd: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, eps: float
) -> None:
    """out (n, C) = the norm of a x + b y (n, C), or of res (n, C), to which that is added; rstd (n) in fp32 is kept."""
    assert out.value is not None, "forward reads it"
    assert not out.current, "rows are rounded before their largest magnitude is known"
    mix.mixed_rows(res, out.value, rstd, x, y, a, b, eps=eps, scale=out.scale)
    if out.transposed is not None and res is not None:
        write(replace(out, value=None), res, "unit", norm=(rstd, rstd, x, x))
    elif out.transposed is not None:
        write(replace(out, value=None), x, "mix", y, norm=(rstd, rstd, a, b))


def mix_backward_temps(
    dx: Tensor, dy: Tensor, da: Tensor | None, db: Tensor | None, rewrite: Operand, *args: Tensor, **how: Any
) -> Temps:
    return mix.mix_norm_backward_temps(dx, dy, da, db, None, *args, **how)


@backend(NAME, temps=mix_backward_temps)
def mix_norm_backward(
    dx: Tensor, dy: Tensor, da: Tensor | None, db: Tensor | None, rewrite: Operand,
    d: Tensor, dout: Tensor, x: Tensor, y: Tensor, rstd: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None,
    *, scratch: Scratch, **how: Any,
) -> None:  # fmt: skip
    """dx, dy (n, C), da, db (1) and rewrite (n, C): see the reference. dx may be d."""
    write(rewrite, x, "mix", y, norm=(rstd, rstd, a, b))
    mix.mix_norm_backward(dx, dy, da, db, None, d, dout, x, y, rstd, a, b, add, scratch=scratch, **how)


@backend(NAME)
def relu2_forward(out: Operand, x: Tensor) -> None:
    """out (n, F) = max(x (n, F), 0)^2, rounded once."""
    write(out, x, "relu2")


@backend(NAME)
def relu2_backward(dx: Tensor, rewrite: Operand, x: Tensor) -> None:
    """dx (n, F) *= 2 max(x, 0); rewrite (n, F) = the output once more."""
    write(rewrite, x, "relu2")
    relu.relu2_backward(dx, None, x)


def _gate(gelu: bool) -> str:
    return "gated gelu" if gelu else "silu"


@backend(NAME)
def swiglu_forward(out: Operand, gateup: Tensor, *, gelu: bool = False) -> None:
    """out (n, F) = silu(gateup[:, :F]) * gateup[:, F:], rounded once. gelu: not silu."""
    write(out, gateup, _gate(gelu))


@backend(NAME)
def swiglu_backward(d_gateup: Tensor, rewrite: Operand, d_out: Tensor, gateup: Tensor, *, gelu: bool = False) -> None:
    """d_gateup (n, 2F), which may be gateup, from d_out (n, F); rewrite (n, F) = forward's output once more."""
    write(rewrite, gateup, _gate(gelu))
    glu.swiglu_backward(d_gateup, None, d_out, gateup, gelu=gelu)
