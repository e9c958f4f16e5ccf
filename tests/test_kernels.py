"""Every operation of daybreak/kernels against its formula in fp64, in every dtype it claims, on awkward shapes.

Each call gets outputs and scratch full of NaN, scratch of exactly the size it announced, and must leave its inputs as
they were. bf16 results are held to the roundings they are allowed: usually one, of the exact value.
"""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from oracle import AdamW, attention, gelu, layer_norm
from torch import Tensor

import daybreak.kernels.attention as attention_file
import daybreak.kernels.optimizer as optimizer_file
from daybreak.kernels import Kernels, acc_dtype, all_ops, temps_bytes
from daybreak.kernels.guard import WINDOW

torch.set_num_threads(1)
F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ROWS = [(1, 63), (3, 1000), (5, 1023), (300, 1023)]  # the last is cut into chunks
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
each_shape = pytest.mark.parametrize(("rows", "columns"), ROWS)
either = pytest.mark.parametrize("accumulate", [False, True], ids=["write", "accumulate"])


def run(name: str, *args, **kwargs) -> None:
    """Call an operation with poisoned scratch of its announced size; check that it changes nothing but its outputs."""
    operation = all_ops()[name]
    size = temps_bytes(operation.temps(*args, **kwargs)) if operation.temps else 0
    scratch = torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN in every floating dtype
    given = dict(zip(inspect.signature(operation.impls["torch"]).parameters, args, strict=False)) | kwargs
    outputs = [given[w] for w in operation.writes if w in given]
    shared = {x.untyped_storage().data_ptr() for x in outputs}
    inputs = [x for x in given.values() if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in shared]
    before = [x.clone() for x in inputs]
    assert getattr(Kernels(scratch), name)(*args, **kwargs) is None
    for x, copy in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=g, dtype=F64)).to(dtype)


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def f64(x: Tensor) -> Tensor:
    """A copy in fp64: never the tensor itself, which a call may overwrite."""
    return x.detach().to(F64, copy=True)


def close(got: Tensor, want: Tensor, also_rounded: Tensor | None = None) -> None:
    """`got` is the fp64 `want` but for the summation error of its arithmetic and one rounding to its dtype.

    `also_rounded`: an addend that was itself rounded to that dtype before it was added.
    """
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    arithmetic = {F64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-5}[got.dtype]
    half_ulp = 2.0**-8 if got.dtype == torch.bfloat16 else 0.0
    rounded = want.abs() if also_rounded is None else want.abs() + also_rounded.abs()
    limit = arithmetic * want.abs().amax().clamp(min=1e-30) + half_ulp * rounded
    excess = ((f64(got) - want).abs() / limit).amax().item()
    assert excess <= 1, f"{excess:.2f} times the tolerance"


def output(*shape: int, dtype: torch.dtype, accumulate: bool) -> tuple[Tensor, Tensor]:
    """An output that must be overwritten (NaN), or one to add to; and the fp64 value it contributes."""
    out = draw(*shape, dtype=dtype, seed=99) if accumulate else poison(*shape, dtype=dtype)
    return out, f64(out) if accumulate else torch.zeros(shape, dtype=F64)


def test_every_operation_is_tested():
    assert set(re.findall(r'run\(\s*"(\w+)"', Path(__file__).read_text())) == set(all_ops())


# --- matmul


@each_dtype
@pytest.mark.parametrize(("n", "I", "O"), [(1, 63, 1), (5, 1000, 63), (7, 63, 1023)])
def test_matmul(dtype, n, I, O):
    x, w, dout = draw(n, I, dtype=dtype), draw(O, I, dtype=dtype), draw(n, O, dtype=dtype)
    b = draw(O, dtype=dtype)
    X, W, D = f64(x), f64(w), f64(dout)
    out, dx = poison(n, O, dtype=dtype), poison(n, I, dtype=dtype)
    run("matmul_forward", out, x, w)
    close(out, X @ W.T)
    out.fill_(math.nan)
    run("matmul_forward", out, x, w, b)
    close(out, X @ W.T + f64(b))
    run("matmul_backward_input", dx, dout, w)
    close(dx, D @ W)


