"""The decoder family as a list of kernel calls: Llama, SmolLM, Qwen, Mistral, Gemma 3. Read models/gpt2.py first.

B sequences of T tokens are n = B T rows. There are C channels, NH heads of queries and NKV of keys and values, all of
size HS, an MLP of width F, and a vocabulary of V, padded to Vp. The residual stream x (n, C) runs through L blocks:

    tokens -> embedded                                                                 embedding
       x -> ln1 -> qkv -> norm -> rope -> attention -> attproj -> + x = residual2      `block`
            residual2 -> ln2 -> gateup -> swiglu -> fcproj -> + residual2 = residual3  the next block's x
    residual3 -> lnf -> logits -> loss                                                 head

Positions are no parameters: rope turns queries and keys by angles that grow with their place. All norms are RMSNorm.
The one between qkv and rope is that of QK-norm, over each head. Without it rope works inside qkv; with it on tensors of
their own, because backward needs the norm's input. Biases, QK-norm and a head of its own are keys of the shape, and so
are the kinds of layers (see shapes/llama.py). With post-norms, attproj and fcproj have outputs of their own, and their
norms ln1p and ln2p are added to x and residual2.

As in GPT-2, d is the gradient of the residual stream all the way down. The gradient of gateup takes gateup's place.

`recompute` trades time for memory. Level 1 keeps no output of swiglu, and level 2 none of ln1 and ln2 either. A
backward kernel that has the input at hand writes them once more. Level 3 keeps only the blocks' inputs, and runs
`block` again; with post-norms also fcproj, whose output the last norm's backward reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from daybreak.models import blocks
from daybreak.models.frame import Documents, Frame, Matrix, Mode
from daybreak.models.head import Head
from daybreak.models.rotary import rotary, window_rotary
from daybreak.models.rows import Row, linear_rows, norm_row
from daybreak.shapes import LlamaConfig

REWRITTEN = {
    1: ("swiglu",),
    2: ("swiglu", "ln1", "ln2"),
}  # by recompute level: outputs that backward kernels write again
RECOMPUTE_BLOCK = 3
FEW_ROWS = 2  # decoded at once by kernels for few rows, as in GPT-2
MATMULS: Mapping[str, tuple[str, str]] = {  # weight -> its input, and its output's gradient: fp8 takes all three
    "qkvw": ("ln1", "d_qkv"),
    "attprojw": ("att", "d_residual2"),
    "gateupw": ("ln2", "d_gateup"),
    "fcprojw": ("swiglu", "d_residual3"),
}
POST = {"attproj": "ln1p", "fcproj": "ln2p"}  # the norms of what these linear layers give


class Llama(Head):
    """A decoder of one shape (Touvron et al. 2023, and those that followed)."""

    cfg: LlamaConfig
    matmuls = MATMULS

    def __init__(self, cfg: LlamaConfig, recompute: int = 0, device_type: str = "cpu") -> None:
        super().__init__(device_type)
        self.cfg, self.recompute = cfg, recompute
        self.remade = [x for x, _ in MATMULS.values()] if recompute == RECOMPUTE_BLOCK else REWRITTEN.get(recompute, ())
        self.head_weight = "wte" if cfg.tied else "headw"
        self.scale, self.W = 1.0 / math.sqrt(cfg.query_scalar or cfg.HS), (cfg.NH + 2 * cfg.NKV) * cfg.HS
        self.freq = {"freq": rotary(cfg)} | ({"window_freq": window_rotary(cfg)} if cfg.window_theta else {})
        self.offset = 1.0 if cfg.norm_plus_one else 0.0  # arguments of every norm,
        self.norm = {"eps": cfg.eps, "offset": self.offset}  # and of its forward
        self.parts = {"qkv": ("q", "k", "v"), "gateup": ("gate", "up")}
        self.biased = {"attproj": cfg.attproj_bias, "fcproj": cfg.mlp_bias}
        if cfg.window or cfg.NKV < cfg.NH:
            self.asks = dict.fromkeys(("attention_forward", "attention_backward", "attention_decode"), ("window",))

    def constants(self) -> dict[str, Tensor]:
        return {name: freq for name, (freq, _) in self.freq.items()}

    def rows(self) -> list[Row]:
        """The parameters in forward order.

        Matrices start with standard deviation 0.02, as these models were published. Each of the 2 L projections onto
        the residual stream starts sqrt(2 L) times smaller: so what they add together is as large for any depth."""
        c, C, one = self.cfg, self.cfg.C, 1.0 - self.offset
        std, residual_std, heads = 0.02, 0.02 / math.sqrt(2 * c.L), (c.NH * c.HS, c.NKV * c.HS, c.NKV * c.HS)
        rows = [Row("wte", (c.Vp, C), True, std, drawn_rows=c.V)]
        for h in (f"h.{l}." for l in range(c.L)):
            rows += [norm_row(h + "ln1", C, one), *linear_rows(h + "qkv", self.W, C, std, heads, bias=c.qkv_bias)]
            rows += [norm_row(h + name, c.HS, one) for name in ("qnorm", "knorm") if c.qk_norm]
            rows += linear_rows(h + "attproj", C, heads[0], residual_std, bias=c.attproj_bias)
            rows += [norm_row(h + name, C, one) for name in (("ln1p", "ln2") if c.post_norms else ("ln2",))]
            rows += linear_rows(h + "gateup", 2 * c.F, C, std, (c.F, c.F), bias=c.mlp_bias)
            rows += linear_rows(h + "fcproj", C, c.F, residual_std, bias=c.mlp_bias)
            rows += [norm_row(h + "ln2p", C, one)] if c.post_norms else []
        head = [] if c.tied else [Row("headw", (c.Vp, C), True, std, drawn_rows=c.V)]
        return [*rows, norm_row("lnf", C, one), *head]

    def flops_per_token(self, T: int, num_parameters: int) -> int:
        """Training FLOPs per token: 6 for each parameter that a matmul reads, and 12 NH HS in each layer for each key
        that a query sees on average, T / 2 without a window."""
        c = self.cfg
        looked_up = 0 if c.tied else c.Vp * c.C
        seen = [min(T, c.window) if c.kind(l) == "w" else T for l in range(c.L)]
        return 6 * (num_parameters - looked_up) + 6 * c.NH * c.HS * sum(2 * T * w - w * w for w in seen) // T

    # ------------------------------------------------------------------------------------------------ one block

    def block(self, b: Frame, x: Tensor, B: int, T: int) -> tuple[Tensor, Matrix]:
        """One block for x (n, C), up to its gate: (residual2, swiglu). fcproj then adds the rest.

        Training, prefill and decode use it; backward too, where it computes the block once more."""
        c, n = self.cfg, B * T
        qkv = blocks.linear(b, "qkv", x, b.a("qkv", n, self.W), norm="ln1", rms=self.norm, bias=c.qkv_bias)
        q, k, v = self._attended(b, qkv, B, T)
        if c.qk_norm:
            for name, out, heads in zip(("qnorm", "knorm"), (q, k), self._heads(qkv, B, T), strict=False):
                blocks.rmsnorm(b, name, _rows(heads), _rows(out), **self.norm)
        turns = b.mode.positions is not None and c.kind(b.index) != "n"  # attention does, where a token is written
        if not turns:
            self._rope(b, *((q, k) if c.qk_norm else (self._turned(qkv, B, T),)))
        att = b.a("att", n, c.NH * c.HS)
        (out,) = self._heads(att, B, T)
        blocks.attention(b, out, q, k, v, self.scale, **self._sees(b), **(self._angles(b) if turns else {}))
        residual2 = self._added(b, "attproj", b.matmul_copy("att", att), x, b.a("residual2", n, c.C))
        gateup, swiglu = b.a("gateup", n, 2 * c.F), b.matmul_a("swiglu", n, c.F)
        how: dict[str, Any] = {"norm": "ln2", "rms": self.norm, "bias": c.mlp_bias}
        return residual2, blocks.gated(b, "gateup", residual2, gateup, swiglu, c.act, **how)

    def _added(self, b: Frame, name: str, x: Matrix, stream: Tensor, out: Tensor) -> Tensor:
        """out = stream + linear layer `name` of x, or with post-norms the norm of that. Returns out."""
        if not self.cfg.post_norms:
            return blocks.linear(b, name, x, out, add=stream, bias=self.biased[name])
        made = blocks.linear(b, name, x, b.a(name, *out.shape), bias=self.biased[name])
        return blocks.rmsnorm(b, POST[name], made, out, add=stream, **self.norm)

    def _added_backward(self, b: Frame, name: str, d: Tensor) -> Tensor:
        """The gradient of linear layer `name`'s output, from d, that of the stream to which it was added."""
        if not self.cfg.post_norms:
            return d
        d_made, made = b.d(name, *d.shape), b.a(name, *d.shape)
        blocks.rmsnorm_backward(b, POST[name], d_made, d, made, starts=True, kept=False, offset=self.offset)
        return d_made

    def block_backward(self, b: Frame, d: Tensor, x: Tensor, B: int, T: int) -> None:
        """d (n, C) is the gradient of the block's output, and becomes that of its input x. Makes every gradient of the
        block."""
        c, n = self.cfg, B * T
        residual2, gateup = b.a("residual2", n, c.C), b.a("gateup", n, 2 * c.F)
        d_made = self._added_backward(b, "fcproj", d)
        d_out = b.matmul_copy("d_residual3", d_made, plain=True)
        blocks.adapter_grad(b, "fcproj", d_out)
        swiglu = blocks.gated_backward(b, "fcproj", gateup, d_out, c.act)
        blocks.weight_grad(b, "fcproj", d_out, swiglu)
        if c.mlp_bias:
            blocks.bias_grad(b, "fcproj", d_made)
            blocks.bias_grad(b, "gateup", gateup)
        d_gateup = b.matmul_copy("d_gateup", gateup, plain=True)
        blocks.adapter_grad(b, "gateup", d_gateup)
        d_ln2 = blocks.input_grad(b, "gateup", b.d("ln2", n, c.C), d_gateup)
        ln2 = blocks.rmsnorm_backward(b, "ln2", d, d_ln2, residual2, offset=self.offset)
        blocks.weight_grad(b, "gateup", d_gateup, ln2, late=not b.index)

        qkv, att, d_qkv = b.a("qkv", n, self.W), b.a("att", n, c.NH * c.HS), b.d("qkv", n, self.W)
        d_made = self._added_backward(b, "attproj", d)
        d_mid = b.matmul_copy("d_residual2", d_made, plain=True)
        blocks.adapter_grad(b, "attproj", d_mid)
        blocks.weight_grad(b, "attproj", d_mid, b.matmul_copy("att", att, made=True))
        if c.attproj_bias:
            blocks.bias_grad(b, "attproj", d_made)
        d_att = blocks.input_grad(b, "attproj", b.d("att", n, c.NH * c.HS), d_mid)
        (out,), (d_heads,), grads = (self._heads(y, B, T) for y in (att, d_att, d_qkv))
        seen = self._attended(b, qkv, B, T)
        blocks.attention_backward(b, grads, d_heads, seen, out, self.scale, **self._sees(b))
        self._rope(b, self._turned(d_qkv, B, T), back=True)
        if c.qk_norm:
            for name, dx, heads in zip(("qnorm", "knorm"), grads, self._heads(qkv, B, T), strict=False):
                blocks.rmsnorm_backward(b, name, _rows(dx), _rows(dx), _rows(heads), starts=True, offset=self.offset)
        d_sum = b.matmul_copy("d_qkv", d_qkv, plain=True, db=b.g("qkvb") if c.qkv_bias else None)
        blocks.adapter_grad(b, "qkv", d_sum)
        d_ln1 = blocks.input_grad(b, "qkv", b.d("ln1", n, c.C), d_sum)
        ln1 = blocks.rmsnorm_backward(b, "ln1", d, d_ln1, x, offset=self.offset)
        blocks.weight_grad(b, "qkv", d_sum, ln1, late=not b.index)

    # ---------------------------------------------------------------------------------------------- whole model

    def _blocks(self, f: Frame, x: Tensor, B: int, T: int, mode: Mode, last: Tensor | None = None) -> Tensor:
        """All blocks. The output of the last one goes into `last`, if given."""
        c = self.cfg
        for l in range(c.L):
            b = f.layer(f"h.{l}.", l, mode)
            residual2, swiglu = self.block(b, x, B, T)
            out = last if last is not None and l == c.L - 1 else b.a("residual3", *x.shape)
            x = self._added(b, "fcproj", swiglu, residual2, out)
        return x

    def forward(self, f: Frame, tokens: Tensor, kv: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """tokens (B, T) int64 -> the final norm's output (n, C). `kv`, if given, takes all keys and values. documents:
        of packed rows."""
        B, T = tokens.shape
        x = f.a("embedded", B * T, self.cfg.C)
        f.k.embedding_forward(x, tokens, f.w("wte"), None, **self._embed(f))
        x = self._blocks(f, x, B, T, Mode(cache=kv, documents=documents))
        return blocks.rmsnorm(f, "lnf", x, f.a("lnf", *x.shape), **self.norm)

    def decode(self, f: Frame, tokens: Tensor, positions: Tensor, kv: Tensor, last: Tensor) -> Tensor:
        """Logits (n, Vp) that follow one more token of each of n sequences, at their positions (n). Reads and adds to
        kv. `last` (n, C) is for the last block's output, as the logits may have the bytes of any other."""
        n = tokens.shape[0]
        mode, x = Mode(cache=kv, positions=positions, few=n <= FEW_ROWS), f.a("embedded", n, self.cfg.C)
        f.k.embedding_decode(x, tokens, positions, f.w("wte"), None, **self._embed(f))
        x, logits = self._blocks(f, x, n, 1, mode, last), f.a("logits", n, self.cfg.Vp)
        return blocks.linear(f.layer("", 0, mode), "", x, logits, norm="lnf", rms=self.norm, tied=self.head_weight)

    def backward(self, f: Frame, tokens: Tensor, *, first: bool, documents: Documents | None = None) -> None:
        """From d_lnf (n, C) to every gradient. `first` overwrites gradients, later micro-steps add.

        It ends at the lowest layer with a trainable parameter."""
        (B, T), L, C = tokens.shape, self.cfg.L, self.cfg.C
        n, again = B * T, self.recompute == RECOMPUTE_BLOCK
        embeds = f.trains("wte")
        lowest = 0 if embeds else next((l for l in range(L) if f.trains(f"h.{l}.")), L)
        rewritten = REWRITTEN.get(self.recompute, ())
        mode = Mode(True, not first, recomputed=again, rewritten=rewritten, documents=documents)
        d, x, top = f.a("d_residual", n, C), f.a(f"h.{L - 1}.residual3", n, C), f.layer("", 0, Mode(True, not first))
        blocks.rmsnorm_backward(top, "lnf", d, f.a("d_lnf", n, C), x, starts=True, offset=self.offset)
        for l in reversed(range(lowest, L)):
            b = f.layer(f"h.{l}.", l, mode)
            x = f.a(f"h.{l - 1}.residual3" if l else "embedded", n, C)
            if again:
                residual2, swiglu = self.block(b, x, B, T)
                if self.cfg.post_norms:
                    self._added(b, "fcproj", swiglu, residual2, b.a("residual3", n, C))
            self.block_backward(b, d, x, B, T)
            if l:
                f.final()
        # As in GPT-2: two matmuls of block 0 come last, so that the embedding's reduction has something to hide behind.
        if embeds:
            how = {"accumulate": not first, "tied": self.cfg.tied, **self._embed(f)}
            f.k.embedding_backward(f.g("wte"), None, d, tokens, **how)
        f.final()
        for gradient in mode.late:
            gradient()
        f.final()

    def cache_shape(self, rows: int, T: int) -> tuple[int, ...]:
        """Keys and values of `rows` sequences of up to T tokens; heads in front of time, as decoding reads them."""
        return self.cfg.L, 2, rows, self.cfg.NKV, T, self.cfg.HS

    def _embed(self, f: Frame) -> dict[str, float]:
        """By what the embedding is multiplied: a number of the compute dtype, as in transformers."""
        return {"scale": torch.tensor(math.sqrt(self.cfg.C), dtype=f.dtype).item()} if self.cfg.embed_scale else {}

    def _rope(self, b: Frame, *heads: Tensor, back: bool = False) -> None:
        """Turn queries and keys, or their gradients, as layers of this kind do."""
        if self.cfg.kind(b.index) != "n":
            blocks.rope(b, heads, back=back, **self._angles(b))

    def _angles(self, b: Frame) -> dict[str, Any]:
        """The constant that has the angles of layers of this kind, and by what sines and cosines are multiplied."""
        name = "window_freq" if self.cfg.kind(b.index) == "w" and self.cfg.window_theta else "freq"
        return {"freq": b.constant(name), "attention": self.freq[name][1]}

    def _heads(self, x: Tensor, B: int, T: int) -> Sequence[Tensor]:
        """q, k and v of a packed qkv (n, W), or one output, as strided views (B, T, heads, HS)."""
        c, heads = self.cfg, x.view(B, T, -1, self.cfg.HS)
        return torch.split(heads, [c.NH, c.NKV, c.NKV], 2) if heads.shape[2] > c.NH else (heads,)

    def _turned(self, x: Tensor, B: int, T: int) -> Tensor:
        """Queries and keys of a packed qkv in one view: their heads follow each other, so one kernel turns all."""
        return x.view(B, T, -1, self.cfg.HS)[:, :, : self.cfg.NH + self.cfg.NKV]

    def _attended(self, b: Frame, qkv: Tensor, B: int, T: int) -> Sequence[Tensor]:
        """q, k and v as attention reads them: QK-norm has outputs of its own."""
        q, k, v = self._heads(qkv, B, T)
        return (b.a("qnorm", *q.shape), b.a("knorm", *k.shape), v) if self.cfg.qk_norm else (q, k, v)

    def _sees(self, b: Frame) -> dict[str, int]:
        """How attention of this layer is limited."""
        return {"window": self.cfg.window} if self.cfg.kind(b.index) == "w" else {}


def _rows(x: Tensor) -> Tensor:
    """(B, T, heads, HS) as (n, heads, HS)."""
    return x.view(-1, *x.shape[2:])
