"""The angles of rotary position embedding, and how they are scaled for sequences longer than those first trained on.

Pair j of a head turns by theta^(-2j/HS) radians from one token to the next, so pairs have wavelengths from 2 pi tokens
to almost 2 pi theta. Scaling by a factor s slows pairs down:

    linear     all of them, s times (Chen et al. 2023)
    llama3     only those with wavelengths above original / rope_low, s times; those below original / rope_high not
               at all; between the two it blends
    yarn       the same idea with a ramp over pairs, and attention sharpened by its formula (Peng et al. 2023)
    longrope   each pair by a divisor of its own, which somebody searched for (Ding et al. 2024)

Layers with a window may have angles of their own, from another theta and never scaled (Gemma 3).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from daybreak.shapes import LlamaConfig


def rotary(c: LlamaConfig) -> tuple[Tensor, float]:
    """(radians per token of each pair, (HS / 2) fp32; the factor of cosines and sines).

    In fp32 and in this order, because published models were trained with angles that were rounded so.
    """
    power = c.theta ** (torch.arange(0, c.HS, 2, dtype=torch.float32) / c.HS)
    s, original, attention = c.rope_factor, c.rope_original or c.max_T, 1.0
    if c.rope == "linear":
        return 1.0 / power / s, attention
    if c.rope == "llama3":
        freq, low, high = 1.0 / power, c.rope_low, c.rope_high or 4.0
        kept = ((original / (2 * math.pi / freq) - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * freq / s + kept * freq, attention
    if c.rope == "yarn":
        attention = 0.1 * math.log(s) + 1
        first = max(math.floor(_pair(c, original, c.rope_high or 32.0)), 0)
        last = min(math.ceil(_pair(c, original, c.rope_low)), c.HS - 1)
        kept = 1 - ((torch.arange(c.HS // 2) - first) / ((last - first) or 0.001)).clamp(0, 1)
        return 1.0 / (s * power) * (1 - kept) + 1.0 / power * kept, c.rope_attention or attention
    if c.rope == "longrope":
        attention = math.sqrt(1 + math.log(s) / math.log(original))
        return 1.0 / (torch.tensor(c.divisors) * power), c.rope_attention or attention
    return 1.0 / power, attention


def window_rotary(c: LlamaConfig) -> tuple[Tensor, float]:
    """The same of layers with a window."""
    return rotary(replace(c, theta=c.window_theta, rope="default")) if c.window_theta else rotary(c)


def _pair(c: LlamaConfig, original: int, turns: float) -> float:
    """Which pair, as a fraction, turns so often in `original` tokens."""
    return c.HS * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(c.theta))
