"""Learning-rate schedules against llm.c's values, and what happens at and beyond their ends."""

from __future__ import annotations

import pytest

from daybreak.config_keys import OptimConfig, ScheduleConfig
from daybreak.training.schedule import learning_rate

# (schedule, final fraction, step, value) printed by llm.c for lr 6e-4, 700 warmup steps, 18,865 steps.
GOLDEN = [
    ("cosine", 0.0, 0, 8.57142879e-07),
    ("cosine", 0.0, 349, 3.0e-04),
    ("cosine", 0.0, 700, 6.0e-04),
    ("cosine", 0.0, 5000, 5.20795758e-04),
    ("cosine", 0.0, 9782, 3.00025975e-04),
    ("cosine", 0.0, 18000, 3.35075879e-06),
    ("linear", 0.1, 5000, 4.72171756e-04),
    ("linear", 0.1, 18864, 6.00297353e-05),
    ("wsd", 0.0, 15092, 6.0e-04),
    ("wsd", 0.0, 18000, 7.32494154e-05),
    ("constant", 0.0, 0, 6.0e-04),
    ("constant", 0.0, 18864, 6.0e-04),
]


@pytest.mark.parametrize(("name", "final", "step", "value"), GOLDEN)
def test_golden(name: str, final: float, step: int, value: float) -> None:
    optim = OptimConfig(lr=6e-4, horizon=18865)
    # llm.c computes in fp32
    lr = learning_rate(step, optim, ScheduleConfig(name=name, warmup=700, final_frac=final))
    assert lr == pytest.approx(value, rel=2e-6, abs=6e-11)


def test_the_last_steps_of_cosine_and_wsd() -> None:
    # llm.c computes 1 - sqrt(x) and 1 + cos(x) in fp32, next to 1: it can be off by 2^-24 of the peak.
    optim = OptimConfig(lr=6e-4, horizon=18865)
    cosine = learning_rate(18864, optim, ScheduleConfig(name="cosine", warmup=700, final_frac=0.0))
    assert cosine == pytest.approx(6e-4 * (3.141592653589793 / 18165) ** 2 / 4, rel=1e-6)
    wsd = learning_rate(18864, optim, ScheduleConfig(name="wsd", warmup=700, final_frac=0.0))
    assert wsd == pytest.approx(7.95364414e-08, abs=6e-4 * 2**-24)


def test_wsd_linear_is_nanochats() -> None:
    """Values of its get_lr_multiplier for 50 steps, 40 of them warmup or not: a decay over the last 65 % to 5 %."""
    schedule = ScheduleConfig(name="wsd-linear", warmup=4, final_frac=0.05, wsd_frac=0.35)
    want = {0: 0.25, 3: 1.0, 17: 1.0, 18: 1.0, 19: 0.9703125, 34: 0.525, 49: 0.0796875, 50: 0.05}
    optim = OptimConfig(lr=1.0, horizon=50)
    assert {step: learning_rate(step, optim, schedule) for step in want} == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "wsd-linear"])
def test_beyond_the_horizon_it_stays_at_the_end_value(name: str) -> None:
    optim = OptimConfig(lr=1.0, horizon=10)
    schedule = ScheduleConfig(name=name, warmup=0, final_frac=0.25)
    assert learning_rate(10, optim, schedule) == pytest.approx(0.25)
    assert learning_rate(1000, optim, schedule) == pytest.approx(0.25)


def test_a_warmup_as_long_as_the_horizon() -> None:
    optim = OptimConfig(lr=1.0, horizon=4)
    schedule = ScheduleConfig(name="cosine", warmup=4, final_frac=0.0)
    assert [learning_rate(s, optim, schedule) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.0]
