"""The decision about an update: clip it, or skip it because a value is not finite or far outside its recent history.

z-scores are llm.c's, over the last 128 accepted values with the new one included (so |z| <= sqrt(127)), mended: a
skipped or non-finite value does not enter the window, and the sums are taken afresh, so one NaN cannot poison them.
"""

from __future__ import annotations

import math

from torch import Tensor

from daybreak.kernels import op

WINDOW = 128
STATS = ("loss", "norm", "clip_scale", "skip", "loss_z", "norm_z")  # the layout of `stats`


def z_score(window: list[float], count: int, x: float) -> float:
    """z of x in the window with its oldest value replaced by x; NaN until `count` values fill it."""
    if count < WINDOW or not math.isfinite(x):
        return math.nan
    values = list(window)
    values[count % WINDOW] = x
    mean = math.fsum(values) / WINDOW
    var = math.fsum((v - mean) ** 2 for v in values) / WINDOW
    return (x - mean) / math.sqrt(var) if var > 0.0 else 0.0


@op("stats", "windows", "counts")
def step_guard(
    stats: Tensor, windows: Tensor, counts: Tensor, loss: Tensor, norm: Tensor,
    *, clip: float, max_loss_z: float, max_norm_z: float,
) -> None:  # fmt: skip
    """Decide the step: stats (6,) fp64 as in STATS, from the mean loss and the gradient norm.

    windows (2, 128) fp64 and counts (2,) int64 hold the accepted losses and norms. A limit of 0 switches that test
    off. clip <= 0 switches clipping off. This reference reads the scalars on the host.
    """
    values = (loss.item(), norm.item())
    seen = [int(c) for c in counts.tolist()]
    z = [z_score(windows[i].tolist(), seen[i], values[i]) for i in range(2)]
    finite = all(math.isfinite(x) for x in values)
    limits = (max_loss_z, max_norm_z)
    outlier = any(limit > 0 and math.isfinite(z[i]) and z[i] > limit for i, limit in enumerate(limits))
    skip = not finite or outlier
    if not skip:
        for i, x in enumerate(values):
            windows[i, seen[i] % WINDOW] = x
            counts[i] += 1
    scale = clip / values[1] if 0 < clip < values[1] else 1.0
    for i, x in enumerate((*values, scale, float(skip), *z)):
        stats[i].fill_(x)
