"""Cases of the kernel that rounds to fp8, as it is and transposed: alone, after GELU, a norm or a gate, and times
GELU's derivative; and of layernorm's, which writes fp8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DEVICE, Case, rand

from daybreak.kernels.cuda import norm
from daybreak.kernels.cuda.fp8 import NAME
from daybreak.kernels.cuda.rounding import programs, write
from daybreak.kernels.fp8 import E4M3, E5M2
from daybreak.kernels.operand import Format, Operand


def _operand(format: Format, n: int, C: int, *, value: bool = True, transposed: bool = True) -> Operand:
    parts = [torch.empty(shape, dtype=format.dtype, device=DEVICE) for shape in ((n, C), (C, n))]
    slots = torch.tensor([2.0**-6, 0.0], device=DEVICE)
    return Operand(format, parts[0] if value else None, slots[0], parts[1] if transposed else None, slots[1])


def _case(n: int, C: int, act: str, *, value: bool = True, transposed: bool = True) -> Case:
    """Bytes: bf16 in, two halves for a gate, and out in fp8 each part; a slope reads another matrix and makes GELU's
    transposed copy."""

    halves = 2 if act == "silu" else 1

    def make() -> Callable[[], None]:
        format = E5M2 if act == "slope" else E4M3
        x, out = rand(n, C * halves), _operand(format, n, C, value=value, transposed=transposed)
        if act in ("norm", "rms"):
            layer = torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE), rand(C), rand(C)
            return lambda: write(out, x, act, norm=layer)
        if act != "slope":
            return lambda: write(out, x, act)
        pre, again = rand(n, C), _operand(E4M3, n, C, value=False)
        part = torch.empty(programs(n, C)[1], C, device=DEVICE)
        return lambda: write(out, x, act, pre, again, part)

    nbytes = n * C * (2 * halves + value + transposed + 3 * (act == "slope"))
    note = ", ".join([f"C {C}", *([act] if act else []), *([] if value else ["transposed only"])])
    return Case("quantise", NAME, nbytes, 0, make, note=note + ("" if transposed else ", value only"))


def _norm_forward(n: int, C: int) -> Case:
    def make() -> Callable[[], None]:
        x, out, w, b = rand(n, C), _operand(E4M3, n, C, transposed=False), rand(C), rand(C)
        mean, rstd = (torch.empty(n, device=DEVICE) for _ in range(2))
        assert out.value is not None, "it was asked for"
        value = out.value
        return lambda: norm.forward_rows(value, mean, rstd, x, w, b, out.scale)

    return Case("layernorm_forward", NAME, n * C * 3 + n * 8, 0, make, note=f"C {C}, value only")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """The matrices of one block, and a weight."""
    n = B * T
    one = [_case(n, C, ""), _case(n, 3 * C, ""), _case(n, C, "", value=False), _case(n, C, "", transposed=False)]
    return [*one, _case(n, 4 * C, "gelu"), _case(n, 4 * C, "gelu", transposed=False), _case(n, 4 * C, "slope"),
            _case(n, C, "norm", value=False), _norm_forward(n, C), _case(4 * C, C, ""), _case(n, C, "rms", value=False),
            _case(n, 4 * C, "silu"), _case(n, 4 * C, "silu", transposed=False)]  # fmt: skip
