"""The guard's decision in one small program on the device, so that no step waits for the host; see kernels/guard.py."""

from __future__ import annotations

from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.guard import WINDOW

WARPS = 4


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")  # false for NaN as well


@triton.jit
def _z_score(window, count, x, WINDOW: tl.constexpr):
    """z of x in `window` with its oldest value replaced by x; NaN while fewer than WINDOW values are known."""
    lanes = tl.arange(0, WINDOW)
    values = tl.where(lanes == count % WINDOW, x, tl.load(window + lanes))
    mean = tl.sum(values, 0) / WINDOW
    mean += tl.sum(values - mean, 0) / WINDOW  # to the last bit, so that equal values have no variance
    var = tl.sum((values - mean) * (values - mean), 0) / WINDOW
    spread = var > 0.0
    z = tl.where(spread, (x - mean) / tl.sqrt(tl.where(spread, var, 1.0)), 0.0)
    return tl.where((count >= WINDOW) & _finite(x), z, float("nan"))


@triton.jit
def _step_guard_kernel(
    stats, windows, counts, loss, norm,
    CLIP: tl.constexpr, MAX_LOSS_Z: tl.constexpr, MAX_NORM_Z: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The limits are constants of the compilation, because a float argument would arrive rounded to fp32."""
    x, y = tl.load(loss).to(tl.float64), tl.load(norm).to(tl.float64)
    seen_x, seen_y = tl.load(counts), tl.load(counts + 1)
    zx = _z_score(windows, seen_x, x, WINDOW)
    zy = _z_score(windows + WINDOW, seen_y, y, WINDOW)
    keep = _finite(x) & _finite(y)
    if MAX_LOSS_Z > 0:  # NaN, no score yet, is not above a limit
        keep = keep & ~(zx > tl.full((), MAX_LOSS_Z, tl.float64))
    if MAX_NORM_Z > 0:
        keep = keep & ~(zy > tl.full((), MAX_NORM_Z, tl.float64))
    tl.store(windows + seen_x % WINDOW, x, mask=keep)
    tl.store(windows + WINDOW + seen_y % WINDOW, y, mask=keep)
    tl.store(counts, seen_x + 1, mask=keep)
    tl.store(counts + 1, seen_y + 1, mask=keep)
    scale = tl.full((), 1.0, tl.float64)
    if CLIP > 0:
        limit = tl.full((), CLIP, tl.float64)
        scale = tl.where(y > limit, limit / y, scale)
    tl.store(stats, x)
    tl.store(stats + 1, y)
    tl.store(stats + 2, scale)
    tl.store(stats + 3, tl.where(keep, 0.0, 1.0))
    tl.store(stats + 4, zx)
    tl.store(stats + 5, zy)


@backend("triton")
def step_guard(
    stats: Tensor, windows: Tensor, counts: Tensor, loss: Tensor, norm: Tensor,
    *, clip: float, max_loss_z: float, max_norm_z: float,
) -> None:  # fmt: skip
    """stats (6) fp64, windows (2, 128) fp64 and counts (2) int64 from the step's mean loss and gradient norm (0-d)."""
    _step_guard_kernel[(1,)](
        stats, windows, counts, loss, norm,
        CLIP=clip, MAX_LOSS_Z=max_loss_z, MAX_NORM_Z=max_norm_z, WINDOW=WINDOW, num_warps=WARPS,
    )  # fmt: skip
