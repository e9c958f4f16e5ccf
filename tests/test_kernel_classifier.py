"""Cross-entropy with its gradient in place, and the loss sum, against formulas in fp64."""

from __future__ import annotations

import math

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import (
    DEVICE,
    F64,
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
from torch.nn.functional import cross_entropy

from daybreak.kernels import acc_dtype
from daybreak.kernels.cuda import classifier as cuda_classifier

# The Triton kernel takes 4096 (fp32) or 8192 columns at a time: less than one tile, whole tiles without and with
# padding behind them, tiles and a rest; and in one case more rows than programs.
SHAPES = [(1, 1), (3, 63), (5, 1000), (150, 1023), (3, 4096), (3, 8150), (3, 8192), (3, 9000), (2, 17000)]
BF16 = torch.bfloat16


def some_targets(n, V):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)).to(DEVICE)


def expected(logits, targets, scale, V):
    """Losses and gradient in fp64."""
    X = f64(logits[:, :V]).requires_grad_()
    want = cross_entropy(X, targets, ignore_index=-1, reduction="none")
    return want.detach(), torch.autograd.grad(want.sum() * f64(scale), X)[0]


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "V"), SHAPES)
@pytest.mark.parametrize("backward", [False, True])
def test_classifier(backend, dtype, n, V, backward, monkeypatch):
    skip_unless_served("classifier", backend, dtype)
    monkeypatch.setattr(cuda_classifier, "PROGRAMS", 64)
    Vp = (V + 127) // 128 * 128
    logits = draw(n, Vp, dtype=dtype, scale=4)
    logits[0, :V] *= 200  # exp of these overflows unless the row's largest is subtracted
    for row, far in enumerate((3e3, 1e6, 1e9), 1):  # nothing may be lost to the largest's own rounding
        logits[row : row + 1, :V] += far
    logits[:, V:] = math.nan
    targets = some_targets(n, V)
    targets[-1] = V - 1
    targets[n // 2] = -1
    scale = torch.tensor(1 / 7, dtype=acc_dtype(dtype), device=DEVICE)
    want, gradient = expected(logits, targets, scale, V)
    losses = poison(n, dtype=acc_dtype(dtype))
    run("classifier", losses, logits, targets, scale, V=V, backward=backward, backend=backend)
    close(losses, want)
    assert losses[n // 2] == 0
    if backward:
        close(logits[:, :V], gradient)
        assert (logits[n // 2] == 0).all()
        assert (logits[:, V:] == 0).all()


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_loss_of_its_row_alone(backend, bad):
    """The guard sees it there. Everything else is as if the row were another one."""
    logits, targets = draw(3, 128, dtype=torch.float32), some_targets(3, 100)
    scale = torch.tensor(0.5, dtype=F64, device=DEVICE)
    want, _ = expected(logits, targets, scale, 100)
    logits[1, 7] = bad
    losses = poison(3, dtype=torch.float32)
    run("classifier", losses, logits, targets, scale, V=100, backward=True, backend=backend)
    assert not torch.isfinite(losses[1])
    close(losses[::2], want[::2])
    assert torch.isfinite(logits[::2]).all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_the_scale_may_have_either_dtype(backend, dtype):
    logits, targets = draw(3, 128, dtype=BF16), some_targets(3, 128)
    scale = torch.tensor(1 / 3, dtype=dtype, device=DEVICE)
    _, gradient = expected(logits, targets, scale, 128)
    losses = poison(3, dtype=torch.float32)
    run("classifier", losses, logits, targets, scale, V=128, backward=True, backend=backend)
    close(logits, gradient)


@each_backend
@either
@pytest.mark.parametrize("n", [1, 1023, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_loss_sum(backend, accumulate, n, dtype):
    losses, scale = draw(n, dtype=dtype), torch.tensor(1 / 7, dtype=dtype, device=DEVICE)
    total, total0 = output(dtype=F64, accumulate=accumulate)
    run("loss_sum", total, losses, scale, accumulate=accumulate, backend=backend)
    close(total, total0 + f64(losses).sum() * f64(scale))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_beyond_2_to_the_31():
    """Rows whose first element lies beyond 2^31: 4.3 GB of logits. Two runs give the same bits."""
    V, Vp = 50257, 50304
    n = (1 << 31) // Vp + 100
    targets, scale = some_targets(n, V), torch.tensor(1 / n, dtype=F64, device=DEVICE)
    far = torch.tensor([0, 1, n // 2, n - 99, n - 2, n - 1], device=DEVICE)
    results = []
    for _ in range(2):
        logits = torch.empty(n, Vp, dtype=BF16, device=DEVICE)
        logits.normal_(std=3, generator=torch.Generator(DEVICE).manual_seed(0))
        want, gradient = expected(logits[far], targets[far], scale, V)
        losses = poison(n, dtype=torch.float32)
        run("classifier", losses, logits, targets, scale, V=V, backward=True, backend="triton")
        close(losses[far], want)
        close(logits[far, :V], gradient)
        assert (logits[:, V:] == 0).all()
        results.append((losses, logits.view(torch.int16)[-5000:].clone()))
        del logits
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "V"), [(1, 1), (3, 63), (5, 1000), (3, 4096), (3, 8150), (3, 9000)])
@pytest.mark.parametrize("backward", [False, True])
def test_classifier_with_a_soft_cap(backend, dtype, n, V, backward):
    """Losses and gradients of c tanh(z / c), also of logits far beyond c; NaN in the padding reaches nothing."""
    skip_unless_served("classifier", backend, dtype)
    Vp = (V + 127) // 128 * 128
    logits = draw(n, Vp, dtype=dtype, scale=12)
    logits[0, :V] *= 1e6
    logits[:, V:] = math.nan
    targets = some_targets(n, V)
    targets[n // 2] = -1
    scale = torch.tensor(1 / 7, dtype=acc_dtype(dtype), device=DEVICE)
    X = f64(logits[:, :V]).requires_grad_()
    want = cross_entropy(15 * torch.tanh(X / 15), targets, ignore_index=-1, reduction="none")
    gradient = torch.autograd.grad(want.sum() * f64(scale), X)[0]
    losses = poison(n, dtype=acc_dtype(dtype))
    run("classifier", losses, logits, targets, scale, V=V, backward=backward, softcap=15.0, backend=backend)
    close(losses, want.detach(), terms=torch.tensor([15.0], dtype=F64, device=DEVICE))
    if backward:
        close(logits[:, :V], gradient)
        assert (logits[:, V:] == 0).all()
        assert (logits[n // 2] == 0).all()


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "V"), [(1, 1), (3, 63), (5, 1000), (150, 1023), (3, 4096), (3, 8150), (3, 9000)])
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_classifier_with_a_z_loss(backend, dtype, n, V, cap, monkeypatch):
    """The gradient is that of the loss and w logsumexp(z)^2, of either sign; the losses are those without it."""
    skip_unless_served("classifier", backend, dtype)
    monkeypatch.setattr(cuda_classifier, "PROGRAMS", 64)
    Vp, weight = (V + 127) // 128 * 128, 0.01
    logits = draw(n, Vp, dtype=dtype, scale=4)
    for row, far in enumerate((300.0, -300.0)):
        logits[row : row + 1, :V] += far
    logits[:, V:] = math.nan
    before, targets = logits.clone(), some_targets(n, V)
    targets[-1] = V - 1
    targets[n // 2] = -1
    scale = torch.tensor(1 / 7, dtype=acc_dtype(dtype), device=DEVICE)
    X = f64(logits[:, :V]).requires_grad_()
    capped = cap * torch.tanh(X / cap) if cap else X
    want = cross_entropy(capped, targets, ignore_index=-1, reduction="none")
    more = torch.where(targets < 0, 0.0, weight * torch.logsumexp(capped, 1) ** 2)
    gradient = torch.autograd.grad((want + more).sum() * f64(scale), X)[0]
    losses, plain = poison(n, dtype=acc_dtype(dtype)), poison(n, dtype=acc_dtype(dtype))
    how = {"V": V, "softcap": cap, "backend": backend}
    run("classifier", losses, logits, targets, scale, backward=True, z_loss=weight, **how)
    close(logits[:, :V], gradient)
    assert (logits[:, V:] == 0).all()
    assert (logits[n // 2] == 0).all()
    run("classifier", plain, before.clone(), targets, scale, backward=True, **how)
    assert torch.equal(losses, plain)
    run("classifier", plain.fill_(math.nan), before, targets, scale, backward=False, z_loss=weight, **how)
    assert torch.equal(losses, plain)
