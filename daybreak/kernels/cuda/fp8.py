"""Training in fp8 on GPUs: cuBLASLt multiplies, and one Triton kernel (rounding.py) makes all that it reads.

Forward and input gradients use the fast accumulation of Hopper's tensor cores, which keeps 14 bits while it adds up.
Weight gradients sum over all rows of a micro-step, so they use the slow one, which adds up in fp32 every 128 rows.

A kernel that makes a matrix writes it in bf16, which is then rounded, but for layernorm. Its scale is a bound that
needs no magnitude. So where nobody wants its transposed copy, it writes fp8 at once. And where backward needs nothing
but that copy, the kernel that rounds makes it of layernorm's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import OPS, Scratch, Temps, backend
from daybreak.kernels.cuda import bias, cublaslt, glu, missing_backends, norm, relu
from daybreak.kernels.cuda.rounding import programs, write
from daybreak.kernels.fp8 import READS
from daybreak.kernels.operand import Matrix, Operand

NAME = "fp8 cuda"
assert all((glu, norm, relu)), "their kernels are registered before they are made for fp8"


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
_two, _two_back = (OPS[name].impls[NAME] for name in ("layernorm_forward", "layernorm_backward"))


def norm_temps(out: Operand, *args: Tensor) -> Temps:
    return () if out.transposed is None or _two.temps is None else _two.temps(out, *args)


@backend(NAME, temps=norm_temps)
def layernorm_forward(
    out: Operand, mean: Tensor, rstd: Tensor, x: Tensor, w: Tensor, b: Tensor, *, scratch: Scratch
) -> None:
    """out (n, C) = layernorm(x (n, C)) * w (C) + b (C); mean, rstd (n) in fp32 are kept for backward."""
    if out.transposed is None and out.value is not None:
        norm.forward_rows(out.value, mean, rstd, x, w, b, out.scale)
    else:
        _two.fn(out, mean, rstd, x, w, b, scratch=scratch)


def norm_backward_temps(
    dx: Tensor, dw: Tensor | None, db: Tensor | None, dbias: Tensor | None, again: Operand, *args: Tensor, **how: Any
) -> Temps:  # fmt: skip
    if again.value is None:
        return norm.backward_temps(dx, dw, db, dbias, None, *args, **how)
    assert _two_back.temps is not None, "see _in_two"
    return _two_back.temps(dx, dw, db, dbias, again, *args, **how)


@backend(NAME, temps=norm_backward_temps)
def layernorm_backward(
    dx: Tensor, dw: Tensor | None, db: Tensor | None, dbias: Tensor | None, again: Operand, dout: Tensor, x: Tensor,
    mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor, *, scratch: Scratch, **how: Any,
) -> None:  # fmt: skip
    """dx (n, C), dw, db, dbias (C) and again (n, C) from dout (n, C): see the reference. dx may be dout."""
    args = dout, x, mean, rstd, w, b
    if again.value is None:
        write(again, x, "norm", norm=(mean, rstd, w, b))
        norm.layernorm_backward(dx, dw, db, dbias, None, *args, scratch=scratch, **how)
    else:
        _two_back.fn(dx, dw, db, dbias, again, *args, scratch=scratch, **how)
