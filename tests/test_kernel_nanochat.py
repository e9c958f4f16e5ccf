"""Kernels of nanochat's family alone, against fp64 autograd: squared ReLU, mixed streams, smear, value embeddings."""

from __future__ import annotations

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
from torch import Tensor

from daybreak.kernels.cuda import mix, smear, value

BF16 = torch.bfloat16
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gradients(out: Tensor, d: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((out * f64(d)).sum(), inputs))


def leaf(x: Tensor) -> Tensor:
    return f64(x).requires_grad_()


def scalar(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A learned scalar, which comes in fp32 beside streams in bf16."""
    return draw(1, dtype=torch.float32 if dtype == BF16 else dtype, seed=seed)


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "F"), [(1, 1), (3, 5), (2, 1000), (70, 96), (1, 3000)])
def test_squared_relu(backend, dtype, n, F):
    skip_unless_served("relu2_backward", backend, dtype)
    x, d = draw(n, F, dtype=dtype, scale=3.0), draw(n, F, dtype=dtype, seed=1)
    x[0, 0] = 0.0
    out, again, dx = poison(n, F, dtype=dtype), poison(n, F, dtype=dtype), d.clone()
    run("relu2_forward", out, x, backend=backend)
    X = leaf(x)
    y = X.relu().square()
    close(out, y.detach())
    run("relu2_backward", dx, again, x, backend=backend)
    close(dx, gradients(y, d, X)[0])
    assert torch.equal(again, out)
    alone = d.clone()
    run("relu2_backward", alone, None, x, backend=backend)
    assert torch.equal(alone, dx)


@pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(x, marks=[pytest.mark.gpu, NO_GPU]) for x in ("cublaslt", "quack"))]
)
@each_dtype
@pytest.mark.parametrize(("n", "C", "F"), [(1, 3, 5), (40, 96, 72), (2048, 256, 1024)])
def test_matmuls_with_the_squared_relu(backend, dtype, n, C, F):
    """Forward has the bits of two passes. Backward may round once less; what it writes again has forward's bits."""
    skip_unless_served("matmul_relu2_backward", backend, dtype)
    x, w = draw(n, C, dtype=dtype), draw(F, C, dtype=dtype, scale=C**-0.5)
    dout, v = draw(n, C, dtype=dtype, seed=2), draw(C, F, dtype=dtype, seed=3, scale=C**-0.5)
    out, alone, pre, dpre, again, plain = (poison(n, F, dtype=dtype) for _ in range(6))
    run("matmul_relu2_forward", out, pre, x, w, backend=backend)
    close(pre, f64(x) @ f64(w).T)
    run("relu2_forward", alone, pre)
    assert torch.equal(out, alone)
    run("matmul_relu2_backward", dpre, again, dout, v, pre, backend=backend)
    exact = (f64(dout) @ f64(v)) * 2 * f64(pre).clamp(min=0)
    close(dpre, exact, also_rounded=exact)
    assert torch.equal(again, out)
    run("matmul_relu2_backward", plain, None, dout, v, pre, backend=backend)
    assert torch.equal(plain, dpre)


EPS = 2.0**-23
STREAMS = [(1, 1), (3, 50), (40, 96), (7, 3001)]
STREAMS += [(1500, 768), (701, 1536)] if DEVICE == "cuda" else []  # where rows travel ahead, many times


def norm_of(m: Tensor) -> Tensor:
    return m / (m.square().mean(1, keepdim=True) + EPS).sqrt()


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "C"), STREAMS)
@pytest.mark.parametrize(("scaled", "factor"), [(True, 1.0), (False, -1.0)], ids=["block", "end"])
def test_norm_of_a_mixed_stream(backend, dtype, n, C, scaled, factor):
    """The sum alone, and with an addition: then the norm has the bits of a norm of what was stored."""
    skip_unless_served("mix_norm_forward", backend, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, y, old = (draw(n, C, dtype=dtype, seed=i) for i in range(3))
    a, b = scalar(dtype, 3) if scaled else None, scalar(dtype, 4)
    how = {"eps": EPS, "factor": factor, "backend": backend}
    m = (1.0 if a is None else f64(a)) * f64(x) + factor * f64(b) * f64(y)
    out, rstd = poison(n, C, dtype=dtype), poison(n, dtype=acc)
    run("mix_norm_forward", None, out, rstd, x, y, a, b, **how)
    close(out, norm_of(m))
    close(rstd, 1 / (m.square().mean(1) + EPS).sqrt())
    res, out, rstd = old.clone(), poison(n, C, dtype=dtype), poison(n, dtype=acc)
    run("mix_norm_forward", res, out, rstd, x, y, a, b, **how)
    close(res, m + f64(old), terms=m.abs() + f64(old).abs())
    close(out, norm_of(f64(res)))
    close(rstd, 1 / (f64(res).square().mean(1) + EPS).sqrt())


@each_backend
def test_a_small_addition_to_a_mixed_stream_is_kept(backend):
    """In bf16 one of 0.0003 of the stream: on average all of it arrives, as the sum is rounded once."""
    n, C, small = 64, 512, 3e-4
    x, y, z = draw(n, C, dtype=BF16), draw(n, C, dtype=BF16, seed=1), draw(n, C, dtype=BF16, seed=2, scale=small)
    a, b, rstd = torch.full((1,), 1.1, device=DEVICE), scalar(BF16), poison(n, dtype=torch.float32)
    sums, kept = [], f64(z)
    for res in (z.clone(), torch.zeros_like(z)):
        run("mix_norm_forward", res, poison(n, C, dtype=BF16), rstd, x, y, a, b, eps=EPS, backend=backend)
        sums.append(f64(res))
    part = ((sums[0] - sums[1]) * kept).sum() / kept.square().sum()
    assert 0.85 < part.item() < 1.15
    mixed = (f64(a) * f64(x) + f64(b) * f64(y)).to(BF16)
    rounded_before = f64((f64(mixed) + kept).to(BF16)) - f64(mixed)
    assert ((rounded_before * kept).sum() / kept.square().sum()).item() < 0.5


@each_backend
def test_scalars_in_fp32_are_not_rounded(backend):
    """Beside streams in bf16, where 1.003 would be 1: all that is left of the sums is what rounding would take away."""
    one, a, b = torch.ones(5, 32, dtype=BF16, device=DEVICE), *torch.tensor([[1.003], [-1.0]], device=DEVICE)
    left, zero = f64(a) - 1, torch.zeros_like(one)
    res, out, rstd = zero.clone(), poison(5, 32, dtype=BF16), poison(5, dtype=torch.float32)
    run("mix_norm_forward", res, out, rstd, one, one, a, b, eps=0.0, backend=backend)
    close(res, left.expand(5, 32))
    run("mix_norm_forward", None, out, rstd, one, one, a, b, eps=0.0, backend=backend)
    assert (out == 1).all()
    res = -one
    run("mix_norm_forward", res, out, rstd.clone(), zero, one, None, a, eps=0.0, backend=backend)
    close(res, left.expand(5, 32))
    largest = torch.full_like(one, 1.9921875)  # below 2; times 1.003 it is nearer to 2
    dx, dy, again, (da, db) = zero.clone(), zero.clone(), poison(5, 32, dtype=BF16), poison(2, 1, dtype=BF16)
    how = {"accumulate_dy": False, "accumulate": False, "backend": backend}
    run("mix_norm_backward", dx, dy, da, db, again, largest, zero, one, one, rstd, a, b, **how)
    assert (dx == 2).all()
    assert (again == 1).all()
    run("mix_norm_backward", dx, dy, da, db, None, largest, zero, one, one, rstd, b, a, **how)
    assert (dy == 2).all()
    steep = largest * torch.tensor([1.0, -1.0], dtype=BF16, device=DEVICE).repeat(16)  # at a right angle to the norm
    run(
        "mix_backward",
        dx,
        dy,
        db,
        steep,
        one,
        one,
        torch.ones_like(rstd),
        a,
        factor=-1.0,
        accumulate=False,
        backend=backend,
    )
    assert torch.equal(dx, steep)
    assert torch.equal(dy, -2 * steep.sign())
    long, total = torch.full_like(rstd, 1.003), poison(1, dtype=torch.float32)
    run("mix_backward", dx, dy, total, steep.sign(), one, steep.sign(), long, a, accumulate=False, backend=backend)
    assert (dx.abs() == 1).all()
    close(total, f64(long).sum().view(1) * 32)  # of what dx was before it was rounded
    e, w, positions = torch.stack([one[:2], -one[:2]], 1), torch.zeros(24, dtype=BF16, device=DEVICE), None
    out, cache = poison(2, 2, 32, dtype=BF16), torch.ones(2, 4, 2, 8, dtype=BF16, device=DEVICE)
    run("smear_forward", out, e, w, 2 * a, positions, backend=backend)  # half of it, as the gate is
    close(out[:, 1], left.expand(2, 32))
    positions, now = torch.tensor([1, 1], device=DEVICE), poison(2, 32, dtype=BF16)
    run("smear_decode", now, cache, e[:, 1].contiguous(), w, 2 * a, positions, backend=backend)
    assert torch.equal(now, out[:, 1])
    de, d, (dw, dl) = poison(2, 2, 32, dtype=BF16), -e, (poison(24, dtype=BF16), poison(1, dtype=BF16))
    run("smear_backward", de, dw, dl, d, e, 0 * w, 2 * a, None, accumulate=False, backend=backend)
    close(de[:, 0, 24:], left.expand(2, 8))
    v, tokens, w = (
        torch.zeros(5, 4, 8, dtype=BF16, device=DEVICE),
        torch.zeros(5, dtype=torch.int64, device=DEVICE),
        one,
    )
    run("value_forward", v, tokens, one, w[:4, :12].contiguous(), one, one, rstd, a, b, backend=backend)
    close(v, 3 / (1 + torch.exp(torch.full((5, 4, 8), -12.0, dtype=torch.float64, device=DEVICE))))
    du = poison(5, 32, dtype=BF16)
    given = (torch.ones_like(v), tokens, one, w[:4, :12].contiguous(), one, one, rstd, a, b)
    run("value_backward", du, zero.clone(), None, *given, accumulate=False, backend=backend)
    assert torch.equal(du.view(v.shape), v)


@each_backend
@each_dtype
@either
@pytest.mark.parametrize(("n", "C"), STREAMS)
def test_gradients_of_a_mixed_stream_and_its_norm(backend, dtype, accumulate, n, C, monkeypatch):
    skip_unless_served("mix_norm_backward", backend, dtype)
    monkeypatch.setattr(mix, "MIN_PROGRAMS", 3)
    monkeypatch.setattr(mix, "BACKWARD_WARPS", 3)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, y, d, dout = (draw(n, C, dtype=dtype, seed=i) for i in range(4))
    a, b = scalar(dtype, 4), scalar(dtype, 5)
    X, Y, A, B = (leaf(z) for z in (x, y, a, b))
    m = A * X + B * Y
    want = (m * f64(d)).sum() + (norm_of(m) * f64(dout)).sum()
    gx, gy, ga, gb = torch.autograd.grad(want, (X, Y, A, B))
    exact = m.detach()
    rstd = (1 / (exact.square().mean(1) + EPS).sqrt()).to(acc)
    dm = (f64(d).abs() + f64(dout).abs() * rstd[:, None].double()) * (1 + norm_of(exact).abs())  # its terms
    if C == 1:
        dm = dm * 4 * rstd[:, None].double().amax().clamp(min=1)  # they cancel
    dx, (dy, old_y) = poison(n, C, dtype=dtype), output(n, C, dtype=dtype, accumulate=accumulate)
    (da, old_a), (db, old_b) = (output(1, dtype=dtype, accumulate=accumulate) for _ in range(2))
    again = poison(n, C, dtype=dtype)
    how = {"accumulate_dy": accumulate, "accumulate": accumulate, "backend": backend}
    stream = (x, y, rstd, a, b)
    run("mix_norm_backward", dx, dy, da, db, again, d, dout, *stream, **how)
    close(dx, gx, terms=dm * f64(a).abs())
    close(dy, gy + old_y, terms=dm * f64(b).abs() + old_y.abs())
    close(da, ga + old_a, terms=(dm * f64(x)).norm() + old_a.abs())
    close(db, gb + old_b, terms=(dm * f64(y)).norm() + old_b.abs())
    close(again, norm_of(exact))
    made = poison(n, C, dtype=dtype)  # by forward
    own = poison(n, dtype=acc)
    run("mix_norm_forward", None, made, own, x, y, a, b, eps=EPS, backend=backend)
    more = draw(n, C, dtype=dtype, seed=99) if accumulate else poison(n, C, dtype=dtype)
    in_place, once = d.clone(), poison(n, C, dtype=dtype)
    run("mix_norm_backward", in_place, more, None, None, once, in_place, dout, x, y, own, a, b, **how)
    assert torch.equal(once, made)
    alone, other = poison(n, C, dtype=dtype), draw(n, C, dtype=dtype, seed=99)
    run("mix_norm_backward", alone, other, None, None, None, d, dout, x, y, own, a, b, **how)
    assert torch.equal(alone, in_place)
    assert torch.equal(other, more)
    part, summed, other = draw(n, C, dtype=acc, seed=7), d.clone(), draw(n, C, dtype=dtype, seed=99)
    run("mix_norm_backward", summed, other, None, None, None, summed, dout, x, y, rstd, a, b, part, **how)
    close(summed, gx + f64(part), terms=dm * f64(a).abs() + f64(part).abs())
    left, other = d.clone(), draw(n, C, dtype=dtype, seed=99)
    run("mix_norm_backward", left, other, None, None, None, left, dout, x, y, own, a, b, -alone.to(acc), **how)
    assert left.any() or dtype != BF16  # what rounding took from `alone`: dx is rounded once


@each_backend
@each_dtype
@either
@pytest.mark.parametrize(("n", "C"), STREAMS)
def test_sums_of_streams_and_the_part_taken_away(backend, dtype, accumulate, n, C, monkeypatch):
    """Backout's gradients are those of the norm's input before it is rounded, and dy may be wider than dx."""
    skip_unless_served("mix_backward", backend, dtype)
    monkeypatch.setattr(mix, "MIN_PROGRAMS", 3)
    monkeypatch.setattr(mix, "BACKWARD_WARPS", 3)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, y, dout = (draw(n, C, dtype=dtype, seed=i) for i in range(3))
    b, out = scalar(dtype, 3), poison(n, C, dtype=dtype)
    run("mix_add", out, x, y, backend=backend)
    close(out, f64(x) + f64(y), terms=f64(x).abs() + f64(y).abs())
    X = leaf(x)
    want = gradients(norm_of(X), dout, X)[0]
    rstd = (1 / (f64(x).square().mean(1) + EPS).sqrt()).to(acc)
    terms = f64(dout).abs() * rstd[:, None].double() * (1 + norm_of(f64(x)).abs())
    if C == 1:
        terms = terms * 4 * rstd[:, None].double().amax().clamp(min=1)  # they cancel
    dx, dy, (db, old) = (
        poison(n, C, dtype=dtype),
        poison(n, C, dtype=acc),
        output(1, dtype=dtype, accumulate=accumulate),
    )
    how = {"factor": -1.0, "accumulate": accumulate, "backend": backend}
    run("mix_backward", dx, dy, db, dout, x, y, rstd, b, **how)
    close(dx, want, terms=terms)
    close(dy, -f64(b) * want, terms=terms * f64(b).abs())
    close(db, old - (want * f64(y)).sum(), terms=(terms * f64(y)).norm() + old.abs())
    alone, narrow = poison(n, C, dtype=dtype), poison(n, C, dtype=dtype)
    run("mix_backward", alone, narrow, None, dout, x, y, rstd, b, **how)
    assert torch.equal(alone, dx)
    assert torch.equal(narrow, dy.to(dtype))
    run("mix_add", x, x, y, backend=backend)
    assert torch.equal(x, out)


def smeared(e: Tensor, w: Tensor, factor: Tensor, first: Tensor) -> Tensor:
    """The formula, token by token."""
    rows = []
    for row, begins in zip(e, first, strict=True):
        tokens = [row[0]]
        for t in range(1, len(row)):
            g = 0.0 if begins[t] else factor * torch.sigmoid(row[t, :24] @ w)
            tokens.append(row[t] + g * row[t - 1])
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@each_backend
@each_dtype
@either
@pytest.mark.parametrize(("B", "T", "C"), [(1, 1, 24), (2, 5, 32), (3, 7, 100)])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_smear(backend, dtype, accumulate, B, T, C, packed, monkeypatch):
    skip_unless_served("smear_backward", backend, dtype)
    monkeypatch.setattr(smear, "PROGRAMS", 4)
    e, w, factor = draw(B, T, C, dtype=dtype), draw(24, dtype=dtype, seed=1), scalar(dtype, 2)
    places = torch.arange(T, device=DEVICE).repeat(B, 1)
    if packed:
        places = torch.where(places >= 3, places - 3, places)
        places[-1] = torch.arange(T, device=DEVICE)
    positions = places.flatten() if packed else None
    out, E, W, L = poison(B, T, C, dtype=dtype), leaf(e), leaf(w), leaf(factor)
    run("smear_forward", out, e, w, factor, positions, backend=backend)
    want = smeared(E, W, L, places == 0)
    close(out, want.detach())
    d, de = draw(B, T, C, dtype=dtype, seed=3), poison(B, T, C, dtype=dtype)
    ge, gw, gl = torch.autograd.grad((want * f64(d)).sum(), (E, W, L), allow_unused=True, materialize_grads=True)
    (dw, old_w), (dl, old_l) = (output(n, dtype=dtype, accumulate=accumulate) for n in (24, 1))
    run("smear_backward", de, dw, dl, d, e, w, factor, positions, accumulate=accumulate, backend=backend)
    close(de, ge)
    close(dw, gw + old_w, terms=torch.stack([f64(d).abs().sum() * f64(e).abs().max()]))
    close(dl, gl + old_l, terms=torch.stack([f64(d).abs().sum() * f64(e).abs().max()]))
    alone = poison(B, T, C, dtype=dtype)
    run("smear_backward", alone, None, None, d, e, w, factor, positions, accumulate=accumulate, backend=backend)
    assert torch.equal(alone, de)


@each_backend
@each_dtype
def test_smear_of_texts_under_way(backend, dtype):
    """A token at a time it has the bits of the whole text, and the cache keeps every embedding."""
    skip_unless_served("smear_decode", backend, dtype)
    b, T, NH, HS = 3, 6, 2, 20
    e, w, factor = draw(b, T, NH * HS, dtype=dtype), draw(24, dtype=dtype, seed=1), scalar(dtype, 2)
    whole = poison(b, T, NH * HS, dtype=dtype)
    run("smear_forward", whole, e, w, factor, backend=backend)
    cache = poison(2, 4, NH, T, HS, dtype=dtype)[0, :b]  # strided, as the engine's
    for t in range(T):
        out, positions = poison(b, NH * HS, dtype=dtype), torch.tensor([max(t - i, 0) for i in range(b)], device=DEVICE)
        now = torch.stack([e[i, p] for i, p in enumerate(positions)])
        run("smear_decode", out, cache, now, w, factor, positions, backend=backend)
        for i, p in enumerate(positions.tolist()):
            close(out[i], f64(whole[i, p]), also_rounded=f64(whole[i, p]))
            assert torch.equal(cache[i, :, p].flatten(), e[i, p])


@each_backend
@each_dtype
@either
@pytest.mark.parametrize(("n", "NH", "HS"), [(1, 1, 16), (9, 3, 8), (40, 2, 20)])
def test_value_embeddings(backend, dtype, accumulate, n, NH, HS, monkeypatch):
    skip_unless_served("value_backward", backend, dtype)
    monkeypatch.setattr(value, "PROGRAMS", 6)
    C, V = NH * HS, 11
    table, w, x = draw(V, C, dtype=dtype), draw(NH, 12, dtype=dtype, seed=1), draw(n, C, dtype=dtype, seed=2)
    x0, a, b = draw(n, C, dtype=dtype, seed=7), scalar(dtype, 8), scalar(dtype, 9)
    rstd = draw(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=3).abs()
    stream, y = (x, x0, rstd, a, b), (f64(a) * f64(x) + f64(b) * f64(x0)) * f64(rstd)[:, None]
    tokens = torch.randint(V, (n,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    packed, grads = draw(n, 3 * NH, HS, dtype=dtype, seed=5), draw(n, 3 * NH, HS, dtype=dtype, seed=6)
    v, dv = packed[:, 2 * NH :], grads[:, 2 * NH :]
    Y, W, U, V0 = leaf(y), leaf(w), leaf(table[tokens]), leaf(v)
    others = packed[:, : 2 * NH].clone()
    want = V0 + 3 * torch.sigmoid(Y[:, :12] @ W.T)[..., None] * U.view(n, NH, HS)
    run("value_forward", v, tokens, table, w, *stream, backend=backend)
    close(v, want.detach())
    assert torch.equal(packed[:, : 2 * NH], others)
    gy, gw, gu = gradients(want, dv, Y, W, U)
    du, dy, (dw, old) = poison(n, C, dtype=dtype), draw(n, C, dtype=dtype), output(
        NH, 12, dtype=dtype, accumulate=accumulate)  # fmt: skip
    before = f64(dy)
    run("value_backward", du, dy, dw, dv, tokens, table, w, *stream, accumulate=accumulate, backend=backend)
    close(du, gu)
    close(dy, before + gy, terms=before.abs() + f64(dv).abs().sum() / n)
    assert torch.equal(f64(dy[:, 12:]), before[:, 12:])
    close(dw, gw + old, terms=torch.stack([f64(dv).abs().sum() * f64(table).abs().max()]))
    again, more = poison(n, C, dtype=dtype), before.to(dtype)
    run("value_backward", again, more, None, dv, tokens, table, w, *stream, accumulate=accumulate, backend=backend)
    assert torch.equal(again, du)
    assert torch.equal(more, dy)


@each_backend
@each_dtype
def test_softcap_of_logits(backend, dtype):
    skip_unless_served("cap_logits", backend, dtype)
    x = draw(5, 1000, dtype=dtype, scale=20.0)
    x[0, :2] = torch.tensor([1e30, -1e30])
    want = 15 * torch.tanh(f64(x) / 15)
    run("cap_logits", x, cap=15.0, backend=backend)
    close(x, want)
