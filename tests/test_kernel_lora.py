"""LoRA's operations against formulas in fp64: parts with gaps between them, odd sizes, and outputs that were NaN."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_harness import close, draw, each_backend, each_dtype, either, f64, poison, run, skip_unless_served
from torch import Tensor

SCALE = 1.75
# n, I, O, r, columns: one part; two parts with a gap; parts of one column; a rank above the inputs
CASES = [
    (1, 1, 1, 1, ((0, 1),)),
    (63, 37, 29, 3, ((0, 29),)),
    (200, 136, 96, 8, ((0, 40), (72, 96))),
    (31, 5, 7, 9, ((1, 2), (2, 5), (6, 7))),
    (600, 260, 132, 16, ((0, 132),)),  # rows in several runs, and columns in several tiles
    (40, 30, 90, 70, ((0, 90),)),  # more columns than Triton's kernels take
]
each_case = pytest.mark.parametrize(("n", "I", "O", "r", "columns"), CASES)


def whole(b: Tensor, columns: tuple[tuple[int, int], ...], O: int) -> Tensor:
    """b (all parts' outputs, r) as the matrix (O, r parts) that it is in the sum of all parts."""
    r, at, out = b.shape[1], 0, b.new_zeros(O, b.shape[1] * len(columns))
    for i, (first, stop) in enumerate(columns):
        out[first:stop, i * r : i * r + r] = b[at : at + stop - first]
        at += stop - first
    return out


def inputs(n: int, I: int, O: int, r: int, columns: tuple[tuple[int, int], ...], dtype: torch.dtype) -> list[Tensor]:
    """x, a, b, dy."""
    width, outputs = r * len(columns), sum(stop - first for first, stop in columns)
    return [draw(*shape, dtype=dtype) for shape in ((n, I), (width, I), (outputs, r), (n, O))]


@each_dtype
@each_backend
@each_case
def test_forward(dtype, backend, n, I, O, r, columns):
    skip_unless_served("lora_forward", backend, dtype)
    x, a, b, y = inputs(n, I, O, r, columns, dtype)
    before, u = f64(y), poison(n, r * len(columns), dtype=dtype)
    run("lora_forward", y, u, x, a, b, backend=backend, scale=SCALE, columns=columns)
    close(u, f64(x) @ f64(a).T)
    added = SCALE * f64(u) @ whole(f64(b), columns, O).T  # of u as it was stored
    close(y, before + added, also_rounded=added)
    outside = torch.ones(O, dtype=torch.bool)
    for first, stop in columns:
        outside[first:stop] = False
    assert torch.equal(f64(y[:, outside]), before[:, outside])


@each_dtype
@each_backend
@either
@each_case
def test_backward(dtype, backend, accumulate, n, I, O, r, columns):
    skip_unless_served("lora_backward", backend, dtype)
    x, a, b, dy = inputs(n, I, O, r, columns, dtype)
    width = r * len(columns)
    u, du, big = draw(n, width, dtype=dtype, seed=1), poison(n, width, dtype=dtype), whole(f64(b), columns, O)
    old = [draw(*t.shape, dtype=dtype, seed=2) if accumulate else poison(*t.shape, dtype=dtype) for t in (b, a)]
    (db, db0), (da, da0) = [(t, f64(t) if accumulate else torch.zeros_like(f64(t))) for t in old]
    run("lora_backward", du, db, dy, u, b, backend=backend, scale=SCALE, columns=columns, accumulate=accumulate)
    close(du, SCALE * f64(dy) @ big)
    want, at = (SCALE * f64(dy).T @ f64(u)), 0
    for i, (first, stop) in enumerate(columns):
        product = want[first:stop, i * r : i * r + r]
        close(db[at : at + stop - first], db0[at : at + stop - first] + product, also_rounded=product)
        at += stop - first
    run("lora_backward_weight", da, du, x, backend=backend, accumulate=accumulate)
    product = f64(du).T @ f64(x)
    close(da, da0 + product, also_rounded=product)
    dx = draw(n, I, dtype=dtype, seed=3)
    before, added = f64(dx), f64(du) @ f64(a)
    run("lora_backward_input", dx, du, a, backend=backend)
    close(dx, before + added, also_rounded=added)


@each_dtype
def test_the_formulas_are_those_of_autograd(dtype):
    """The whole layer: dx, da and db of y = x w^T + scale (x a^T) b^T, in fp64."""
    n, I, O, r, columns = CASES[2]
    x, a, b, dy = (t.double().requires_grad_() for t in inputs(n, I, O, r, columns, dtype))
    w, parts = draw(O, I, dtype=torch.float64), len(columns)
    y = x @ w.T + SCALE * (x @ a.T) @ whole(b, columns, O).T
    want = torch.autograd.grad(y, (x, a, b), dy)
    X, A, Bm, D = (t.detach() for t in (x, a, b, dy))
    u, du, dx = (poison(n, size, dtype=torch.float64) for size in (r * parts, r * parts, I))
    got, db, da = X @ w.T, poison(*Bm.shape, dtype=torch.float64), poison(*A.shape, dtype=torch.float64)
    run("lora_forward", got, u, X, A, Bm, scale=SCALE, columns=columns)
    close(got, y.detach())
    run("lora_backward", du, db, D, u, Bm, scale=SCALE, columns=columns, accumulate=False)
    run("matmul_backward_input", dx, D, w)
    run("lora_backward_input", dx, du, A)
    run("lora_backward_weight", da, du, X, accumulate=False)
    for mine, theirs in zip((dx, da, db), want, strict=True):
        close(mine, theirs)


@each_dtype
def test_gelu_alone(dtype):
    """Where an adapter adds to GELU's input."""
    pre, d = draw(37, 19, dtype=dtype, scale=2.0), draw(37, 19, dtype=dtype, seed=1)
    x = f64(pre).requires_grad_()
    want = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    out, again = poison(37, 19, dtype=dtype), poison(37, 19, dtype=dtype)
    run("gelu_forward", out, pre)
    close(out, want.detach())
    slope = torch.autograd.grad(want, x, f64(d))[0]
    run("gelu_backward", d, again, pre)
    close(d, slope)
    assert torch.equal(again, out)
