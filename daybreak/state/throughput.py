"""How fast the run is: step time without pauses, smoothed tokens per second, time left, utilisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Dense bf16 tensor-core peak, FLOP/s, by the exact name the driver reports. H100 SXM, PCIe, A100, 4090, 3090 and
# A6000 are llm.c's figures (so that utilisation compares); the others are NVIDIA's data sheets without sparsity.
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 988.8e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA RTX A6000": 77.4e12,
    "NVIDIA GeForce RTX 3090": 71.2e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of one card, or None (utilisation is then n/a) when no figure for this exact name is known."""
    return PEAK_FLOPS.get(device_name)


@dataclass(frozen=True)
class Timing:
    """One step: its seconds, the smoothed tokens per second, and the utilisation (None: peak unknown)."""

    seconds: float
    tok_s: float
    mfu: float | None


class Throughput:
    """Times steps. Call `start()` once, then `lap(tokens)` after every step; wrap what is no step in `pause()`.

    flops_per_token: forward and backward. peak: FLOP/s of all cards of the run together, None when unknown.
    """

    def __init__(
        self, flops_per_token: float, peak: float | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._clock = clock
        self._began = clock()
        self._laps = 0
        self._ema = 0.0
        self._rate = 0.0  # smoothed tokens per second

    def start(self) -> None:
        """Begin timing the next step now."""
        self._began = self._clock()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Take what happens inside (validation, saving, sampling) out of the step under way. Does not nest."""
        paused = self._clock()
        try:
            yield
        finally:
            self._began += self._clock() - paused

    def lap(self, tokens: int) -> Timing:
        """End a step of `tokens` tokens (all ranks) and begin the next.

        The rate is llm.c's: the first step (warm-up) is shown but never enters the average, an exponential one with
        weight 0.05, divided by 1 - 0.95^n to undo its start from zero. A resumed process starts anew.
        """
        now = self._clock()
        seconds, self._began = max(now - self._began, 1e-9), now
        rate = tokens / seconds
        if self._laps == 0:
            self._rate = rate
        else:
            self._ema = 0.95 * self._ema + 0.05 * rate
            self._rate = self._ema / (1.0 - 0.95**self._laps)
        self._laps += 1
        return Timing(seconds, self._rate, self._flops_per_token * rate / self._peak if self._peak else None)

    def eta(self, remaining_tokens: int) -> float | None:
        """Seconds that `remaining_tokens` take at the smoothed rate; None before the first step."""
        return remaining_tokens / self._rate if self._laps else None
