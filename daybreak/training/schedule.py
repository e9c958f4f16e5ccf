"""Pure functions of the step: learning-rate schedules, llm.c's four and one more; and windows of data left out."""

from __future__ import annotations

import math

from daybreak.config import Config
from daybreak.config_keys import OptimConfig, ScheduleConfig


def learning_rate(step: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of update number step + 1. Beyond the horizon it stays at its end value.

    Linear warmup over `schedule.warmup` steps (all but `constant`), then: cosine and linear fall to
    final_frac * lr at `optim.horizon`; wsd (warmup, stable, decay; Hu et al. 2024, with the 1 - sqrt decay of
    Hägele et al. 2024) stays at lr until wsd_frac of the horizon; wsd-linear does too, and then falls in a line, as
    nanochat's; constant never changes.
    """
    peak, low, W, N = optim.lr, schedule.final_frac * optim.lr, schedule.warmup, optim.horizon
    if schedule.name == "constant":
        return peak
    if step < W:
        return peak * (step + 1) / W
    start = schedule.decays_from(N)
    if step < start:
        return peak
    done = 1.0 if start >= N else min(1.0, (step - start) / (N - start))  # of the way down
    if schedule.name == "wsd":
        return low + (1.0 - math.sqrt(done)) * (peak - low)
    if schedule.name in ("linear", "wsd-linear"):
        return peak - done * (peak - low)
    assert schedule.name == "cosine", schedule.name
    return low + 0.5 * (1.0 + math.cos(math.pi * done)) * (peak - low)


def left_out(config: Config, start: int, stop: int) -> int:
    """Samples that data.skip leaves out before the updates after the first `start` up to the first `stop`.

    A window A-B leaves out what updates A to B would have taken. So its steps are those of the run's own log, whatever
    earlier windows left out."""
    windows = config.data.windows
    return sum(config.tokens_between(first - 1, last) // config.T for first, last in windows if start < first <= stop)