@each_dtype
@either
@pytest.mark.parametrize(("n", "I", "O"), [(1, 63, 1), (63, 1000, 5), (1023, 63, 7)])
def test_weight_and_bias_gradients(dtype, accumulate, n, I, O):
    x, dout = draw(n, I, dtype=dtype), draw(n, O, dtype=dtype)
    dw, dw0 = output(O, I, dtype=dtype, accumulate=accumulate)
    db, db0 = output(O, dtype=dtype, accumulate=accumulate)
    product, total = f64(dout).T @ f64(x), f64(dout).sum(0)
    run("matmul_backward_weight", dw, dout, x, accumulate=accumulate)
    run("bias_backward", db, dout, accumulate=accumulate)
    close(dw, dw0 + product)
    close(db, db0 + total, also_rounded=total if accumulate else None)


# --- gelu


@each_dtype
@each_shape
def test_gelu(dtype, rows, columns):
    x, dout = draw(rows, columns, dtype=dtype, scale=3), draw(rows, columns, dtype=dtype, seed=1)
    x[0, :4] = torch.tensor([0.0, -60.0, 60.0, -1e-3])
    X = f64(x).requires_grad_()
    y = gelu(X)
    out, dx = poison(rows, columns, dtype=dtype), poison(rows, columns, dtype=dtype)
    run("gelu_forward", out, x)
    close(out, y.detach())
    want = torch.autograd.grad(y, X, f64(dout))[0]
    run("gelu_backward", dx, dout, x)
    close(dx, want)
    run("gelu_backward", dout, dout, x)
    assert torch.equal(dout, dx)


# --- LayerNorm


@each_dtype
@each_shape
def test_layernorm_forward(dtype, rows, columns):
    x, delta = draw(rows, columns, dtype=dtype) + 3, draw(rows, columns, dtype=dtype, seed=1)
    w, b = draw(columns, dtype=dtype, seed=2), draw(columns, dtype=dtype, seed=3)
    out, residual = poison(rows, columns, dtype=dtype), poison(rows, columns, dtype=dtype)
    mean, rstd = poison(rows, dtype=acc_dtype(dtype)), poison(rows, dtype=acc_dtype(dtype))
    run("layernorm_forward", out, mean, rstd, x, w, b)
    close(out, layer_norm(f64(x), f64(w), f64(b)))
    close(mean, f64(x).mean(1))
    close(rstd, (f64(x).var(1, correction=0) + 1e-5).rsqrt())
    for t in (out, mean, rstd):
        t.fill_(math.nan)
    run("residual_layernorm_forward", residual, out, mean, rstd, x, delta, w, b)
    close(residual, f64(x) + f64(delta))
    close(out, layer_norm(f64(residual), f64(w), f64(b)))
    close(mean, f64(residual).mean(1))
    close(rstd, (f64(residual).var(1, correction=0) + 1e-5).rsqrt())


@each_dtype
@each_shape
@either
@pytest.mark.parametrize("accumulate_dx", [False, True])
def test_layernorm_backward(dtype, rows, columns, accumulate, accumulate_dx):
    x, dout = draw(rows, columns, dtype=dtype) + 3, draw(rows, columns, dtype=dtype, seed=1)
    w, b = draw(columns, dtype=dtype, seed=2), torch.zeros(columns, dtype=dtype)
    X, W, B = (f64(t).requires_grad_() for t in (x, w, b))
    gx, gw, gb = torch.autograd.grad(layer_norm(X, W, B), (X, W, B), f64(dout))
    mean = f64(x).mean(1).to(acc_dtype(dtype))
    rstd = (f64(x).var(1, correction=0) + 1e-5).rsqrt().to(acc_dtype(dtype))
    dx, dx0 = output(rows, columns, dtype=dtype, accumulate=accumulate_dx)
    dw, dw0 = output(columns, dtype=dtype, accumulate=accumulate)
    db, db0 = output(columns, dtype=dtype, accumulate=accumulate)
    run("layernorm_backward", dx, dw, db, dout, x, mean, rstd, w, accumulate_dx=accumulate_dx, accumulate=accumulate)
    close(dx, dx0 + gx)
    close(dw, dw0 + gw)
    close(db, db0 + gb)


