"""SwiGLU and GeGLU, forward and backward, against formulas in fp64."""

from __future__ import annotations

import math

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import DEVICE, close, draw, each_backend, each_dtype, f64, poison, run, skip_unless_served

each_act = pytest.mark.parametrize("how", [{}, {"gelu": True}], ids=["silu", "gelu"])
SHAPES = [(1, 1), (3, 5), (2, 1000), (70, 96), (1, 3000)]


def gated(x, gelu):
    a, b = x.chunk(2, -1)
    u = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
    return (a / 2 * (1 + torch.tanh(u)) if gelu else a / (1 + torch.exp(-a))) * b


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "F"), SHAPES)
@each_act
def test_swiglu(backend, dtype, n, F, how):
    skip_unless_served("swiglu_backward", backend, dtype)
    x, d_out = draw(n, 2 * F, dtype=dtype, scale=3.0), draw(n, F, dtype=dtype, seed=1)
    out, again, dx, alone = (poison(n, m * F, dtype=dtype) for m in (1, 1, 2, 2))
    run("swiglu_forward", out, x, backend=backend, **how)
    X = f64(x).requires_grad_()
    want = gated(X, bool(how))
    close(out, want.detach())
    run("swiglu_backward", dx, again, d_out, x, backend=backend, **how)
    close(dx, torch.autograd.grad(want, X, f64(d_out))[0])
    assert torch.equal(again, out)
    run("swiglu_backward", alone, None, d_out, x, backend=backend, **how)
    assert torch.equal(alone, dx)
    run("swiglu_backward", x, None, d_out, x, backend=backend, **how)  # in place
    assert torch.equal(x, dx)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_act
def test_gates_that_are_shut_or_wide_open(backend, dtype, how):
    """silu(a) and gelu(a) are 0 far below, a far above; their slopes 0 and 1. Nothing overflows on the way: gelu takes
    the square of a."""
    end = 1e18 if how else 1e30
    a = torch.tensor([-end, -200.0, -0.0, 0.0, 200.0, end])
    x = torch.cat([a, torch.full_like(a, 2.0)])[None].to(DEVICE, dtype)
    out, dx = poison(1, 6, dtype=dtype), poison(1, 12, dtype=dtype)
    run("swiglu_forward", out, x, backend=backend, **how)
    run("swiglu_backward", dx, None, torch.ones_like(out), x, backend=backend, **how)
    far = torch.tensor([0, 0, 0, 0, 200.0, end]).to(DEVICE, dtype)
    assert torch.equal(out[0], 2 * far)
    assert torch.equal(dx[0], torch.cat([torch.tensor([0, 0, 1, 1, 2, 2]).to(DEVICE, dtype), far]))


@each_act
def test_swiglu_has_the_bits_of_transformers(how):
    """In fp32, as the MLPs of Llama and Gemma write it."""
    transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
    act = transformers.activations.ACT2FN["gelu_pytorch_tanh" if how else "silu"]
    x, out = draw(40, 2 * 1536, dtype=torch.float32), poison(40, 1536, dtype=torch.float32)
    run("swiglu_forward", out, x, **how)
    assert torch.equal(out, act(x[:, :1536].contiguous()) * x[:, 1536:])


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "I", "F"), [(1, 3, 1), (5, 63, 100), (40, 96, 72)])
@each_act
def test_matmul_and_its_gate(backend, dtype, n, I, F, how):
    """Without an epilogue, the matmul is rounded before its gate: the bits are those of the two operations in turn."""
    skip_unless_served("matmul_swiglu_backward", backend, dtype)
    x, w, b = draw(n, I, dtype=dtype), draw(2 * F, I, dtype=dtype, scale=I**-0.5), draw(2 * F, dtype=dtype, seed=1)
    dout, v = draw(n, I, dtype=dtype, seed=2), draw(I, F, dtype=dtype, seed=3, scale=I**-0.5)
    for bias in (None, b):
        out, gateup, alone = (poison(n, m * F, dtype=dtype) for m in (1, 2, 1))
        run("matmul_swiglu_forward", out, gateup, x, w, bias, backend=backend, **how)
        close(gateup, f64(x) @ f64(w).T + (0 if bias is None else f64(b)))
        run("swiglu_forward", alone, gateup, backend=backend, **how)
        assert torch.equal(out, alone)
    dx, d_act, again, rounded, want = (poison(n, m * F, dtype=dtype) for m in (2, 1, 1, 1, 2))
    run("matmul_swiglu_backward", dx, again, d_act, dout, v, gateup, backend=backend, **how)
    run("matmul_backward_input", rounded, dout, v)
    run("swiglu_backward", want, None, rounded, gateup, backend=backend, **how)
    assert torch.equal(dx, want)
    assert torch.equal(again, out)
    G = f64(gateup).requires_grad_()
    exact = torch.autograd.grad(gated(G, bool(how)), G, f64(dout) @ f64(v))[0]
    close(dx, exact, also_rounded=exact)
    run("matmul_swiglu_backward", gateup, None, d_act, dout, v, gateup, backend=backend, **how)  # in place
    assert torch.equal(gateup, want)
