"""How fast the run is: step time without pauses, smoothed tokens per second, time left, utilisation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from daybreak.shapes import SHAPES, Shape


@dataclass(frozen=True)
class GPU:
    """A GPU: the driver's name, its memory as the driver states it, its compute capability, its peak in FLOP/s (None
    without bf16), the nominal GB/s that it sends to another one of its host (one direction of NVLink, else PCIe x16;
    data sheets)."""

    name: str
    mib: int
    capability: tuple[int, int]
    peak: float | None
    link: float

    @property
    def missing(self) -> set[str]:
        """Kernel backends that this kind of GPU cannot run, whatever is installed (kernels.cuda.*.usable)."""
        return {9: set[str](), 10: {"quack"}}.get(self.capability[0], {"quack", "cudnn", "fa4"})


# Peaks are dense bf16 of the tensor cores. Those of H100 SXM, PCIe, A100, A6000, 30 and 40 series are llm.c's (so that
# utilisation compares); the others are NVIDIA's data sheets without sparsity. By the short names of `plan --gpu`.
GPUS = {
    "h100": GPU("NVIDIA H100 80GB HBM3", 81559, (9, 0), 988.8e12, 450),
    "h100-pcie": GPU("NVIDIA H100 PCIe", 81559, (9, 0), 756e12, 64),
    "h100-nvl": GPU("NVIDIA H100 NVL", 95830, (9, 0), 835.5e12, 64),
    "h200": GPU("NVIDIA H200", 143771, (9, 0), 989.4e12, 450),
    "gh200": GPU("NVIDIA GH200 480GB", 97871, (9, 0), 989.4e12, 450),
    "b200": GPU("NVIDIA B200", 183359, (10, 0), 2250e12, 900),
    "a100": GPU("NVIDIA A100-SXM4-80GB", 81920, (8, 0), 312e12, 300),
    "a100-40gb": GPU("NVIDIA A100-SXM4-40GB", 40960, (8, 0), 312e12, 300),
    "a100-pcie": GPU("NVIDIA A100 80GB PCIe", 81920, (8, 0), 312e12, 32),
    "a100-pcie-40gb": GPU("NVIDIA A100-PCIE-40GB", 40960, (8, 0), 312e12, 32),
    "a6000": GPU("NVIDIA RTX A6000", 49140, (8, 6), 77.4e12, 32),
    "t4": GPU("Tesla T4", 15360, (7, 5), None, 16),
    "3060": GPU("NVIDIA GeForce RTX 3060", 12288, (8, 6), 25.5e12, 32),
    "3080": GPU("NVIDIA GeForce RTX 3080", 10240, (8, 6), 59.5e12, 32),
    "3090": GPU("NVIDIA GeForce RTX 3090", 24576, (8, 6), 71.2e12, 32),
    "4070": GPU("NVIDIA GeForce RTX 4070", 12282, (8, 9), 58.3e12, 32),
    "4080": GPU("NVIDIA GeForce RTX 4080", 16376, (8, 9), 97.5e12, 32),
    "4090": GPU("NVIDIA GeForce RTX 4090", 24564, (8, 9), 165.2e12, 32),
    "5090": GPU("NVIDIA GeForce RTX 5090", 32607, (12, 0), 209.5e12, 64),
    "l40s": GPU("NVIDIA L40S", 46068, (8, 9), 362e12, 32),
    "l4": GPU("NVIDIA L4", 23034, (8, 9), 121e12, 32),
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of one GPU, or None (utilisation is then n/a) when no figure for this exact name is known."""
    return next((gpu.peak for gpu in GPUS.values() if gpu.name == device_name), None)


# Tokens a second of fp8 over bf16: one NVIDIA H200, B = 16, T = 1024, 131,072 tokens a step, recompute 1 (d48: 2),
# alternating processes (30 Nov 2026, commit 834d3ee, torch 2.11). d12: B = 64, 524,288 tokens a step, recompute 0, one
# process after the other (1 Dec 2026, commit 0c0fa74).
FP8_GAIN = {"d12": 824.17 / 697.77, "d24": 618.1 / 457.1, "d36": 1243.8 / 891.3, "d48": 2325 / 1654}


def size_of(model: Shape) -> float:
    """The logarithm of L C^2, which the FLOPs of the blocks grow with."""
    return math.log(model.L * model.C**2)


def fp8_gain(model: Shape) -> float:
    """How many times as fast fp8 is as bf16: interpolated by the logarithm of L C^2, constant for larger models. For
    smaller ones it falls on the line through the two smallest, which is an assumption."""
    sizes, gains, size = [size_of(SHAPES[name]) for name in FP8_GAIN], list(FP8_GAIN.values()), size_of(model)
    if size < sizes[0]:
        return max(gains[0] - (gains[1] - gains[0]) * (sizes[0] - size) / (sizes[1] - sizes[0]), 0.5)
    return float(np.interp(size, sizes, gains))


@dataclass(frozen=True)
class Timing:
    """One step: its seconds, the smoothed tokens per second, and the utilisation (None: peak unknown)."""

    seconds: float
    tok_s: float
    mfu: float | None


class Throughput:
    """Times steps. Call `start()` once, then `lap(tokens)` after every step; wrap what is no step in `pause()`.

    flops_per_token: forward and backward. peak: FLOP/s of all GPUs of the run together, None when unknown.
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
