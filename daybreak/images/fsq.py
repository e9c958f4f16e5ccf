"""The codec `fsq`: a convolutional autoencoder, rounded in its middle (Mentzer et al. 2023), with its backward by hand.

    picture (b, 3, px, px) -> unshuffle f/2 -> conv 3x3 -> res -> conv 2x2 at a stride of 2 -> res -> res -> norm, SiLU
        -> conv 1x1 -> z (b, 4, px/f, px/f) -> round -> conv 3x3 -> res -> res -> conv 1x1 -> shuffle 2 -> res
        -> norm, SiLU -> conv 3x3 -> shuffle f/2 -> picture

Rounding has no dictionary to learn. Each of the four numbers of a place is squeezed by tanh, and rounded to one of
LEVELS values. Together they are the id. Backward goes straight through the rounding. `res` is the decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from daybreak.images.decoder import (
    Draw,
    Named,
    conv_backward,
    conv_forward,
    norm_silu_backward,
    norm_silu_forward,
    on,
    regress,
    res_backward,
    res_forward,
)
from daybreak.images.patches import Grid

LEVELS, SLACK = (8, 5, 5, 5), 1.001  # a little room, so that the outermost values can be reached
K = math.prod(LEVELS)  # ids
WIDTH, BATCH, LR = 24, 16, 4e-3


def init(grid: Grid, seed: int, dtype: torch.dtype = torch.float32, w: int = WIDTH) -> Named:
    """New parameters by name, as those of the decoder (decoder.py). w: a multiple of 8."""
    draw, z, wide = Draw(seed, dtype), len(LEVELS), 3 * (grid.patch // 2) ** 2
    draw.conv("e.in", wide, w, 3)
    draw.res("e.r0", w)
    draw.conv("e.down", w, 2 * w, 2)
    draw.res("e.r1", 2 * w)
    draw.res("e.r2", 2 * w)
    draw.norm("e.norm", 2 * w)
    draw.conv("e.out", 2 * w, z, 1)
    draw.conv("d.in", z, 2 * w, 3)
    draw.res("d.r0", 2 * w)
    draw.res("d.r1", 2 * w)
    draw.conv("d.up", 2 * w, 4 * w, 1)
    draw.res("d.r2", w)
    draw.norm("d.norm", w)
    draw.conv("d.out", w, wide, 3)
    return draw.p


# ---- rounding


def _limits(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of z (b, 4, h, w), for each of the four: levels, half of their range, and by how much an even number is off."""
    levels = torch.tensor(LEVELS, dtype=z.dtype, device=z.device).view(1, -1, 1, 1)
    return levels, (levels - 1) * SLACK / 2, torch.where(levels % 2 == 0, 0.5, 0.0).to(z.dtype)


def fsq_forward(z: Tensor, saved: Named) -> Tensor:
    """Values from -1 to 1, of LEVELS kinds each, from z (b, 4, h, w)."""
    levels, half, off = _limits(z)
    t = saved["tanh"] = torch.tanh(z + torch.atanh(off / half))
    return (t * half - off).round() / (levels // 2)


def fsq_backward(d: Tensor, saved: Named) -> Tensor:
    """The gradient of z, as if nothing had been rounded."""
    levels, half, _ = _limits(d)
    t = saved["tanh"]
    return d * (half / (levels // 2)) * (1 - t * t)


def ids_of(values: Tensor) -> Tensor:
    """The ids (b, h, w), below the number of all combinations, of rounded values (b, 4, h, w)."""
    found = torch.zeros_like(values[:, 0], dtype=torch.int64)
    for i, levels in reversed(list(enumerate(LEVELS))):
        found = found * levels + (values[:, i] * (levels // 2)).round().long() + levels // 2
    return found


def values_of(ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rounded values (b, 4, h, w) of ids (b, h, w): the reverse of `ids_of`."""
    parts = []
    for levels in LEVELS:
        parts.append((ids % levels - levels // 2).to(dtype) / (levels // 2))
        ids = ids // levels
    return torch.stack(parts, 1)


# ---- the whole codec


def encode(p: Named, grid: Grid, pictures: Tensor, saved: Named) -> Tensor:
    """z (b, 4, g, g) of pictures (b, 3, px, px), from -1 to 1."""
    x = saved["e.in"] = torch.pixel_unshuffle(pictures, grid.patch // 2)
    h = res_forward(p, "e.r0", conv_forward(p, "e.in", x), saved)
    saved["e.down"] = h
    h = res_forward(p, "e.r1", conv_forward(p, "e.down", h, 2), saved)
    h = norm_silu_forward(p, "e.norm", res_forward(p, "e.r2", h, saved), saved)
    saved["e.out"] = h
    return conv_forward(p, "e.out", h)


def decode(p: Named, grid: Grid, values: Tensor, saved: Named) -> Tensor:
    """Pictures (b, 3, px, px) of rounded values (b, 4, g, g)."""
    saved["d.in"] = values
    h = res_forward(p, "d.r0", conv_forward(p, "d.in", values), saved)
    h = saved["d.up"] = res_forward(p, "d.r1", h, saved)
    h = torch.pixel_shuffle(conv_forward(p, "d.up", h), 2)
    h = saved["d.out"] = norm_silu_forward(p, "d.norm", res_forward(p, "d.r2", h, saved), saved)
    return torch.pixel_shuffle(conv_forward(p, "d.out", h), grid.patch // 2)


def backward(d: Tensor, p: Named, grid: Grid, saved: Named) -> Named:
    """The gradients of all parameters, from that of the pictures that come back."""
    g: Named = {}
    d = conv_backward(torch.pixel_unshuffle(d, grid.patch // 2), p, g, "d.out", saved["d.out"])
    d = res_backward(norm_silu_backward(d, p, g, "d.norm", saved), p, g, "d.r2", saved)
    d = conv_backward(torch.pixel_unshuffle(d, 2), p, g, "d.up", saved["d.up"])
    d = res_backward(res_backward(d, p, g, "d.r1", saved), p, g, "d.r0", saved)
    d = fsq_backward(conv_backward(d, p, g, "d.in", saved["d.in"]), saved)
    d = norm_silu_backward(conv_backward(d, p, g, "e.out", saved["e.out"]), p, g, "e.norm", saved)
    d = res_backward(res_backward(d, p, g, "e.r2", saved), p, g, "e.r1", saved)
    d = res_backward(conv_backward(d, p, g, "e.down", saved["e.down"], 2), p, g, "e.r0", saved)
    conv_backward(d, p, g, "e.in", saved["e.in"])
    return g


def loss_and_grads(p: Named, grid: Grid, pictures: Tensor) -> tuple[float, Named]:
    """The mean squared error of pictures (b, 3, px, px) that go through the codec, and its gradients."""
    saved: Named = {}
    error = decode(p, grid, fsq_forward(encode(p, grid, pictures, saved), saved), saved) - pictures
    return float(error.square().mean()), backward(error * (2 / error.numel()), p, grid, saved)


def train(
    grid: Grid, count: int, pictures: Callable[[Tensor], Tensor], seed: int, device: torch.device,
    check: Any = lambda: None,
) -> Named:  # fmt: skip
    """Parameters on a device after training on `count` pictures, of which `pictures` gives rows as (b, 3, px, px), from
    -1 to 1, on the same device. `check` runs before each step and may raise."""
    p = on(device, init(grid, seed))
    regress(p, lambda rows: loss_and_grads(p, grid, pictures(rows)), count, BATCH, LR, seed, check)
    return p
