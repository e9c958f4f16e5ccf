"""An independent GPT-2: a plain autograd module, an optimizer and learning-rate schedules to hold the engine against.

Written from the GPT-2 / GPT-3 papers and llm.c's documented behaviour. It imports nothing from daybreak, so that a
mistake there cannot hide here, and prefers the formula to speed: attention is spelled out, and nothing is fused.

Letters: L layers, C channels, NH heads, HS = C / NH, V vocabulary, Vp padded vocabulary, B rows, T positions.
Run in fp64 it is the truth; run in bf16 (statistics, softmax, GELU and loss in fp32, every stored value rounded to
bf16, as mixed-precision training does) its own error is the budget that the bf16 engine gets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

LN_EPS = 1e-5
LAYER = ("ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb")


class Shape(NamedTuple):
    L: int
    C: int
    NH: int
    max_T: int
    V: int

    @property
    def Vp(self) -> int:
        return (self.V + 127) // 128 * 128

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter. Weights of linear maps are (out, in)."""
        C = self.C
        sizes = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
        layers = {f"h.{i}.{name}": size for i in range(self.L) for name, size in zip(LAYER, sizes, strict=True)}
        return {"wte": (self.Vp, C), "wpe": (self.max_T, C)} | layers | {"lnfw": (C,), "lnfb": (C,)}


def wide(x: Tensor) -> Tensor:
    """x in the precision of statistics, softmax and loss: fp32, or x's own where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise each row by its mean and biased variance, then scale and shift."""
    y = wide(x)
    centred = y - y.mean(-1, keepdim=True)
    normal = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + LN_EPS)
    return (normal * wide(weight) + wide(bias)).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    y = wide(x)
    return (0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))).to(x.dtype)


