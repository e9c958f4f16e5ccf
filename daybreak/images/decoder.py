"""A small convolutional decoder that sharpens pictures made of a dictionary's patches, forward and backward by hand.

    centres of patches (b, 3 f f, g, g) -> conv 3x3 -> res -> res -> conv 1x1 -> twice as wide, a quarter of the
    channels -> res -> norm, SiLU -> conv 3x3 -> 3 f g pixels wide: what is added to the patches themselves

    res:   x + conv 1x1 (SiLU(conv 3x3 (SiLU(norm(x)))))

The last convolution of a `res` and of all begins at zero, so training starts at the patches. The loss is the mean
squared error. norm is GroupNorm (Wu & He 2018), and pixel shuffle is of Shi et al. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from daybreak.images.patches import Grid

aten = torch.ops.aten
WIDTH, GROUPS, EPS = 24, 8, 1e-5
BATCH, LR, WARMUP, CLIP = 32, 4e-3, 30, 1.0
LEAST_STEPS, MOST_STEPS, PASSES = 100, 870, 9
Named = dict[str, Tensor]


class Draw:
    """New parameters `p` by name: of convolutions .w (out, in, k, k) and .b (out), of norms .w and .b (channels)."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.random, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.p: Named = {}

    def conv(self, name: str, wide: int, to: int, k: int, zero: bool = False) -> None:
        scale = 0.0 if zero else 1 / math.sqrt(wide * k * k)
        self.p[f"{name}.w"] = torch.randn(to, wide, k, k, generator=self.random).to(self.dtype) * scale
        self.p[f"{name}.b"] = torch.zeros(to, dtype=self.dtype)

    def norm(self, name: str, channels: int) -> None:
        self.p[f"{name}.w"] = torch.ones(channels, dtype=self.dtype)
        self.p[f"{name}.b"] = torch.zeros(channels, dtype=self.dtype)

    def res(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        self.conv(f"{name}.a", channels, channels, 3)
        self.conv(f"{name}.b", channels, channels, 1, zero=True)


def init(grid: Grid, seed: int, dtype: torch.dtype = torch.float32) -> Named:
    """The decoder's new parameters by name."""
    draw, w, f = Draw(seed, dtype), WIDTH, grid.patch
    draw.conv("in", 3 * f * f, 2 * w, 3)
    draw.res("r0", 2 * w)
    draw.res("r1", 2 * w)
    draw.conv("up", 2 * w, 4 * w, 1)
    draw.res("r2", w)
    draw.norm("norm", w)
    draw.conv("out", w, 3 * f * f // 4, 3, zero=True)
    return draw.p


# ---- layers. `saved` takes in forward what backward needs; backward puts the parameters' gradients into `g`.


def conv_forward(p: Named, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """The convolution of x (b, in, h, w): of the same size, or at a stride without padding."""
    w = p[f"{name}.w"]
    y: Tensor = torch.conv2d(x, w, p[f"{name}.b"], stride, w.shape[2] // 2 if stride == 1 else 0)
    return y


def conv_backward(d: Tensor, p: Named, g: Named, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """The gradient of x, from d, that of the convolution."""
    w = p[f"{name}.w"]
    pad = w.shape[2] // 2 if stride == 1 else 0
    dx: Tensor
    dx, g[f"{name}.w"], g[f"{name}.b"] = aten.convolution_backward(
        d, x, w, [len(w)], [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, [True, True, True]
    )
    return dx


def norm_silu_forward(p: Named, name: str, x: Tensor, saved: Named) -> Tensor:
    """SiLU(GroupNorm(x)), statistics in fp32 or wider."""
    b, c, height, width = x.shape
    y, mean, rstd = aten.native_group_norm(x, p[f"{name}.w"], p[f"{name}.b"], b, c, height * width, GROUPS, EPS)
    saved |= {f"{name}.x": x, f"{name}.y": y, f"{name}.mean": mean, f"{name}.rstd": rstd}
    h: Tensor = aten.silu(y)
    return h


def norm_silu_backward(d: Tensor, p: Named, g: Named, name: str, saved: Named) -> Tensor:
    """The gradient of x."""
    x, y, mean, rstd = (saved[f"{name}.{part}"] for part in ("x", "y", "mean", "rstd"))
    b, c, height, width = x.shape
    d = aten.silu_backward(d, y).contiguous()
    d, g[f"{name}.w"], g[f"{name}.b"] = aten.native_group_norm_backward(
        d, x, mean, rstd, p[f"{name}.w"], b, c, height * width, GROUPS, [True, True, True]
    )
    return d


def res_forward(p: Named, name: str, x: Tensor, saved: Named) -> Tensor:
    """x plus what two convolutions make of it: the formula at the top of the file."""
    h = saved[f"{name}.h"] = norm_silu_forward(p, f"{name}.norm", x, saved)
    a = saved[f"{name}.a"] = conv_forward(p, f"{name}.a", h)
    s = saved[f"{name}.s"] = aten.silu(a)
    return x + conv_forward(p, f"{name}.b", s)


def res_backward(d: Tensor, p: Named, g: Named, name: str, saved: Named) -> Tensor:
    """The gradient of x."""
    h = conv_backward(d, p, g, f"{name}.b", saved[f"{name}.s"])
    h = aten.silu_backward(h, saved[f"{name}.a"])
    h = conv_backward(h, p, g, f"{name}.a", saved[f"{name}.h"])
    return d + norm_silu_backward(h, p, g, f"{name}.norm", saved)


# ---- the whole decoder


def forward(p: Named, grid: Grid, x: Tensor, saved: Named) -> Tensor:
    """Pictures (b, 3, px, px), about -1 to 1, from the centres of their patches x (b, 3 f f, g, g)."""
    saved["x"] = x
    h = conv_forward(p, "in", x)
    h = res_forward(p, "r0", h, saved)
    h = saved["up"] = res_forward(p, "r1", h, saved)
    h = torch.pixel_shuffle(conv_forward(p, "up", h), 2)
    h = res_forward(p, "r2", h, saved)
    h = saved["out"] = norm_silu_forward(p, "norm", h, saved)
    h = torch.pixel_shuffle(conv_forward(p, "out", h), grid.patch // 2)
    return torch.pixel_shuffle(x, grid.patch) + h


def backward(d: Tensor, p: Named, grid: Grid, saved: Named) -> Named:
    """The gradients of all parameters, from that of the pictures."""
    g: Named = {}
    d = conv_backward(torch.pixel_unshuffle(d, grid.patch // 2), p, g, "out", saved["out"])
    d = norm_silu_backward(d, p, g, "norm", saved)
    d = res_backward(d, p, g, "r2", saved)
    d = conv_backward(torch.pixel_unshuffle(d, 2), p, g, "up", saved["up"])
    d = res_backward(d, p, g, "r1", saved)
    d = res_backward(d, p, g, "r0", saved)
    conv_backward(d, p, g, "in", saved["x"])
    return g


def loss_and_grads(p: Named, grid: Grid, x: Tensor, pictures: Tensor) -> tuple[float, Named]:
    """The mean squared error of decoded x (b, 3 f f, g, g) against pictures (b, 3, px, px), and its gradients."""
    saved: Named = {}
    error = forward(p, grid, x, saved) - pictures
    return float(error.square().mean()), backward(error * (2 / error.numel()), p, grid, saved)


def exact() -> Any:
    """A context in which a GPU's convolutions are in fp32, and give the same bits each time. A CPU's always do."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def regress(
    p: Named, grads: Callable[[Tensor], tuple[float, Named]], count: int, batch: int, lr: float, seed: int, check: Any
) -> None:
    """Train parameters in place by AdamW, where they are, on random rows below `count` for which `grads` gives loss and
    gradients. `check` runs before each step and may raise."""
    random, values = torch.Generator().manual_seed(seed), list(p.values())
    m, v, clipped = ([torch.zeros_like(x) for x in values] for _ in range(3))
    steps = max(LEAST_STEPS, min(MOST_STEPS, PASSES * count // batch))
    for step in range(1, steps + 1):
        check()
        with exact():
            _, g = grads(torch.randint(count, (batch,), generator=random))
        norm = math.sqrt(sum(torch.stack([g[name].square().sum() for name in p]).tolist()))  # waits for a GPU only once
        for name, x in zip(p, clipped, strict=True):
            torch.mul(g[name], min(1.0, CLIP / max(norm, 1e-12)), out=x)
        rate = lr * min(1.0, step / WARMUP) * (1 - (step - 1) / steps)
        done = torch.full((), float(step), device=values[0].device)
        torch._fused_adamw_(
            values, clipped, m, v, [], [done] * len(values), lr=rate, beta1=0.9, beta2=0.95, eps=1e-8,
            weight_decay=1e-4, amsgrad=False, maximize=False,
        )  # fmt: skip


def on(device: torch.device, p: Named) -> Named:
    """The parameters on a device."""
    return {name: x.to(device) for name, x in p.items()}


def train(
    grid: Grid, book: Tensor, codes: Tensor, pictures: Callable[[Tensor], Tensor], seed: int, check: Any = lambda: None
) -> Named:
    """Parameters, on the device of book, after a regression from codes (n, g, g) of book (K, 3 f f) to pictures, of
    which `pictures` gives rows as (b, 3, px, px), from -1 to 1. `check` runs before each step and may raise."""
    p = on(book.device, init(grid, seed))

    def grads(rows: Tensor) -> tuple[float, Named]:
        x = book[codes[rows].to(book.device)].permute(0, 3, 1, 2).contiguous()
        return loss_and_grads(p, grid, x, pictures(rows))

    regress(p, grads, len(codes), BATCH, LR, seed, check)
    return p
