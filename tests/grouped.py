"""A family of models that is only here: layers of attention alone, whose heads share keys and values in groups.

It shows how little a family needs: a dataclass, a model, a table of names, and an entry in three registries. Run
as a program, this file is daybreak's command line with one family more.

The kernels take as many heads of keys as of queries. So the NH heads of queries go in NH / NKV groups, each of NKV
heads, and every group has an attention of its own with the same keys and values. Their gradients are added up behind
the weights, because no kernel adds two activations.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from daybreak.config_keys import at_least, key
from daybreak.interop.families import FAMILIES, Family
from daybreak.models import blocks
from daybreak.models.frame import Frame, Mode
from daybreak.models.head import Head
from daybreak.models.registry import MODELS
from daybreak.models.rows import Row, layernorm_rows, linear_rows
from daybreak.shapes import ARCHS, Shape


@dataclass(frozen=True)
class GroupedConfig(Shape):
    """Attention alone, with shared keys and values."""

    arch: str = key("grouped", "family of models")
    NKV: int = key(2, "heads of keys and values", at_least(1))

    def check(self) -> None:
        super().check()
        self.check_multiple("C", "NH")
        self.check_multiple("NH", "NKV")


class Grouped(Head):
    """One shape. x (n, C) is the residual stream of n = B T tokens: x += attproj(attention(qkv(ln(x))))."""

    asks: Mapping[str, Collection[str]] = {}  # nothing that only some kernels have

    def __init__(self, cfg: GroupedConfig, recompute: int = 0, device_type: str = "cpu") -> None:
        super().__init__(device_type)
        self.cfg, self.recompute, self.scale = cfg, recompute, 1 / math.sqrt(cfg.HS)
        self.groups, self.W = cfg.NH // cfg.NKV, 2 * cfg.NKV * cfg.HS

    def rows(self) -> list[Row]:
        c = self.cfg
        rows = [Row("wte", (c.Vp, c.C), True, 0.02, drawn_rows=c.V), Row("wpe", (c.max_T, c.C), True, 0.02)]
        for h in (f"h.{l}." for l in range(c.L)):
            rows += [*layernorm_rows(h + "ln", c.C), *linear_rows(h + "qkv", c.C + self.W, c.C, 0.02)]
            rows += linear_rows(h + "attproj", c.C, c.C, 0.02)
        return [*rows, *layernorm_rows("lnf", c.C)]

    def flops_per_token(self, T: int, num_parameters: int) -> int:
        return 6 * num_parameters + 6 * self.cfg.L * self.cfg.C * T

    def cache_shape(self, rows: int, T: int) -> tuple[int, ...]:
        return self.cfg.L, 2, rows, self.cfg.NKV, T, self.cfg.HS

    def queries(self, x: Tensor, B: int, T: int) -> list[Tensor]:
        """Each group's heads of queries (B, T, NKV, HS) in the first C columns of x."""
        heads = x[:, : self.cfg.C].view(B, T, self.cfg.NH, self.cfg.HS)
        return [heads[:, :, g :: self.groups] for g in range(self.groups)]

    def shared(self, x: Tensor, B: int, T: int) -> list[Tensor]:
        """Keys and values (B, T, NKV, HS) in the last columns of x."""
        return list(x[:, -self.W :].view(B, T, 2, self.cfg.NKV, self.cfg.HS).unbind(2))

    def block(self, b: Frame, x: Tensor, B: int, T: int) -> Tensor:
        """The output of attention, without what follows."""
        n, C = x.shape
        qkv, att = blocks.linear(b, "qkv", x, b.a("qkv", n, C + self.W), norm="ln"), b.a("att", n, C)
        for g, (q, out) in enumerate(zip(self.queries(qkv, B, T), self.queries(att, B, T), strict=True)):
            blocks.attention(b.layer(f"{b.prefix}{g}.", b.index, b.mode), out, q, *self.shared(qkv, B, T), self.scale)
        return att

    def block_backward(self, b: Frame, d: Tensor, x: Tensor, B: int, T: int, below: Tensor | None) -> None:
        (n, C), W = x.shape, self.W
        qkv, att, d_qkv = b.a("qkv", n, C + W), b.a("att", n, C), b.d("qkv", n, C + W)
        blocks.weight_grad(b, "attproj", d, att)
        d_att = blocks.input_grad(b, "attproj", b.d("att", n, C), d)
        d_shared = [d_qkv, *(b.d(f"shared{g}", n, W) for g in range(1, self.groups))]
        parts = zip(*(self.queries(y, B, T) for y in (d_qkv, d_att, qkv, att)), strict=True)
        for g, (d_q, d_out, q, out) in enumerate(parts):
            grads, of = [d_q, *self.shared(d_shared[g], B, T)], [q, *self.shared(qkv, B, T)]
            blocks.attention_backward(b.layer(f"{b.prefix}{g}.", b.index, b.mode), grads, d_out, of, out, self.scale)
        blocks.bias_grad(b, "qkv", d_qkv)
        d_ln = blocks.input_grad(b, "qkv", b.d("ln", n, C), d_qkv)
        for g, part in enumerate(d_shared[1:]):
            d_ln, before = b.d(f"ln{g}", n, C), d_ln
            b.k.matmul_forward(d_ln, part, b.w("qkvw")[C:].t(), None, before)
            b.k.bias_backward(b.g("qkvb")[C:], part, accumulate=True)
        ln = blocks.layernorm_backward(b, "ln", d, d_ln, x, below=below)
        blocks.weight_grad(b, "qkv", d_qkv, ln)
        for part in d_shared[1:]:
            b.k.matmul_backward_weight(b.g("qkvw")[C:], part, ln, accumulate=True)

    def stream(self, f: Frame, l: int, n: int) -> Tensor:
        """The residual stream below layer l."""
        return f.a(f"h.{l - 1}.out" if l else "embedded", n, self.cfg.C)

    def layers(self, f: Frame, x: Tensor, B: int, T: int, mode: Mode, last: Tensor) -> Tensor:
        for l in range(self.cfg.L):
            b, out = f.layer(f"h.{l}.", l, mode), last if l == self.cfg.L - 1 else self.stream(f, l + 1, B * T)
            x = blocks.linear(b, "attproj", self.block(b, x, B, T), out, add=x)
        return x

    def forward(self, f: Frame, tokens: Tensor, kv: Tensor | None = None) -> Tensor:
        (B, T), x = tokens.shape, self.stream(f, 0, tokens.numel())
        f.k.embedding_forward(x, tokens, f.w("wte"), f.w("wpe"))
        x = self.layers(f, x, B, T, Mode(cache=kv), self.stream(f, self.cfg.L, B * T))
        return blocks.layernorm(f, "lnf", x, f.a("lnf", *x.shape))

    def decode(self, f: Frame, tokens: Tensor, positions: Tensor, kv: Tensor, last: Tensor) -> Tensor:
        n, mode = len(tokens), Mode(cache=kv, positions=positions, few=len(tokens) < 3)
        x = self.stream(f, 0, n)
        f.k.embedding_decode(x, tokens, positions, f.w("wte"), f.w("wpe"))
        x, logits = self.layers(f, x, n, 1, mode, last), f.a("logits", n, self.cfg.Vp)
        return blocks.linear(f.layer("", 0, mode), "", x, logits, norm="lnf", tied="wte")

    def backward(self, f: Frame, tokens: Tensor, *, first: bool) -> None:
        (B, T), L, n = tokens.shape, self.cfg.L, tokens.numel()
        rewritten = ("ln",) if self.recompute == 2 else ()
        mode = Mode(accumulate=not first, recomputed=self.recompute == 3, rewritten=rewritten)
        top, d = f.layer("", 0, Mode(accumulate=not first)), f.a("d_residual", n, self.cfg.C)
        bias = [f.g(f"h.{l}.attprojb") for l in range(L)]
        d_lnf, x = f.a("d_lnf", *d.shape), self.stream(f, L, n)
        blocks.layernorm_backward(top, "lnf", d, d_lnf, x, below=bias[-1], starts=True)
        for l in reversed(range(L)):
            b, x = f.layer(f"h.{l}.", l, mode), self.stream(f, l, n)
            if self.recompute == 3:
                self.block(b, x, B, T)
            self.block_backward(b, d, x, B, T, bias[l - 1] if l else None)
            f.final()
        f.k.embedding_backward(f.g("wte"), f.g("wpe"), d, tokens, accumulate=not first)
        f.final()


