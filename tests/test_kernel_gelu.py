"""GELU and its derivative (behind a matrix product), against formulas in fp64."""

from __future__ import annotations

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import DEVICE, close, draw, each_backend, each_dtype, f64, poison, run, skip_unless_served
from oracle import gelu

from daybreak.kernels.cuda import gelu as kernels

each_shape = pytest.mark.parametrize(("rows", "columns"), [(1, 63), (3, 1000), (5, 1024), (41, 127)])
BF16 = torch.bfloat16
ENDS = (0.0, -60.0, 60.0, -1e-3, -5.0, 5.0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@each_shape
def test_gelu(dtype, rows, columns):
    x = draw(rows, columns, dtype=dtype, scale=3)
    x[0, : len(ENDS)] = torch.tensor(ENDS)
    out = poison(rows, columns, dtype=dtype)
    kernels.gelu_forward(out, x)
    close(out, gelu(f64(x)))


def test_small_values_keep_their_relative_accuracy():
    """The Triton form does not cancel: gelu(-4.5) is right to bf16's rounding, and both ends are exact."""
    x = torch.tensor([-4.5, -4.0, -3.0, -1e-3, 60.0, -60.0, 3e4, -3e4], dtype=BF16, device=DEVICE)
    out = poison(8, dtype=BF16)
    kernels.gelu_forward(out, x)
    torch.testing.assert_close(f64(out), gelu(f64(x)), rtol=2.0**-8, atol=0)


@each_backend
@each_dtype
def test_product_then_gelu(backend, dtype):
    """`pre` is rounded to the compute dtype before GELU is taken of it: the result is checked from there."""
    skip_unless_served("matmul_gelu_forward", backend, dtype)
    n, I, O = 9, 65, 130
    x, w, b = draw(n, I, dtype=dtype), draw(O, I, dtype=dtype, scale=0.2), draw(O, dtype=dtype, seed=1)
    out, pre = poison(n, O, dtype=dtype), poison(n, O, dtype=dtype)
    run("matmul_gelu_forward", out, pre, x, w, b, backend=backend)
    close(pre, f64(x) @ f64(w).T + f64(b))
    close(out, gelu(f64(pre)))


def product_and_slope(dout, w, pre):
    """The exact product, and gelu'(pre) by autograd, in fp64."""
    X = f64(pre).requires_grad_()
    return f64(dout) @ f64(w), torch.autograd.grad(gelu(X).sum(), X)[0]


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "O", "I"), [(1, 1, 63), (5, 65, 1000), (9, 3, 1024)])
def test_product_times_slope(backend, dtype, n, O, I):
    """Without an epilogue the product is rounded to the compute dtype before it meets the slope: a second half ulp."""
    skip_unless_served("matmul_gelu_backward", backend, dtype)
    dout, w, pre = draw(n, O, dtype=dtype), draw(O, I, dtype=dtype, seed=1), draw(n, I, dtype=dtype, scale=3)
    pre[0, : len(ENDS)] = torch.tensor(ENDS)
    dpre, again, db = (poison(*shape, dtype=dtype) for shape in ((n, I), (n, I), (I,)))
    run("matmul_gelu_backward", dpre, again, db, dout, w, pre, backend=backend, accumulate=False)
    product, slope = product_and_slope(dout, w, pre)
    close(dpre, product * slope, also_rounded=product * slope)
    close(again, gelu(f64(pre)))
    close(db, f64(dpre).sum(0))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_beyond_2_to_the_31():
    """Elements beyond index 2^31, a size that is no multiple of the block, forward and backward."""
    n, I = (1 << 31) // 1000 + 999, 1001
    gen = torch.Generator(DEVICE).manual_seed(0)
    pre = torch.empty(n, I, dtype=BF16, device=DEVICE).normal_(generator=gen)
    out = poison(n, I, dtype=BF16)
    far = torch.tensor([0, 1, n // 2, n - 2, n - 1], device=DEVICE)
    kernels.gelu_forward(out, pre)
    close(out[far], gelu(f64(pre[far])))
    dout, w = draw(n, 8, dtype=BF16), draw(8, I, dtype=BF16, seed=1)
    db = poison(I, dtype=BF16)
    run("matmul_gelu_backward", out, None, db, dout, w, pre, backend="triton", accumulate=False)
    product, slope = product_and_slope(dout[far], w, pre[far])
    close(out[far], product * slope, also_rounded=product * slope)
