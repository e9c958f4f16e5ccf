"""Muon's element-wise kernels and its batched matmuls, against formulas in fp64 and by singular values."""

from __future__ import annotations

import math

import muon_oracle as oracle
import pytest
import torch
from kernel_harness import DEVICE, F64, close, draw, each_backend, each_dtype, f64, poison, run, skip_unless_served
from test_kernel_optimizer import each_case, rounded_away
from torch import Tensor

import daybreak.kernels as kernels_file
import daybreak.kernels.cuda.muon as cuda_file
from daybreak.kernels import Kernels, acc_dtype
from daybreak.kernels.optimizer import join_masters, split_masters
from daybreak.optimizers import muon

BF16, F32, I16 = torch.bfloat16, torch.float32, torch.int16
SHAPES = [(12, 12), (37, 20), (20, 37), (1, 9), (70, 130)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many chunks and programs, so that their seams are tested."""
    monkeypatch.setattr(kernels_file, "CHUNK", 200)
    for name, value in (("BLOCK", 16), ("ROWS", 16), ("COLS", 16)):
        monkeypatch.setattr(cuda_file, name, value)


def scalars(skip: float = 0.0, *, lr: float = 0.1, t: int = 3, mu: float = 0.9, fade: float = 0.6) -> list[Tensor]:
    """stats and hyper. Entries that nobody may read are NaN."""
    nan = math.nan
    made = [nan, nan, 0.5, skip, nan, nan], [lr, t, nan, mu, fade]
    return [torch.tensor(x, dtype=F64, device=DEVICE) for x in made]


@each_backend
@each_dtype
@each_shape
@pytest.mark.parametrize("wide_grads", [False, True])
def test_momentum(backend, dtype, shape, wide_grads):
    skip_unless_served("muon_momentum", backend, dtype)
    acc = acc_dtype(dtype)
    grads, m = draw(*shape, dtype=acc if wide_grads else dtype), draw(*shape, dtype=acc, seed=1)
    grads[0], m[0] = (grads[0], m[0]) if shape[0] == 1 else (0, 0)  # a row that learns nothing stays zero
    want = 0.9 * f64(m) + 0.1 * 0.5 * f64(grads)
    nesterov, x = 0.9 * want + 0.1 * 0.5 * f64(grads), poison(*shape, dtype=dtype)
    run("muon_momentum", x, m, grads, *scalars(), backend=backend)
    close(m, want)
    rows = f64(nesterov).norm(dim=1, keepdim=True).clamp(min=1e-300)
    close(x, nesterov / rows / 1.01 / math.sqrt(shape[0]))
    if shape[0] > 1:
        assert not x[0].any()
    else:
        close(x, oracle.rows_alike(nesterov))
    before = m.clone()
    run("muon_momentum", x, m, torch.full_like(grads, math.nan), *scalars(1.0), backend=backend)
    assert torch.equal(m, before)


@each_backend
@each_dtype
@each_shape
def test_sums(backend, dtype, shape):
    skip_unless_served("muon_sums", backend, dtype)
    x, sums = draw(3, *shape, dtype=dtype), poison(3, max(shape), dtype=acc_dtype(dtype))
    run("muon_sums", sums, x, backend=backend)
    close(sums, f64(x).square().sum(2 if shape[0] >= shape[1] else 1))


@each_backend
@each_case
@each_shape
def test_update(backend, case, shape):
    """Of the layouts that AdamW's tests have, too."""
    dtype, layout, _ = case
    skip_unless_served("muon_update", backend, dtype)
    acc, n = acc_dtype(dtype), math.prod(shape)
    values, x = draw(n, dtype=dtype if layout == "none" else acc), draw(*shape, dtype=dtype, seed=1)
    second = draw(max(shape), dtype=acc, seed=2).abs() * 0.01
    weights, masters = values.to(dtype, copy=True), None
    if layout == "weights":
        masters = weights
    elif layout == "masters":
        weights, masters = poison(n, dtype=dtype), values.clone()
    elif layout == "split":
        masters = torch.zeros(n, dtype=I16, device=DEVICE)
        split_masters(weights, masters, values)
    u, v = oracle.rescaled(f64(x), f64(second), 0.9)
    p = f64(values).view(shape)
    want = p - 0.1 * math.sqrt(max(1.0, shape[0] / shape[1])) * (u + 0.6 * 0.5 * p * (u * p >= 0))
    sums = poison(1, max(shape), dtype=acc)
    run("muon_sums", sums, x[None], backend=backend)
    options = {"beta2": 0.9, "weight_decay": 0.5, "seed": 7, "offset": 5}
    run("muon_update", weights, masters, second, sums[0], x, *scalars(), backend=backend, **options)
    close(second, v)
    if layout == "none" and dtype == BF16:  # rounded at random: less than one bf16 step away
        assert ((f64(weights).view(shape) - want).abs() <= 2.0**-7 * want.abs() + 1e-6).all()
    else:
        found = weights if masters is None else masters
        if layout == "split":
            found = join_masters(torch.empty_like(weights, dtype=F32), weights, masters)
        close(found.view(shape), want)
        assert torch.equal(weights, rounded_away(found) if dtype == BF16 else found)
    kept = [t for t in (weights, masters, second) if t is not None]
    before = [t.clone() for t in kept]
    run("muon_update", weights, masters, second, sums[0], x, *scalars(1.0), backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@each_backend
def test_random_bits_follow_the_place_among_all_parameters(backend):
    values, x = draw(64, dtype=BF16), torch.ones(8, 8, dtype=BF16, device=DEVICE)
    found = []
    for offset in (0, 0, 32):
        weights, second = values.clone(), torch.ones(8, device=DEVICE)
        options = {"beta2": 1.0, "weight_decay": 0.0, "seed": 7, "offset": offset}
        run("muon_update", weights, None, second, torch.ones(8, device=DEVICE), x, *scalars(lr=1e-3), backend=backend,
            **options)  # fmt: skip
        found.append(weights)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", ["torch", "cublaslt"])
@each_dtype
@pytest.mark.parametrize("turned", ["", "a", "b"])
@pytest.mark.parametrize("added", [False, True])
def test_matmul_batched(backend, dtype, turned, added):
    if backend != "torch" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    skip_unless_served("matmul_batched", backend, dtype)
    N, p, q, k = 3, 24, 40, 16
    a = draw(N, k, p, dtype=dtype).mT if turned == "a" else draw(N, p, k, dtype=dtype)
    b = draw(N, q, k, dtype=dtype, seed=1).mT if turned == "b" else draw(N, k, q, dtype=dtype, seed=1)
    add, out = draw(N, p, q, dtype=dtype, seed=2) if added else None, poison(N, p, q, dtype=dtype)
    want = 0.75 * f64(a) @ f64(b) + (1.5 * f64(add) if added else 0.0)
    run("matmul_batched", out, a, b, add, alpha=0.75, beta=1.5, backend=backend)
    terms = f64(a).abs() @ f64(b).abs()
    close(out, want, terms=terms)


class Buffers:
    """The least of a frame that `orthogonal` needs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.k = dtype, Kernels(torch.empty(0, dtype=torch.uint8), {"matmul_batched": "torch"})

    def a(self, name: str, *shape: int) -> Tensor:
        return poison(*shape, dtype=self.dtype)


@each_shape
def test_five_steps_equal_the_polynomials_of_singular_values(shape):
    x = torch.stack([oracle.rows_alike(draw(*shape, dtype=F64, seed=i)) for i in range(2)])
    want = [oracle.orthogonal(each) for each in x]
    found = muon.orthogonal(Buffers(F64), "x", x.clone())
    for one, other in zip(found, want, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 1e-11
        s = torch.linalg.svdvals(one)
        assert s.max() < 1.25
        if shape[0] != shape[1]:  # a square one may have a direction that is too weak
            assert s.min() > 0.8


@each_shape
def test_other_polynomials_equal_torchs_muon(monkeypatch, shape):
    """torch.optim.Muon takes five times the same one, in bf16. It is a second oracle for momentum and steps."""
    own = (3.4445, -4.7750, 2.0315)
    monkeypatch.setattr(muon, "STEPS", (own,) * 5)
    p, m = torch.nn.Parameter(torch.zeros(shape, device=DEVICE)), torch.zeros(shape, device=DEVICE)
    theirs = torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.9, ns_coefficients=own)
    for step in range(3):
        p.grad = draw(*shape, dtype=F32, seed=step)
        before = p.detach().clone()
        theirs.step()
        m = 0.9 * m + 0.1 * p.grad
        nesterov = 0.9 * m + 0.1 * p.grad
        found = muon.orthogonal(Buffers(F64), "x", (nesterov / nesterov.norm()).double()[None])[0]
        found *= math.sqrt(max(1.0, shape[0] / shape[1]))
        assert ((before - p.detach() - found).norm() / found.norm()).item() < 0.03