# --- attention


def packed(x: Tensor, NH: int) -> list[Tensor]:
    """Q, K and V as (B, T, NH, HS) views of packed (B, T, 3C)."""
    B, T, C3 = x.shape
    return [part.view(B, T, NH, C3 // 3 // NH) for part in x.split(C3 // 3, dim=2)]


def attention_formulas(qkv: Tensor, out: Tensor, dout: Tensor, NH: int) -> tuple[Tensor, Tensor]:
    """lse (B, NH, T) and d_qkv (B, T, 3C) in fp64, the latter with the row sums of dout * out as given."""
    q, k, v = (x.transpose(1, 2) for x in packed(f64(qkv), NH))
    g, o = (f64(x).transpose(1, 2) for x in (dout, out))
    scale = q.shape[-1] ** -0.5
    S = (scale * q @ k.transpose(2, 3)).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf)
    P = S.softmax(-1)
    dS = P * (g @ v.transpose(2, 3) - (g * o).sum(-1, keepdim=True)) * scale
    grads = (dS @ k, dS.transpose(2, 3) @ q, P.transpose(2, 3) @ g)
    return S.logsumexp(-1), torch.cat([x.transpose(1, 2).flatten(2) for x in grads], 2)


@each_dtype
@pytest.mark.parametrize(("B", "T", "NH", "HS"), [(1, 1, 1, 8), (3, 7, 3, 5), (2, 128, 1, 16), (3, 300, 2, 8)])
@pytest.mark.parametrize("rows", [1 << 12, 512], ids=["whole batch", "batch cut"])
def test_attention(monkeypatch, dtype, B, T, NH, HS, rows):
    monkeypatch.setattr(attention_file, "ROWS", rows)
    C = NH * HS
    qkv, dout = draw(B, T, 3 * C, dtype=dtype), draw(B, T, NH, HS, dtype=dtype, seed=1)
    X = f64(qkv).requires_grad_()
    y = attention(X, NH)
    out, lse = poison(B, T, C, dtype=dtype).view(B, T, NH, HS), poison(B, NH, T, dtype=acc_dtype(dtype))
    run("attention_forward", out, lse, *packed(qkv, NH), scale=HS**-0.5)
    close(out, y.detach().view(B, T, NH, HS))
    want_lse, want = attention_formulas(qkv, out, dout, NH)
    close(lse, want_lse)
    dqkv = poison(B, T, 3 * C, dtype=dtype)
    run("attention_backward", *packed(dqkv, NH), dout, *packed(qkv, NH), out, lse, scale=HS**-0.5)
    close(dqkv, want)
    if dtype != torch.bfloat16:
        exact = torch.autograd.grad(y, X, f64(dout).view(B, T, C))[0]
        close(dqkv, exact)


# --- classifier


@each_dtype
@pytest.mark.parametrize(("n", "V"), [(1, 1), (3, 63), (5, 1000), (150, 1023)])
@pytest.mark.parametrize("backward", [False, True])
def test_classifier(dtype, n, V, backward):
    Vp = (V + 127) // 128 * 128
    logits = draw(n, Vp, dtype=dtype, scale=4)
    logits[0, :V] *= 200  # exp of these overflows unless the row's largest is subtracted
    X = f64(logits[:, :V]).requires_grad_()
    logits[:, V:] = math.nan
    targets = torch.randint(V, (n,), generator=torch.Generator().manual_seed(n))
    targets[n // 2] = -1
    scale = torch.tensor(1 / 7, dtype=acc_dtype(dtype))
    want = torch.nn.functional.cross_entropy(X, targets, ignore_index=-1, reduction="none")
    losses = poison(n, dtype=acc_dtype(dtype))
    run("classifier", losses, logits, targets, scale, V=V, backward=backward)
    close(losses, want.detach())
    assert losses[n // 2] == 0
    if backward:
        close(logits[:, :V], torch.autograd.grad(want.sum() * f64(scale), X)[0])
        assert (logits[n // 2] == 0).all()
        assert (logits[:, V:] == 0).all()


@either
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_loss_sum(accumulate, dtype):
    losses, scale = draw(1023, dtype=dtype), torch.tensor(1 / 7, dtype=dtype)
    total, total0 = output(dtype=F64, accumulate=accumulate)
    run("loss_sum", total, losses, scale, accumulate=accumulate)
    close(total, total0 + f64(losses).sum() * f64(scale))


# --- embedding


@each_dtype
@either
@pytest.mark.parametrize(("B", "T", "C", "V"), [(1, 1, 63, 1), (3, 7, 1000, 5), (4, 33, 63, 40)])
def test_embedding(dtype, accumulate, B, T, C, V):
    wte, wpe = draw(V, C, dtype=dtype), draw(T + 2, C, dtype=dtype)
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(T))
    tokens[0] = V - 1  # one token many times over
    out = poison(B * T, C, dtype=dtype)
    run("embedding_forward", out, tokens, wte, wpe)
    close(out, (f64(wte)[tokens] + f64(wpe)[:T]).view(B * T, C))

    dout = draw(B * T, C, dtype=dtype, seed=1)
    dwte, dwte0 = output(V, C, dtype=dtype, accumulate=True)
    dwpe, dwpe0 = output(T + 2, C, dtype=dtype, accumulate=accumulate)
    run("embedding_backward", dwte, dwpe, dout, tokens, accumulate=accumulate)
    D = f64(dout).view(B, T, C)
    close(dwte, dwte0.index_add(0, tokens.flatten(), D.flatten(0, 1)))
    close(dwpe[:T], dwpe0[:T] + D.sum(0), also_rounded=D.sum(0) if accumulate else None)
    assert torch.equal(f64(dwpe[T:]), dwpe0[T:])


# --- optimizer and guard


@each_dtype
@pytest.mark.parametrize("n", [1, 63, 1000, 1023])
def test_global_norm(monkeypatch, dtype, n):
    monkeypatch.setattr(optimizer_file, "FLAT_CHUNK", 100)
    grads, norm = draw(n, dtype=dtype), poison(dtype=F64)
    run("global_norm", norm, grads)
    assert norm.item() == pytest.approx(f64(grads).norm().item(), rel=1e-14 if dtype == F64 else 1e-6)
    grads[-1] = math.inf
    run("global_norm", norm, grads)
    assert not math.isfinite(norm.item())


@each_dtype
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_update(monkeypatch, dtype, weight_decay):
    monkeypatch.setattr(optimizer_file, "FLAT_CHUNK", 100)
    acc = acc_dtype(dtype)
    masters = draw(1023, dtype=acc)
    weights = masters if dtype == acc else poison(1023, dtype=dtype)
    m, v = torch.zeros_like(masters), torch.zeros_like(masters)
    oracle = AdamW({"p": f64(masters).view(-1, 1)}, weight_decay=weight_decay, clip=2.0)  # 2-D, so it decays
    for step in range(5):
        grads = draw(1023, dtype=dtype, seed=step)
        lr, scale = 1e-2 / (step + 1), 2.0 / f64(grads).norm()
        stats = torch.tensor([0, 0, scale, 0, 0, 0], dtype=F64)
        hyper = torch.tensor([lr, step + 1], dtype=F64)
        options = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": weight_decay}
        run("adamw_update", weights, masters, m, v, grads, stats, hyper, **options)
        oracle.step({"p": f64(grads).view(-1, 1)}, lr, step)
        for got, want in ((masters, oracle.params["p"]), (m, oracle.m["p"]), (v, oracle.v["p"])):
            close(got, want.flatten())
        assert torch.equal(weights, masters.to(dtype))
    before = [x.clone() for x in (weights, masters, m, v)]
    stats[3] = 1
    run("adamw_update", weights, masters, m, v, torch.full_like(grads, math.nan), stats, hyper, **options)
    assert all(torch.equal(x, y) for x, y in zip((weights, masters, m, v), before, strict=True))


class Guard:
    """The guard's state, fed one (loss, norm) after another; returns stats as a list."""

    def __init__(self, max_loss_z: float = 0.0, max_norm_z: float = 0.0) -> None:
        self.windows = torch.zeros(2, WINDOW, dtype=torch.float64)
        self.counts = torch.zeros(2, dtype=torch.int64)
        self.limits = {"clip": 1.0, "max_loss_z": max_loss_z, "max_norm_z": max_norm_z}

    def __call__(self, loss: float, norm: float) -> list[float]:
        stats, values = poison(6, dtype=F64), torch.tensor([loss, norm], dtype=F64)
        run("step_guard", stats, self.windows, self.counts, values[0], values[1], **self.limits)
        return stats.tolist()


def test_guard_clips_only_above_the_limit():
    guard = Guard()
    assert guard(3.0, 4.0)[:4] == [3.0, 4.0, 0.25, 0.0]
    assert guard(3.0, 1.25)[2] == 0.8
    assert guard(3.0, 0.5)[2] == 1.0
    guard.limits["clip"] = 0.0
    assert guard(3.0, 4.0)[2] == 1.0


def test_guard_z_scores_match_llmc():
    """128 alternating +-1 give no score; then 10 and 0 give what llm.c's detector prints."""
    guard = Guard()
    for i in range(WINDOW):
        assert all(math.isnan(z) for z in guard(-((-1.0) ** i), -2 * (-1.0) ** i)[4:])
    assert guard(10.0, 20.0)[4:] == pytest.approx([7.460189833266, 7.460189833266], rel=1e-12)
    assert guard(0.0, 0.0)[4:] == pytest.approx([-0.058896941597, -0.058896941597], rel=1e-10)
    constant = Guard()
    assert [constant(5.0, 5.0)[4:] for _ in range(WINDOW + 1)][-1] == [0.0, 0.0]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)])
def test_guard_skips_what_is_not_finite_and_forgets_it(loss, norm):
    guard = Guard(max_loss_z=5, max_norm_z=5)
    for i in range(WINDOW):
        guard(-((-1.0) ** i), -((-1.0) ** i))
    before = guard.windows.clone(), guard.counts.clone()
    assert guard(loss, norm)[3] == 1.0
    assert torch.equal(guard.windows, before[0])
    assert torch.equal(guard.counts, before[1])
    assert guard(10.0, 0.0)[4] == pytest.approx(7.460189833266, rel=1e-12)


@pytest.mark.parametrize("limits", [{"max_loss_z": 5}, {"max_norm_z": 5}])
def test_guard_skips_outliers_and_keeps_them_out_of_the_window(limits):
    guard = Guard(**limits)
    for i in range(WINDOW):
        assert guard(-((-1.0) ** i), -((-1.0) ** i))[3] == 0.0  # no score yet, so nothing is an outlier
    spike = (10.0, 0.0) if "max_loss_z" in limits else (0.0, 10.0)
    for _ in range(2):  # the same spike is as much an outlier the second time
        assert max(guard(*spike)[4:]) == pytest.approx(7.460189833266, rel=1e-12)
        assert guard(*spike)[3] == 1.0
    assert guard(*reversed(spike))[3] == 0.0  # only the limit that is set applies
