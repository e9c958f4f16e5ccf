"""An independent decoder of the Llama family: plain functions with autograd, to hold the engine against.

Written from the published formulas: RMSNorm (Zhang, Sennrich 2019), rotary positions (Su et al. 2021) and their
scalings as Hugging Face's config.json describes them, grouped-query attention (Ainslie et al. 2023), SwiGLU and GeGLU
(Shazeer 2020), and what Gemma 3 adds (2025, section 2). It imports nothing from daybreak, so that a mistake there
cannot hide here, and prefers the formula to speed: keys are repeated for their heads, attention is spelled out with a
mask, and nothing is fused.

Letters: L layers, C channels, NH heads of queries, NKV of keys and values, HS head size, F width of the MLP, V
vocabulary, Vp padded vocabulary, B rows, T positions. Weights of linear maps are (out, in).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Decoder(NamedTuple):
    """A shape. `layers` has a letter for each kind of layer, repeated: f full, w window, n without positions."""

    L: int = 2
    C: int = 32
    NH: int = 4
    NKV: int = 2
    HS: int = 16
    F: int = 48
    max_T: int = 64
    V: int = 61
    eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    attproj_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layers: str = "f"
    window: int = 0
    theta: float = 10000.0
    rope: str = "default"
    rope_factor: float = 1.0
    rope_original: int = 0
    rope_low: float = 1.0
    rope_high: float = 0.0
    rope_attention: float = 0.0
    rope_factors: str = ""
    window_theta: float = 0.0
    act: str = "silu"
    query_scalar: int = 0
    post_norms: bool = False
    norm_plus_one: bool = False
    embed_scale: bool = False

    @property
    def Vp(self) -> int:
        return (self.V + 127) // 128 * 128

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter."""
        C, heads = self.C, self.NH * self.HS
        packed = heads + 2 * self.NKV * self.HS
        layer: dict[str, tuple[int, ...]] = {"ln1w": (C,), "qkvw": (packed, C)}
        layer |= {"qkvb": (packed,)} if self.qkv_bias else {}
        layer |= {"qnormw": (self.HS,), "knormw": (self.HS,)} if self.qk_norm else {}
        layer |= {"attprojw": (C, heads)} | ({"attprojb": (C,)} if self.attproj_bias else {})
        layer |= {"ln1pw": (C,)} if self.post_norms else {}
        layer |= {"ln2w": (C,), "gateupw": (2 * self.F, C)} | ({"gateupb": (2 * self.F,)} if self.mlp_bias else {})
        layer |= {"fcprojw": (C, self.F)} | ({"fcprojb": (C,)} if self.mlp_bias else {})
        layer |= {"ln2pw": (C,)} if self.post_norms else {}
        layers = {f"h.{l}.{name}": size for l in range(self.L) for name, size in layer.items()}
        last = {} if self.tied else {"headw": (self.Vp, C)}
        return {"wte": (self.Vp, C)} | layers | {"lnfw": (C,)} | last


def angles(s: Decoder) -> tuple[Tensor, float]:
    """Radians from one token to the next for each pair, rounded to fp32 as all programs do, and the factor of cosines
    and sines."""
    half, original = s.HS // 2, s.rope_original or s.max_T
    found, attention = [], 1.0
    for j in range(half):
        f = s.theta ** (-2 * j / s.HS)
        if s.rope == "linear":
            f /= s.rope_factor
        elif s.rope == "llama3":
            length, low, high = 2 * math.pi / f, s.rope_low, s.rope_high or 4.0
            if length > original / low:
                f /= s.rope_factor
            elif length >= original / high:
                share = (original / length - low) / (high - low)
                f = (1 - share) * f / s.rope_factor + share * f
        elif s.rope == "yarn":

            def pair_that_turns(times: float) -> float:
                return s.HS * math.log(original / (times * 2 * math.pi)) / (2 * math.log(s.theta))

            first = max(math.floor(pair_that_turns(s.rope_high or 32.0)), 0)
            last = min(math.ceil(pair_that_turns(s.rope_low)), s.HS - 1)
            ramp = min(max((j - first) / ((last - first) or 0.001), 0.0), 1.0)
            f = f / s.rope_factor * ramp + f * (1 - ramp)
        elif s.rope == "longrope":
            f /= float(s.rope_factors.split(",")[j])
        found.append(f)
    if s.rope == "yarn" and s.rope_factor > 1:
        attention = 0.1 * math.log(s.rope_factor) + 1
    elif s.rope == "longrope" and s.rope_factor > 1:
        attention = math.sqrt(1 + math.log(s.rope_factor) / math.log(original))
    return torch.tensor(found, dtype=torch.float32), s.rope_attention or attention


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, places: Tensor, freq: Tensor, attention: float) -> Tensor:
    """x (B, heads, T, HS) with the pairs (j, j + HS / 2) of the token at each place turned by its angles."""
    a = places[:, None].to(x.dtype) * freq.to(x.dtype)
    c, s = a.cos() * attention, a.sin() * attention
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def gated(gate: Tensor, act: str) -> Tensor:
    """silu, or gelu by its approximation with tanh."""
    if act == "gelu":
        return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return gate * torch.sigmoid(gate)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, scalar: int) -> Tensor:
    """Softmax attention of q (B, NH, T, HS) over the last `window` keys (0: all) of k, v (B, NKV, T, HS). Scores are
    divided by the root of `scalar`."""
    group, T = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    seen = (j <= i) & (j > i - (window or T))
    scores = (q @ k.mT / math.sqrt(scalar)).masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1) @ v


