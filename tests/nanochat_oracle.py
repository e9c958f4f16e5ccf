"""An independent model of nanochat's kind: plain functions with autograd, to hold the engine against.

Written from the description of nanochat's run: RMSNorm without weights (Zhang, Sennrich 2019), rotary positions (Su et
al. 2021), norms of queries and keys (Henry et al. 2020), squared ReLU (So et al. 2021), value embeddings with gates
(Zhou et al. 2024), and the scalars of its residual stream. It imports nothing from the engine, so that a mistake there
cannot hide here, and prefers the formula to speed: attention is spelled out with a mask, and nothing is fused.

Letters: L layers, C channels, NH heads, V vocabulary, Vp padded vocabulary, B rows, T positions. Weights of linear maps
are (out, in).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

GATE, SMEAR = 12, 24  # channels that the gates read


class Nano(NamedTuple):
    """A shape. `layers` has a letter for each kind of layer, repeated: f full, w window; the last layer is full."""

    L: int = 3
    C: int = 32
    NH: int = 2
    max_T: int = 64
    V: int = 61
    layers: str = "wwwf"
    window: int = 5
    theta: float = 100000.0
    eps: float = 2.0**-23
    softcap: float = 15.0

    @property
    def Vp(self) -> int:
        return (self.V + 127) // 128 * 128

    def valued(self, l: int) -> bool:
        """Whether a layer has value embeddings: every other one, counted from the last."""
        return (self.L - 1 - l) % 2 == 0

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter."""
        C = self.C
        found: dict[str, tuple[int, ...]] = {"wte": (self.Vp, C), "smearw": (SMEAR,), "smear": (1,)}
        for l in range(self.L):
            layer: dict[str, tuple[int, ...]] = {"resid": (1,), "x0": (1,)}
            layer |= {"ve": (self.Vp, C), "gatew": (self.NH, GATE)} if self.valued(l) else {}
            layer |= {"qkvw": (3 * C, C), "attprojw": (C, C), "fcw": (4 * C, C), "fcprojw": (C, 4 * C)}
            found |= {f"h.{l}.{name}": size for name, size in layer.items()}
        return found | {"backout": (1,), "headw": (self.Vp, C)}


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def angles(s: Nano) -> Tensor:
    """Radians from one token to the next for each pair, rounded to fp32."""
    HS = s.C // s.NH
    return torch.tensor([s.theta ** (-2 * j / HS) for j in range(HS // 2)], dtype=torch.float32)


def turned(x: Tensor, freq: Tensor) -> Tensor:
    """x (B, NH, T, HS) with the pairs (j, j + HS / 2) of each token turned by its place's angles."""
    a = torch.arange(x.shape[2])[:, None].to(x.dtype) * freq.to(x.dtype)
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * a.cos() - x2 * a.sin(), x2 * a.cos() + x1 * a.sin()], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention (B, NH, T, HS) over the last `window` keys, 0: all."""
    T = q.shape[2]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    seen = (j <= i) & (j > i - (window or T))
    scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1) @ v


class Model:
    """A model with given weights, in fp64 unless another dtype is asked for."""

    def __init__(self, shape: Nano, values: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
        assert {name: tuple(x.shape) for name, x in values.items()} == shape.parameters()
        self.shape, self.freq = shape, angles(shape)
        self.p = {n: x.detach().to(dtype, copy=True).requires_grad_() for n, x in values.items()}

    def block(self, x: Tensor, tokens: Tensor, l: int) -> Tensor:
        s, p, h, (B, T, _) = self.shape, self.p, f"h.{l}.", x.shape
        y = rms_norm(x, s.eps)
        q, k, v = (z.unflatten(-1, (s.NH, -1)).transpose(1, 2) for z in (y @ p[h + "qkvw"].T).chunk(3, -1))
        if s.valued(l):
            gate = 3 * torch.sigmoid(y[..., :GATE] @ p[h + "gatew"].T)
            looked_up = p[h + "ve"][tokens].unflatten(-1, (s.NH, -1)).transpose(1, 2)
            v = v + gate.transpose(1, 2)[..., None] * looked_up
        q, k = (1.2 * rms_norm(turned(z, self.freq), s.eps) for z in (q, k))
        full = s.layers[l % len(s.layers)] == "f" or l == s.L - 1
        a = attention(q, k, v, 0 if full else s.window).transpose(1, 2).reshape(B, T, -1)
        x = x + a @ p[h + "attprojw"].T
        return x + (rms_norm(x, s.eps) @ p[h + "fcw"].T).relu().square() @ p[h + "fcprojw"].T

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits; the padding columns are cut off."""
        s, p = self.shape, self.p
        e = rms_norm(p["wte"][tokens], s.eps)
        gate = p["smear"] * torch.sigmoid(e[:, 1:, :SMEAR] @ p["smearw"])
        x0 = torch.cat([e[:, :1], e[:, 1:] + gate[..., None] * e[:, :-1]], 1)
        x = middle = x0
        for l in range(s.L):
            x = self.block(p[f"h.{l}.resid"] * x + p[f"h.{l}.x0"] * x0, tokens, l)
            if l == s.L // 2:
                middle = x
        z = rms_norm(x - p["backout"] * middle, s.eps) @ p["headw"][: s.V].T
        return s.softcap * torch.tanh(z / s.softcap)

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T) cross-entropy in nats, exactly 0 where the target is -1."""
        logits = self.logits(tokens)
        picked = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return torch.where(targets == -1, 0.0, torch.logsumexp(logits, -1) - picked)

    def gradients(self, tokens: Tensor, targets: Tensor) -> tuple[float, dict[str, Tensor]]:
        """The mean loss over targets (..., B, T) that are not -1, and its gradient for every parameter."""
        tokens, targets = (x.reshape(-1, x.shape[-1]) for x in (tokens, targets))
        loss = self.losses(tokens, targets).sum() / (targets != -1).sum()
        return loss.item(), dict(zip(self.p, torch.autograd.grad(loss, tuple(self.p.values())), strict=True))


def random_values(shape: Nano, seed: int = 0) -> dict[str, Tensor]:
    """fp64 values in which every parameter matters: no scalar is 0 or 1, and logits reach far into the soft-cap.
    Rounded to bf16, so that engines and oracles of every precision start from the same numbers."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, size in shape.parameters().items():
        draw: Any = torch.randn(size, generator=g, dtype=torch.float64)
        scalar = {"smear": 0.7, "resid": 1.1, "x0": 0.3, "backout": 0.2}.get(name.rpartition(".")[2])
        scale = 1.5 if name == "headw" else 0.2
        values[name] = (scale * draw if scalar is None else scalar + 0.1 * draw).to(torch.bfloat16).to(torch.float64)
    for name in values:
        if name.endswith(("wte", "headw", "ve")):
            values[name][shape.V :] = 0
    return values