class Names(Family):
    """In other programs q, k and v are tensors of their own, and the heads' dimensions of k are in pairs."""

    def rows_of_each(self, shape: Shape, leaf: str, rows: int) -> Sequence[slice | Tensor]:
        if not leaf.startswith("qkv"):
            return super().rows_of_each(shape, leaf, rows)
        k = torch.arange(shape.C, (rows + shape.C) // 2).view(-1, 2, shape.HS // 2).mT.flatten()
        return [slice(shape.C), k, slice(-len(k), None)]


NAMES = Names(
    arch="grouped", model_type="grouped", architecture="GroupedForCausalLM", prefix="model.", layer="layers.{}.",
    names={
        "wte": ("embed.weight",), "wpe": ("places.weight",), "lnfw": ("norm.weight",), "lnfb": ("norm.bias",),
        "lnw": ("norm.weight",), "lnb": ("norm.bias",), "attprojw": ("o.weight",), "attprojb": ("o.bias",),
        "qkvw": ("q.weight", "k.weight", "v.weight"), "qkvb": ("q.bias", "k.bias", "v.bias"),
    },
    sizes={"L": ("layers", 2), "C": ("hidden", 32), "NH": ("heads", 4), "NKV": ("key_heads", 2),
           "max_T": ("positions", 16), "V": ("vocab_size", 257)},
    arithmetic={}, written={},
)  # fmt: skip


def register() -> None:
    ARCHS["grouped"], MODELS["grouped"], FAMILIES["grouped"] = GroupedConfig, Grouped, NAMES


def daybreak(args: list[str]) -> int:
    """The command line, with this family."""
    register()
    from daybreak.cli.main import main

    return main(args)


if __name__ == "__main__":
    sys.exit(daybreak(sys.argv[1:]))
