"""Matmuls in fp8, in plain torch: what the kernels of kernels/cuda/fp8.py compute, and how a CPU runs the schedule.

A matrix in fp8 is value * scale. A value has 8 bits, in one of two formats (Micikevicius et al. 2022, FP8 formats for
deep learning). A scale is one power of two for the whole matrix, so that dividing and multiplying by it is exact.

              bits: sign, exponent, fraction   largest   smallest, subnormal   holds
    e4m3      1, 4, 3                              448                  2^-9   weights, activations
    e5m2      1, 5, 2                           57,344                 2^-16   gradients of activations

Rounding is to the nearest value, and to an even fraction between two. A larger value becomes the largest one of its
format (it saturates). NaN stays NaN. Each quantise also takes the largest magnitude before rounding into the slot
`amax` of its matrix. Scales of later steps come from it (engine/scales.py).

Every kernel here widens its inputs to fp32, calls the reference of its operation, and rounds the outputs once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import OPS, Scratch, Temps, backend, glu, matmul, mix, norm, relu
from daybreak.kernels.operand import Format, Operand

F32 = torch.float32
E4M3 = Format("fp8", torch.float8_e4m3fn, slots=True)
E5M2 = Format("fp8", torch.float8_e5m2, slots=True)
SMALLEST, LARGEST = 2.0**-100, 2.0**100  # of scales: their inverses are normal numbers of fp32
V, T = ("value", "scale"), ("transposed", "scale")
# The parts that each operation reads of its inputs (the table in operand.py). Outputs are written as a whole.
READS: dict[str, dict[str, tuple[str, ...]]] = {
    "layernorm_forward": {}, "layernorm_backward": {}, "rmsnorm_forward": {}, "rmsnorm_backward": {},
    "swiglu_forward": {}, "swiglu_backward": {}, "relu2_forward": {}, "relu2_backward": {},
    "mix_norm_forward": {}, "mix_norm_backward": {},
    "matmul_forward": {"x": V, "w": V},
    "matmul_backward_input": {"dout": V, "w": T}, "matmul_gelu_backward": {"dout": V, "w": T},
    "matmul_backward_weight": {"dout": T, "x": T},
}  # fmt: skip
STORED = ("res",)  # outputs that their operation reads once more: it does so as they are stored
assert all((norm, glu, matmul, mix, relu)), "the operations are registered before their kernels in fp8"


def power_of_two(x: Tensor) -> Tensor:
    """x (fp32, not negative) becomes the smallest power of two that is not below it, in place; 0 becomes 1."""
    bits = x.view(torch.int32)
    bits.add_(0x7FFFFF).bitwise_and_(0x7F800000)  # rounds the exponent up, if a bit of the fraction is set
    return x.masked_fill_(x == 0.0, 1.0).clamp_(SMALLEST, LARGEST)


def quantise_temps(_: object, x: Tensor, db: Tensor | None = None, **__: object) -> Temps:
    return [(tuple(x.shape), F32), ((), F32), *(() if db is None else matmul.bias_temps(db, x))]


@backend("fp8", temps=quantise_temps)
def quantise(
    out: Operand, x: Tensor, db: Tensor | None = None,
    *, accumulate: bool = False, scratch: Callable[[Temps], list[Tensor]],
) -> None:  # fmt: skip
    """out = x (n, C), rounded to out's format; out.amax takes x's largest magnitude, if it is larger. db (C), if given,
    = x's column sums before rounding, added to db if `accumulate`: the gradient of a bias.

    If out is `current`, this sets its scale too, so that nothing saturates. Else the scale was chosen before."""
    wide, largest, *sums = scratch(quantise_temps(out, x, db))
    if db is not None:
        matmul.bias_backward(db, x, accumulate=accumulate, scratch=lambda _: sums)
    torch.amax(torch.abs(wide.copy_(x), out=wide), (0, 1), out=largest)
    assert out.amax is not None
    torch.maximum(out.amax, largest, out=out.amax)  # NaN, if one of both is
    if out.current:
        power_of_two(torch.div(largest, out.format.largest, out=out.scale))
    wide.copy_(x).div_(out.scale).clamp_(-out.format.largest, out.format.largest)
    if out.value is not None:
        out.value.copy_(wide)
    if out.transposed is not None:
        out.transposed.copy_(wide.t())


def _made(name: str, reads: Mapping[str, tuple[str, ...]]) -> tuple[Callable[..., None], Callable[..., Temps]]:
    """An operation for Operands, from its reference: the function and its scratch."""
    plain, names, writes = OPS[name].impls["torch"], OPS[name].parameters, OPS[name].writes

    def narrow(args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by name that are not in fp32 but Operands, or in bf16."""
        given = dict(zip(names, args, strict=False)) | kwargs
        return {k: x for k, x in given.items() if isinstance(x, Operand) or (_is_bf16(x) and k not in STORED)}

    def swapped(wide: Mapping[str, Tensor], args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, some of them replaced."""
        return [wide.get(k, x) for k, x in zip(names, args, strict=False)], {
            k: wide.get(k, x) for k, x in kwargs.items()
        }

    def temps(*args: Any, **kwargs: Any) -> Temps:
        found = narrow(args, kwargs)
        wide = {k: torch.empty(tuple(x.shape), dtype=F32, device="meta") for k, x in found.items()}
        rounding = [t for k, x in found.items() if rounded(k, x) for t in quantise_temps(x, wide[k])]
        given, named = swapped(wide, args, kwargs)
        own = [(tuple(x.shape), F32) for x in wide.values()]
        return [*own, *rounding, *(plain.temps(*given, **named) if plain.temps else ())]

    def rounded(name: str, x: object) -> bool:
        return name in writes and isinstance(x, Operand)

    def run(*args: Any, scratch: Scratch, **kwargs: Any) -> None:
        found, pieces = narrow(args, kwargs), iter(scratch(temps(*args, **kwargs)))
        wide = {k: next(pieces) for k in found}
        rounding = {k: [next(pieces), next(pieces)] for k, x in found.items() if rounded(k, x)}
        for k, x in found.items():
            if not isinstance(x, Operand):
                wide[k].copy_(x)
            elif k not in writes:
                part = x.value if "value" in reads[k] else x.transposed
                assert part is not None, f"{name} reads a part of {k} that nobody made"
                wide[k].copy_(part if "value" in reads[k] else part.t()).mul_(x.scale)
        rest = list(pieces)
        given, named = swapped(wide, args, kwargs)
        plain.fn(*given, **named, **({"scratch": lambda _: rest} if plain.temps else {}))
        for k, x in found.items():
            if k in rounding:
                quantise(x, wide[k], scratch=lambda _, k=k: rounding[k])
            elif k in writes:
                x.copy_(wide[k])

    run.__name__ = name
    return run, temps


def _is_bf16(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bfloat16


for _name, _reads in READS.items():
    _fn, _temps = _made(_name, _reads)
    backend("fp8", temps=_temps, parts=_reads)(_fn)
_product = OPS["matmul_forward"].impls["fp8"]


def gelu_temps(out: Tensor | Operand, pre: Tensor, x: Operand, w: Operand, b: Tensor) -> Temps:
    assert _product.temps is not None, "see _made"
    return [*quantise_temps(out, pre), (tuple(pre.shape), F32), *_product.temps(pre, x, w, b)]


@backend("fp8", temps=gelu_temps, parts=READS["matmul_forward"])
def matmul_gelu_forward(
    out: Tensor | Operand, pre: Tensor, x: Operand, w: Operand, b: Tensor, *, scratch: Scratch
) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T + b (O); out (n, O) = gelu(pre), from pre after its rounding. So backward,
    which may have to make out's transposed copy of pre, makes the same one."""
    wide, largest, gelu, *rest = scratch(gelu_temps(out, pre, x, w, b))
    _product.fn(pre, x, w, b, scratch=lambda _: rest)
    torch.ops.aten.gelu.out(wide.copy_(pre), approximate="tanh", out=gelu)
    if isinstance(out, Operand):
        quantise(out, gelu, scratch=lambda _: [wide, largest])
    else:
        out.copy_(gelu)