def attention(qkv: Tensor, NH: int) -> Tensor:
    """Causal softmax attention over packed qkv (B, T, 3C): Q, then K, then V, each head after head."""
    B, T, C3 = qkv.shape
    q, k, v = (part.view(B, T, NH, C3 // 3 // NH).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    scores = wide(q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    weights = torch.exp(scores.masked_fill(future, -math.inf) - scores.masked_fill(future, -math.inf).amax(-1, True))
    weights = (weights / weights.sum(-1, keepdim=True)).to(qkv.dtype)
    return (weights @ v).transpose(1, 2).reshape(B, T, C3 // 3)


class GPT2(nn.Module):
    """Pre-LayerNorm GPT-2 with a tied head, in any floating dtype. Parameters keep the names of `Shape.parameters`."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.shape = shape
        self.h = nn.ModuleList(nn.Module() for _ in range(shape.L))
        for name, size in shape.parameters().items():
            owner, _, leaf = name.rpartition(".")
            self.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.zeros(size, dtype=dtype)))

    def load(self, values: dict[str, Tensor]) -> GPT2:
        """Copy `values` (every name exactly once) into the parameters, rounding to their dtype."""
        self.load_state_dict(values)
        return self

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits; the padding columns are cut off."""
        x = self.wte[tokens] + self.wpe[: tokens.shape[1]]
        for h in self.h:
            a = attention(layer_norm(x, h.ln1w, h.ln1b) @ h.qkvw.T + h.qkvb, self.shape.NH)
            x = x + (a @ h.attprojw.T + h.attprojb)
            g = gelu(layer_norm(x, h.ln2w, h.ln2b) @ h.fcw.T + h.fcb)
            x = x + (g @ h.fcprojw.T + h.fcprojb)
        return layer_norm(x, self.lnfw, self.lnfb) @ self.wte[: self.shape.V].T

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T) cross-entropy in nats, exactly 0 where the target is -1."""
        logits = wide(self.logits(tokens))
        picked = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(targets == -1, 0.0, torch.logsumexp(logits, -1) - picked)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that are not -1; (A, B, T) micro-steps count as one batch."""
        tokens, targets = tokens.flatten(0, -2), targets.flatten(0, -2)
        return self.losses(tokens, targets).sum() / (targets != -1).sum()

    def gradients(self, tokens: Tensor, targets: Tensor) -> tuple[float, dict[str, Tensor]]:
        """The mean loss and its gradient for every parameter."""
        loss = self.loss(tokens, targets)
        names, values = zip(*self.named_parameters(), strict=True)
        return loss.item(), dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def random_values(shape: Shape, seed: int) -> dict[str, Tensor]:
    """fp64 values in which every parameter matters: no bias is zero, no LayerNorm scale is one.

    Rounded to bf16, so that engines and oracles of every precision start from the same numbers.
    """
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, size in shape.parameters().items():
        draw = torch.randn(size, generator=g, dtype=torch.float64)
        leaf = name.rpartition(".")[2]
        value = 1 + 0.2 * draw if leaf in ("ln1w", "ln2w", "lnfw") else 0.1 * draw
        values[name] = value.to(torch.bfloat16).to(torch.float64)
    values["wte"][shape.V :] = 0
    return values


def initial_values(shape: Shape, seed: int = 42) -> dict[str, Tensor]:
    """llm.c's initialisation in fp32: one generator, PyTorch's `apply` order, residual projections / sqrt(2L)."""
    g = torch.Generator().manual_seed(seed)
    values = {name: torch.zeros(size) for name, size in shape.parameters().items()}
    matrices = ["wte", "wpe"] + [f"h.{i}.{n}" for i in range(shape.L) for n in ("qkvw", "attprojw", "fcw", "fcprojw")]
    for name in matrices:
        std = 0.02 / math.sqrt(2 * shape.L) if name.endswith("projw") else 0.02
        rows = shape.V if name == "wte" else len(values[name])
        values[name][:rows].normal_(0.0, std, generator=g)
    for name, value in values.items():
        if name.endswith(("ln1w", "ln2w", "lnfw")):
            value.fill_(1)
    return values


class AdamW:
    """Global-norm clipping and AdamW, decay on matrices only, as llm.c orders them."""

    def __init__(
        self,
        params: dict[str, Tensor],
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        self.params = params
        self.m = {name: torch.zeros_like(p) for name, p in params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in params.items()}
        self.beta1, self.beta2, self.eps, self.weight_decay, self.clip = beta1, beta2, eps, weight_decay, clip

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], lr: float, step: int) -> float:
        """Update the parameters in place; `step` is 0-based. Returns the gradient norm before clipping."""
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        scale = self.clip / norm if norm > self.clip else 1.0
        t = step + 1
        for name, p in self.params.items():
            g, m, v = grads[name] * scale, self.m[name], self.v[name]
            m.copy_(self.beta1 * m + (1 - self.beta1) * g)
            v.copy_(self.beta2 * v + (1 - self.beta2) * g * g)
            m_hat, v_hat = m / (1 - self.beta1**t), v / (1 - self.beta2**t)
            decay = self.weight_decay if p.dim() == 2 else 0.0
            p -= lr * (m_hat / (v_hat.sqrt() + self.eps) + decay * p)
        return norm


def learning_rate(kind: str, step: int, *, peak: float, warmup: int, horizon: int, final: float) -> float:
    """llm.c's schedules, 0-based step; `final` is a fraction of `peak`."""
    if kind == "constant":
        return peak
    if step < warmup:
        return peak * (step + 1) / warmup
    floor, done = final * peak, (step - warmup) / (horizon - warmup)
    if kind == "cosine":
        return floor + 0.5 * (1 + math.cos(math.pi * done)) * (peak - floor)
    if kind == "linear":
        return peak - done * (peak - floor)
    assert kind == "wsd"
    decay_at = int(0.8 * horizon)
    if step < decay_at:
        return peak
    return floor + (1 - math.sqrt((step - decay_at) / (horizon - decay_at))) * (peak - floor)
