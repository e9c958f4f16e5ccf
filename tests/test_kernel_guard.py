"""Clipping and skipping decisions, against formulas in fp64."""

from __future__ import annotations

import math

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import DEVICE, F64, each_backend, poison, run

from daybreak.kernels.guard import WINDOW


class Guard:
    """The guard's state, fed one (loss, norm) after another; returns stats as a list."""

    def __init__(self, backend: str, max_loss_z: float = 0.0, max_norm_z: float = 0.0) -> None:
        self.backend = backend
        self.windows = torch.zeros(2, WINDOW, dtype=F64, device=DEVICE)
        self.counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        self.limits = {"clip": 1.0, "max_loss_z": max_loss_z, "max_norm_z": max_norm_z}

    def __call__(self, loss: float, norm: float) -> list[float]:
        stats, values = poison(6, dtype=F64), torch.tensor([loss, norm], dtype=F64, device=DEVICE)
        run(
            "step_guard", stats, self.windows, self.counts, values[0], values[1],
            backend=self.backend, **self.limits,
        )  # fmt: skip
        return stats.tolist()

    def fill(self) -> None:
        """The state after 128 alternating values of -1 and 1."""
        self.windows.copy_(torch.tensor([-1.0, 1.0], dtype=F64).repeat(2, WINDOW // 2))
        self.counts.fill_(WINDOW)


@each_backend
def test_guard_clips_only_above_the_limit(backend):
    guard = Guard(backend)
    assert guard(3.0, 4.0)[:4] == [3.0, 4.0, 0.25, 0.0]
    assert guard(3.0, 1.25)[2] == 0.8
    assert guard(3.0, 0.5)[2] == 1.0
    guard.limits["clip"] = 0.1  # no number of fp32
    assert guard(3.0, 4.0)[2] == 0.1 / 4.0
    guard.limits["clip"] = 0.0
    assert guard(3.0, 4.0)[2] == 1.0


@each_backend
def test_guard_z_scores_match_llmc(backend):
    """128 alternating +-1 give no score; then 10 and 0 give what llm.c's detector prints."""
    guard = Guard(backend)
    for i in range(WINDOW):
        assert all(math.isnan(z) for z in guard(-((-1.0) ** i), -2 * (-1.0) ** i)[4:])
    assert guard(10.0, 20.0)[4:] == pytest.approx([7.460189833266, 7.460189833266], rel=1e-12)
    assert guard(0.0, 0.0)[4:] == pytest.approx([-0.058896941597, -0.058896941597], rel=1e-10)
    constant = Guard(backend)
    constant.windows.fill_(0.1)
    constant.counts.fill_(WINDOW)
    assert constant(0.1, 0.1)[4:] == [0.0, 0.0]


@each_backend
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)])
def test_guard_skips_what_is_not_finite_and_forgets_it(backend, loss, norm):
    guard = Guard(backend, max_loss_z=5, max_norm_z=5)
    guard.fill()
    before = guard.windows.clone(), guard.counts.clone()
    assert guard(loss, norm)[3] == 1.0
    assert torch.equal(guard.windows, before[0])
    assert torch.equal(guard.counts, before[1])
    assert guard(10.0, 0.0)[4] == pytest.approx(7.460189833266, rel=1e-12)


@each_backend
@pytest.mark.parametrize("limits", [{"max_loss_z": 5}, {"max_norm_z": 5}])
def test_guard_skips_outliers_and_keeps_them_out_of_the_window(backend, limits):
    guard = Guard(backend, **limits)
    for i in range(3):
        assert guard(10.0 ** (i % 2), 10.0 ** (i % 2))[3] == 0.0  # no score yet, so nothing is an outlier
    guard.fill()
    spike = (10.0, 0.0) if "max_loss_z" in limits else (0.0, 10.0)
    for _ in range(2):  # the same spike is as much an outlier the second time
        assert max(guard(*spike)[4:]) == pytest.approx(7.460189833266, rel=1e-12)
        assert guard(*spike)[3] == 1.0
    assert guard(*reversed(spike))[3] == 0.0  # only the limit that is set applies


def test_both_backends_decide_alike():
    """A stream of losses and norms with spikes and with values that are not finite, past the end of the window."""
    guards = [Guard(backend, max_loss_z=3.3, max_norm_z=3.7) for backend in ("torch", "triton")]
    stream = torch.randn(40, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) + 3
    stream[5, 0], stream[9, 1], stream[20, 0], stream[30, 1] = 50.0, math.inf, math.nan, 60.0
    for guard in guards:
        guard.fill()
        guard.windows.add_(3.0)
        guard.counts[0] -= 20  # the losses have no score for the first 20 steps
    for loss, norm in stream.tolist():
        a, b = (guard(loss, norm) for guard in guards)
        assert b[:4] == pytest.approx(a[:4], rel=0, abs=0, nan_ok=True)
        assert b[4:] == pytest.approx(a[4:], rel=1e-12, abs=1e-12, nan_ok=True)
    assert torch.equal(guards[0].windows, guards[1].windows)
    assert torch.equal(guards[0].counts, guards[1].counts)
