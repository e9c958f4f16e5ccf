"""Global gradient norm and AdamW (Loshchilov & Hutter 2019, algorithm 2) over flat buffers, in one pass.

m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p)
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, op, widen

FLAT_CHUNK = 1 << 20  # elements per pass: gradient, weight and moments of a chunk fit in the last-level cache


def norm_temps(norm: Tensor, grads: Tensor) -> Temps:
    acc = acc_dtype(grads.dtype)
    chunks = -(-grads.numel() // FLAT_CHUNK)
    return [((chunks,), acc), ((min(FLAT_CHUNK, grads.numel()),), acc)]


@op("norm", temps=norm_temps)
def global_norm(norm: Tensor, grads: Tensor, *, scratch: Scratch) -> None:
    """norm (scalar, fp64) = the 2-norm of grads (N): chunk sums in fp32 or wider, their total in fp64."""
    partial, wide = scratch(norm_temps(norm, grads))
    for i, start in enumerate(range(0, grads.numel(), FLAT_CHUNK)):
        g = grads[start : start + FLAT_CHUNK]
        g = widen(g, wide[: g.numel()])
        torch.dot(g, g, out=partial[i])
    norm.copy_(partial.sum(dtype=torch.float64).sqrt())


def adamw_temps(weights: Tensor, masters: Tensor, m: Tensor, *_: object, **__: object) -> Temps:
    return [((min(FLAT_CHUNK, m.numel()),), m.dtype)]


@op("weights", "masters", "m", "v", temps=adamw_temps)
def adamw_update(
    weights: Tensor,
    masters: Tensor,
    m: Tensor,
    v: Tensor,
    grads: Tensor,
    stats: Tensor,
    hyper: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scratch: Scratch,
) -> None:
    """Update flat masters, m, v (N) in fp32 or fp64 and round the result into weights (N, compute dtype).

    stats[2] is the clip scale, stats[3] the skip flag (see kernels.guard); hyper[0] the learning rate and hyper[1]
    the update's number t, from 1. A skipped update touches nothing, bit for bit. `weights` may be `masters`.
    """
    if stats[3].item() != 0.0:
        return
    (wide,) = scratch(adamw_temps(weights, masters, m))
    lr, t = hyper[0].item(), hyper[1:2].to(torch.float32)
    for start in range(0, m.numel(), FLAT_CHUNK):
        part = slice(start, min(start + FLAT_CHUNK, m.numel()))
        g = wide[: part.stop - start]
        if grads.dtype == g.dtype:
            torch.mul(grads[part], stats[2], out=g)
        else:  # widen first: the product of a narrow tensor would be rounded
            g.copy_(grads[part]).mul_(stats[2])
        torch._fused_adamw_(
            [masters[part]], [g], [m[part]], [v[part]], [], [t], lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, amsgrad=False, maximize=False,
        )  # fmt: skip
        if weights is not masters:
            weights[part].copy_(masters[part])
