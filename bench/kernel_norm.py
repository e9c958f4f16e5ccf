"""Cases of the layernorm, RMSNorm, GELU and bias-gradient kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from timing import Case, launch, rand
from torch import Tensor

BF16, F32 = torch.bfloat16, torch.float32
GEMM = "includes torch's matrix product, which the 85 % rule does not cover"


def _forward(n: int, C: int) -> Case:
    def make() -> Callable[[], None]:
        x, w, b, out = rand(n, C), rand(C), rand(C), rand(n, C)
        return launch("layernorm_forward", "triton", out, rand(n, dtype=F32), rand(n, dtype=F32), x, w, b)

    return Case("layernorm_forward", "triton", 2 * n * C * 2 + 2 * n * 4 + 2 * C * 2, 0, make)


def _backward(n: int, C: int, *, accumulate_dx: bool, dbias: bool, again: bool, note: str) -> Case:
    """Without the sums over programs, which have a case of their own."""

    def make() -> Callable[[], None]:
        from daybreak.kernels.cuda.norm import backward_rows, backward_temps

        dx, dout, x = rand(n, C), rand(n, C), rand(n, C)
        mean, rstd = rand(n, dtype=F32, scale=0.01), torch.ones(n, dtype=F32, device=x.device)
        w, b = rand(C), rand(C)
        renewed: Tensor | None = rand(n, C) if again else None
        ((shape, dtype),) = backward_temps(dx, w, w, w if dbias else None, renewed, dout, accumulate_dx=accumulate_dx)
        part = torch.empty(shape, dtype=dtype, device=x.device)
        return lambda: backward_rows(dx, renewed, part, dout, x, mean, rstd, w, b, accumulate_dx=accumulate_dx)

    planes = 3 + accumulate_dx + again  # dout, x, dx
    vectors = 1 + again + 2 + dbias  # w and b; dw, db, dbias
    return Case("layernorm_backward", "triton", planes * n * C * 2 + 2 * n * 4 + vectors * C * 2, 0, make, note=note)


def _rms_forward(*shape: int, note: str = "", added: bool = False) -> Case:
    """Of whole rows (n, C), or of the heads of queries (n, heads, C) in a packed qkv. added: as in Gemma, with 1 + w,
    and to the residual stream."""
    size, C, rows = math.prod(shape), shape[-1], math.prod(shape[:-1])

    def make() -> Callable[[], None]:
        out, rstd, w = rand(*shape), rand(rows, dtype=F32), rand(C)
        how = {"offset": 1.0, "add": rand(*shape)} if added else {}
        return launch("rmsnorm_forward", "triton", out, rstd, _queries(*shape), w, eps=1e-5, **how)

    return Case("rmsnorm_forward", "triton", (2 + added) * size * 2 + rows * 4 + C * 2, 0, make, note=note)


def _rms_backward(*shape: int, again: bool = False, note: str = "") -> Case:
    """Rows add to dx, as on the residual stream; heads take the place of dout. With the sums over programs."""
    size, C, rows, heads = math.prod(shape), shape[-1], math.prod(shape[:-1]), len(shape) == 3

    def make() -> Callable[[], None]:
        dout = _queries(*shape)
        dx, dw, renewed = dout if heads else rand(*shape), rand(C), rand(*shape) if again else None
        rest = (dout, _queries(*shape), rand(rows, dtype=F32), rand(C))
        how = {"accumulate_dx": not heads, "accumulate": True}
        return launch("rmsnorm_backward", "triton", dx, dw, renewed, *rest, **how)

    planes = 3 + (not heads) + again
    return Case("rmsnorm_backward", "triton", planes * size * 2 + rows * 4 + 3 * C * 2, 0, make, note=note)


def _queries(n: int, *row: int) -> Tensor:
    """Rows (n, C), or heads (n, heads, C) between those of keys and values."""
    return rand(n, 3 * row[0], row[1])[:, : row[0]] if len(row) == 2 else rand(n, *row)


def _gelu(n: int, C: int) -> Case:
    """The kernel inside matmul_gelu_forward by itself: the operation has no name of its own."""

    def make() -> Callable[[], None]:
        from daybreak.kernels.cuda.gelu import gelu_forward

        out, x = rand(n, 4 * C), rand(n, 4 * C)
        return lambda: gelu_forward(out, x)

    return Case("matmul_gelu_forward", "triton", 2 * n * 4 * C * 2, 0, make, note="gelu alone")


def _matmul_gelu_forward(n: int, C: int) -> Case:
    def make() -> Callable[[], None]:
        out, pre = rand(n, 4 * C), rand(n, 4 * C)
        return launch("matmul_gelu_forward", "triton", out, pre, rand(n, C), rand(4 * C, C, scale=0.02), rand(4 * C))

    nbytes = 2 * (2 * n * 4 * C + n * C + 4 * C * C + 4 * C)
    return Case("matmul_gelu_forward", "triton", nbytes, 2 * n * C * 4 * C, make, GEMM)


def _matmul_gelu_backward(n: int, C: int) -> Case:
    def make() -> Callable[[], None]:
        dpre, pre, db = rand(n, 4 * C), rand(n, 4 * C), rand(4 * C)
        args = (dpre, None, db, rand(n, C), rand(C, 4 * C, scale=0.02), pre)
        return launch("matmul_gelu_backward", "triton", *args, accumulate=True)

    nbytes = 2 * (2 * n * 4 * C + n * C + 4 * C * C + 2 * 4 * C)
    return Case("matmul_gelu_backward", "triton", nbytes, 2 * n * C * 4 * C, make, GEMM)


def _gelu_slope(n: int, C: int) -> Case:
    """The kernel inside matmul_gelu_backward by itself: the operation has no name of its own."""

    def make() -> Callable[[], None]:
        from daybreak.kernels.cuda.gelu import multiply_by_slope

        grad, pre = rand(n, 4 * C), rand(n, 4 * C)
        return lambda: multiply_by_slope(grad, pre)

    return Case("matmul_gelu_backward", "triton", 3 * n * 4 * C * 2, 0, make, note="slope alone")


def _bias(n: int, O: int) -> Case:
    def make() -> Callable[[], None]:
        return launch("bias_backward", "triton", rand(O), rand(n, O), accumulate=True)

    return Case("bias_backward", "triton", n * O * 2 + 2 * O * 2, 0, make, note=f"O={O}")


def _sums(C: int) -> Case:
    """Second stage of layernorm_backward by itself."""

    def make() -> Callable[[], None]:
        from daybreak.kernels.cuda.bias import column_sums
        from daybreak.kernels.cuda.norm import backward_launch

        part = rand(3, backward_launch(torch.empty(1 << 14, C, dtype=BF16, device="meta"), True).programs, C, dtype=F32)
        outs = [rand(C) for _ in range(3)]
        return lambda: column_sums(outs, part, True)

    return Case("layernorm_backward", "triton", 3 * C * 4, 0, make, "second stage, under 10 us", "second stage")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Every launch that a step of this shape makes of these kernels."""
    n = B * T
    return [
        _forward(n, C),
        _backward(n, C, accumulate_dx=True, dbias=True, again=False, note="accumulate dx, dbias"),
        _backward(n, C, accumulate_dx=True, dbias=True, again=True, note="accumulate dx, dbias, again"),
        _backward(n, C, accumulate_dx=False, dbias=True, again=False, note="write dx, dbias"),
        _sums(C),
        _rms_forward(n, C),
        _rms_forward(n, C, note="added to the stream", added=True),
        _rms_forward(n, NH, C // NH, note="heads"),
        _rms_backward(n, C, note="accumulate dx"),
        _rms_backward(n, C, again=True, note="accumulate dx, again"),
        _rms_backward(n, NH, C // NH, note="heads, in place"),
        _gelu(n, C),
        _gelu_slope(n, C),
        _matmul_gelu_forward(n, C),
        _matmul_gelu_backward(n, C),
        _bias(n, 3 * C),
        _bias(n, 4 * C),
    ]
