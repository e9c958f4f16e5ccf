"""SwiGLU forward and backward, against formulas in fp64."""

from __future__ import annotations

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import DEVICE, close, draw, each_backend, each_dtype, f64, poison, run, skip_unless_served

SHAPES = [(1, 1), (3, 5), (2, 1000), (70, 96), (1, 3000)]


def swiglu(x):
    a, b = x.chunk(2, -1)
    return a / (1 + torch.exp(-a)) * b


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "F"), SHAPES)
def test_swiglu(backend, dtype, n, F):
    skip_unless_served("swiglu_backward", backend, dtype)
    x, d_out = draw(n, 2 * F, dtype=dtype, scale=3.0), draw(n, F, dtype=dtype, seed=1)
    out, again, dx, alone = (poison(n, m * F, dtype=dtype) for m in (1, 1, 2, 2))
    run("swiglu_forward", out, x, backend=backend)
    X = f64(x).requires_grad_()
    want = swiglu(X)
    close(out, want.detach())
    run("swiglu_backward", dx, again, d_out, x, backend=backend)
    close(dx, torch.autograd.grad(want, X, f64(d_out))[0])
    assert torch.equal(again, out)
    run("swiglu_backward", alone, None, d_out, x, backend=backend)
    assert torch.equal(alone, dx)
    run("swiglu_backward", x, None, d_out, x, backend=backend)  # in place
    assert torch.equal(x, dx)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gates_that_are_shut_or_wide_open(backend, dtype):
    """silu(a) is 0 far below, a far above; its slope 0 and 1. Nothing overflows on the way."""
    a = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30])
    x = torch.cat([a, torch.full_like(a, 2.0)])[None].to(DEVICE, dtype)
    out, dx = poison(1, 6, dtype=dtype), poison(1, 12, dtype=dtype)
    run("swiglu_forward", out, x, backend=backend)
    run("swiglu_backward", dx, None, torch.ones_like(out), x, backend=backend)
    far = torch.tensor([0, 0, 0, 0, 200.0, 1e30]).to(DEVICE, dtype)
    assert torch.equal(out[0], 2 * far)
    assert torch.equal(dx[0], torch.cat([torch.tensor([0, 0, 1, 1, 2, 2]).to(DEVICE, dtype), far]))


def test_swiglu_has_the_bits_of_llama():
    """In fp32, as Hugging Face's MLP writes it."""
    x, out = draw(40, 2 * 1536, dtype=torch.float32), poison(40, 1536, dtype=torch.float32)
    run("swiglu_forward", out, x)
    assert torch.equal(out, torch.nn.functional.silu(x[:, :1536].contiguous()) * x[:, 1536:])