class Model:
    """A decoder with given weights, in fp64 unless another dtype is asked for."""

    def __init__(self, shape: Decoder, values: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
        assert {name: tuple(x.shape) for name, x in values.items()} == shape.parameters()
        self.shape, self.p = shape, {n: x.detach().to(dtype, copy=True).requires_grad_() for n, x in values.items()}
        self.freq, self.attention = angles(shape)
        local = shape._replace(theta=shape.window_theta, rope="default") if shape.window_theta else shape
        self.window_freq, self.window_attention = angles(local)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.p[name] + (1 if self.shape.norm_plus_one else 0), self.shape.eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.p[name + "w"].T
        return y + self.p[name + "b"] if name + "b" in self.p else y

    def block(self, x: Tensor, l: int) -> Tensor:
        s, h, (B, T, _) = self.shape, f"h.{l}.", x.shape
        letter = s.layers[l % len(s.layers)]
        y = self.linear(self.norm(x, h + "ln1w"), h + "qkv")
        q, k, v = (z.unflatten(-1, (-1, s.HS)).transpose(1, 2) for z in
                   y.split([s.NH * s.HS, s.NKV * s.HS, s.NKV * s.HS], -1))  # fmt: skip
        if s.qk_norm:
            q, k = self.norm(q, h + "qnormw"), self.norm(k, h + "knormw")
        how = (self.window_freq, self.window_attention) if letter == "w" else (self.freq, self.attention)
        if letter != "n":
            q, k = (turned(z, torch.arange(T), *how) for z in (q, k))
        a = attention(q, k, v, s.window if letter == "w" else 0, s.query_scalar or s.HS)
        y = self.linear(a.transpose(1, 2).reshape(B, T, -1), h + "attproj")
        x = x + (self.norm(y, h + "ln1pw") if s.post_norms else y)
        gate, up = self.linear(self.norm(x, h + "ln2w"), h + "gateup").chunk(2, -1)
        y = self.linear(gated(gate, s.act) * up, h + "fcproj")
        return x + (self.norm(y, h + "ln2pw") if s.post_norms else y)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits; the padding columns are cut off."""
        x = self.p["wte"][tokens] * (math.sqrt(self.shape.C) if self.shape.embed_scale else 1)
        for l in range(self.shape.L):
            x = self.block(x, l)
        head = self.p["wte" if self.shape.tied else "headw"]
        return self.norm(x, "lnfw") @ head[: self.shape.V].T

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


def random_values(shape: Decoder, seed: int = 0) -> dict[str, Tensor]:
    """fp64 values in which every parameter matters: no bias is zero, no norm's scale is one. Rounded to bf16, so that
    engines and oracles of every precision start from the same numbers."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, size in shape.parameters().items():
        draw: Any = torch.randn(size, generator=g, dtype=torch.float64)
        norm = name.endswith(("ln1w", "ln2w", "lnfw", "normw", "1pw", "2pw"))
        values[name] = (
            (draw * 0.3 + (not shape.norm_plus_one) if norm else 0.2 * draw).to(torch.bfloat16).to(torch.float64)
        )
    for name in ("wte", "headw"):
        if name in values:
            values[name][shape.V :] = 0
    return values
