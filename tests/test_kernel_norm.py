"""LayerNorm and RMSNorm, forward and backward, against formulas in fp64."""

from __future__ import annotations

import math

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import (
    DEVICE,
    close,
    draw,
    each_backend,
    each_dtype,
    either,
    f64,
    output,
    poison,
    run,
    skip_unless_served,
)
from oracle import layer_norm

from daybreak.kernels import acc_dtype
from daybreak.kernels.cuda import norm

# One column, fewer columns than threads, no power of two, exactly one.
ROWS = [(3, 1), (3, 5), (1, 63), (11, 1000), (23, 1024)]
each_shape = pytest.mark.parametrize(("rows", "columns"), ROWS)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def two_programs(monkeypatch):
    """In the interpreter, which takes a millisecond a program: so few programs that each takes several turns."""
    if DEVICE == "cpu":
        for name, value in (("BACKWARD_WARPS", 1), ("MIN_PROGRAMS", 2)):
            monkeypatch.setattr(norm, name, value)


def statistics(x, dtype):
    """Mean and 1 / standard deviation of the rows, exact but for one rounding."""
    X = f64(x)
    return X.mean(1).to(acc_dtype(dtype)), (X.var(1, correction=0) + 1e-5).rsqrt().to(acc_dtype(dtype))


@each_backend
@each_dtype
@each_shape
def test_layernorm_forward(backend, dtype, rows, columns):
    skip_unless_served("layernorm_forward", backend, dtype)
    x = draw(rows, columns, dtype=dtype) + 3
    w, b = draw(columns, dtype=dtype, seed=2), draw(columns, dtype=dtype, seed=3)
    out = poison(rows, columns, dtype=dtype)
    mean, rstd = poison(rows, dtype=acc_dtype(dtype)), poison(rows, dtype=acc_dtype(dtype))
    run("layernorm_forward", out, mean, rstd, x, w, b, backend=backend)
    close(out, layer_norm(f64(x), f64(w), f64(b)))
    close(mean, f64(x).mean(1))
    close(rstd, (f64(x).var(1, correction=0) + 1e-5).rsqrt())


def check_backward(backend, dtype, rows, columns, *, accumulate, accumulate_dx, dbias, again, in_place=False):
    skip_unless_served("layernorm_backward", backend, dtype)
    x, dout = draw(rows, columns, dtype=dtype) + 3, draw(rows, columns, dtype=dtype, seed=1)
    w, b = draw(columns, dtype=dtype, seed=2), draw(columns, dtype=dtype, seed=3)
    X, W, B = (f64(t).requires_grad_() for t in (x, w, b))
    gx, gw, gb = torch.autograd.grad(layer_norm(X, W, B), (X, W, B), f64(dout))
    mean, rstd = statistics(x, dtype)
    dx, dx0 = output(rows, columns, dtype=dtype, accumulate=accumulate_dx)
    if in_place:
        dx, dx0 = dout, torch.zeros_like(dx0)
    dw, dw0 = output(columns, dtype=dtype, accumulate=accumulate)
    db, db0 = output(columns, dtype=dtype, accumulate=accumulate)
    below, below0 = output(columns, dtype=dtype, accumulate=accumulate) if dbias else (None, 0)
    renewed = poison(rows, columns, dtype=dtype) if again else None
    before = dout.clone()
    run(
        "layernorm_backward", dx, dw, db, below, renewed, dout, x, mean, rstd, w, b,
        backend=backend, accumulate_dx=accumulate_dx, accumulate=accumulate,
    )  # fmt: skip
    cancelled = f64(rstd)[:, None] * W.detach() * f64(before) if columns == 1 else None  # one column's gradient is 0
    close(dx, dx0 + gx, terms=cancelled if cancelled is None else torch.cat([cancelled, dx0]))
    close(dw, dw0 + gw)
    close(db, db0 + gb)
    if below is not None:
        close(below, below0 + (dx0 + gx).sum(0), terms=cancelled)
    if renewed is not None:
        close(renewed, layer_norm(f64(x), f64(w), f64(b)))


@each_backend
@each_dtype
@each_shape
@either
@pytest.mark.parametrize("accumulate_dx", [False, True], ids=["write_dx", "accumulate_dx"])
def test_layernorm_backward(backend, dtype, rows, columns, accumulate, accumulate_dx):
    check_backward(
        backend, dtype, rows, columns, accumulate=accumulate, accumulate_dx=accumulate_dx, dbias=True, again=True
    )


@each_backend
@pytest.mark.parametrize(("dbias", "again"), [(False, False), (True, False), (False, True)])
def test_optional_outputs(backend, dbias, again):
    check_backward(backend, BF16, 5, 100, accumulate=True, accumulate_dx=True, dbias=dbias, again=again)


@each_backend
@pytest.mark.parametrize(("columns", "dtype"), [(1600, BF16), (8200, BF16), (8192, torch.float32)])
def test_widths_of_gpt(backend, columns, dtype):
    """The widest in fp32: one row at a time, and less ahead than elsewhere, because of shared memory."""
    rows = 3 if DEVICE == "cpu" else 301
    check_backward(backend, dtype, rows, columns, accumulate=True, accumulate_dx=True, dbias=True, again=True)
    x, w, b = (draw(*s, dtype=dtype, seed=4) for s in ((3, columns), (columns,), (columns,)))
    out, mean, rstd = poison(3, columns, dtype=dtype), *(poison(3, dtype=torch.float32) for _ in range(2))
    run("layernorm_forward", out, mean, rstd, x, w, b, backend=backend)
    close(out, layer_norm(f64(x), f64(w), f64(b)))


@pytest.mark.parametrize(("rows", "columns"), [(9, 65), (33, 1024)])
def test_gradient_may_be_overwritten(rows, columns):
    """The Triton kernel reads a row of dout before it writes that row of dx, also ahead of time: they may be one."""
    flags = {"accumulate": False, "accumulate_dx": False, "dbias": True, "again": True}
    check_backward("triton", BF16, rows, columns, **flags, in_place=True)


@pytest.mark.parametrize(("accumulate_dx", "in_place"), [(True, False), (False, False), (False, True)])
def test_more_rows_than_programs(accumulate_dx, in_place):
    """A width whose rows travel ahead on a GPU, and programs of four turns, one of which goes on to a fifth, of fewer
    rows than it takes at a time."""
    programs, columns = 2 if DEVICE == "cpu" else 528, 1024
    rows = programs * 2 * 4 + 1
    flags = {"accumulate": True, "accumulate_dx": accumulate_dx, "dbias": True, "again": True, "in_place": in_place}
    assert norm.backward_launch(draw(rows, columns, dtype=BF16), accumulate_dx)[:2] == (programs, 2)
    check_backward("triton", BF16, rows, columns, **flags)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_recomputed_output_has_the_same_bits(backend, dtype):
    n, C = 40, 100
    x, w, b, dout = (draw(*s, dtype=dtype, seed=5) for s in ((n, C), (C,), (C,), (n, C)))
    out, dx, again = (poison(n, C, dtype=dtype) for _ in range(3))
    mean, rstd = (poison(n, dtype=torch.float32) for _ in range(2))
    dw, db = (poison(C, dtype=dtype) for _ in range(2))
    run("layernorm_forward", out, mean, rstd, x, w, b, backend=backend)
    run(
        "layernorm_backward", dx, dw, db, None, again, dout, x, mean, rstd, w, b,
        backend=backend, accumulate_dx=False, accumulate=False,
    )  # fmt: skip
    assert torch.equal(again, out)


def rms_norm(x, w, eps):
    """By the definition, over the last dimension."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w


def inside(*shape, dtype, fill):
    """A (n, heads, C) view whose rows lie apart, as the heads of queries in packed qkv do."""
    n, heads, C = shape
    whole = poison(n, heads + 3, C, dtype=dtype)
    whole[:, 1:-2] = fill
    return whole[:, 1:-2]


# Rows that are one matrix, and the heads of each token, contiguous or in a wider buffer.
RMS = [((3, 1), False), ((11, 1000), False), ((5, 3, 8), False), ((7, 2, 20), True), ((13, 9, 128), True)]


@each_backend
@each_dtype
@pytest.mark.parametrize(("shape", "strided"), RMS, ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["write", "accumulate"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rmsnorm(backend, dtype, shape, strided, adds, offset):
    """eps decides where a row is zero. The output again has the bits of the first time."""
    skip_unless_served("rmsnorm_backward", backend, dtype)
    x, dout, w = draw(*shape, dtype=dtype) + 1, draw(*shape, dtype=dtype, seed=1), draw(shape[-1], dtype=dtype, seed=2)
    x[0] = 0
    X, W = (f64(t).requires_grad_() for t in (x, w))
    want, how = rms_norm(X, W + offset, 1e-3), {"offset": offset} if offset else {}
    gx, gw = torch.autograd.grad(want, (X, W), f64(dout))
    out, again = poison(*shape, dtype=dtype), poison(*shape, dtype=dtype)
    dx, dx0 = output(*shape, dtype=dtype, accumulate=adds)
    if strided:
        x, dout, dx, out, again = (inside(*shape, dtype=dtype, fill=t) for t in (x, dout, dx, out, again))
    rstd = poison(math.prod(shape[:-1]), dtype=acc_dtype(dtype))
    run("rmsnorm_forward", out, rstd, x, w, backend=backend, eps=1e-3, **how)
    close(out, want.detach())
    close(rstd, (f64(x).square().mean(-1) + 1e-3).rsqrt().flatten())
    dw, dw0 = output(shape[-1], dtype=dtype, accumulate=adds)
    options = {"backend": backend, "accumulate_dx": adds, "accumulate": adds, **how}
    alone = dx.clone()
    run("rmsnorm_backward", dx, dw, again, dout, x, rstd, w, **options)
    close(dx, dx0 + gx)
    close(dw, dw0 + gw)
    assert torch.equal(again, out)
    run("rmsnorm_backward", alone, None, None, dout, x, rstd, w, **options)  # of a frozen weight
    assert torch.equal(alone, dx)
    if not adds:
        run("rmsnorm_backward", dout, dw, None, dout, x, rstd, w, **options)  # in place
        assert torch.equal(dout, dx)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(3, 1), (11, 1000), (5, 64)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rmsnorm_added_to_the_stream(backend, dtype, shape, offset):
    """The sum is rounded once, not the norm before it."""
    skip_unless_served("rmsnorm_forward", backend, dtype)
    x, add = draw(*shape, dtype=dtype) + 1, draw(*shape, dtype=dtype, seed=1, scale=8.0)
    w, out, rstd = (
        draw(shape[1], dtype=dtype, seed=2),
        poison(*shape, dtype=dtype),
        poison(shape[0], dtype=acc_dtype(dtype)),
    )
    run("rmsnorm_forward", out, rstd, x, w, backend=backend, eps=1e-3, offset=offset, add=add)
    normed = rms_norm(f64(x), f64(w) + offset, 1e-3)
    close(out, normed + f64(add), terms=torch.cat([normed, f64(add)]))
    close(rstd, (f64(x).square().mean(-1) + 1e-3).rsqrt().flatten())


def test_rmsnorm_has_the_bits_of_transformers():
    """In fp32, as Llama and Gemma write it. Gemma's then goes into the residual stream."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, stream = (draw(300, 576, dtype=torch.float32, seed=i) for i in (0, 2))
    kinds = [(LlamaRMSNorm, {}), (Gemma3RMSNorm, {"offset": 1.0})]
    for theirs, how in [(kind(576, eps=1e-5).to(DEVICE), how) for kind, how in kinds]:
        theirs.weight.data = draw(576, dtype=torch.float32, seed=1)
        out, rstd = poison(300, 576, dtype=torch.float32), poison(300, dtype=torch.float32)
        run("rmsnorm_forward", out, rstd, x, theirs.weight.data, eps=1e-5, **how)
        assert torch.equal(out, theirs(x).detach())
    run("rmsnorm_forward", out, rstd, x, theirs.weight.data, eps=1e-5, offset=1.0, add=stream)
    assert torch.equal(out, stream + theirs(x).detach())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_beyond_2_to_the_31():
    """Rows whose first element lies beyond 2^31, forward and backward; 4.3 GB a buffer, about 30 GB at most."""
    n, C = (1 << 31) // 1600 + 1000, 1600
    gen = torch.Generator(DEVICE).manual_seed(0)
    x, dout = (torch.empty(n, C, dtype=BF16, device=DEVICE).normal_(generator=gen) for _ in range(2))
    w, b = draw(C, dtype=BF16, seed=2), draw(C, dtype=BF16, seed=3)
    out = poison(n, C, dtype=BF16)
    mean, rstd = (poison(n, dtype=torch.float32) for _ in range(2))
    dw, db, dbias = (poison(C, dtype=BF16) for _ in range(3))
    far = torch.tensor([0, 1, n // 2, n - 999, n - 2, n - 1], device=DEVICE)
    run("layernorm_forward", out, mean, rstd, x, w, b, backend="triton")
    X = f64(x[far]).requires_grad_()
    y = layer_norm(X, f64(w), f64(b))
    close(out[far], y.detach())
    del out
    dx = torch.zeros(n, C, dtype=BF16, device=DEVICE)
    run(
        "layernorm_backward", dx, dw, db, dbias, None, dout, x, mean, rstd, w, b,
        backend="triton", accumulate_dx=True, accumulate=False,
    )  # fmt: skip
    close(dx[far], torch.autograd.grad(y, X, f64(dout[far]))[0])
    close(db, torch.stack([d.double().sum(0) for d in dout.split(1 << 16)]).sum(0))
