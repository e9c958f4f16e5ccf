"""nanochat's model as a list of kernel calls. Read models/gpt2.py and models/llama.py first.

B sequences of T tokens are n = B T rows. There are C channels, NH heads of HS, and a vocabulary of V, padded to Vp. The
residual stream x (n, C) runs through L blocks, and x0 is what it starts as:

    tokens -> embedded -> norm -> smear = x0 = x                                       embedding
       mixed = resid x + x0 x0 -> ln1 -> qkv -> rope and norm of q, k -> attention -> attproj             `block`
                         v += gate(ln1) * ve[tokens], in every other layer
       attproj + mixed = residual2 -> ln2 -> fc -> squared ReLU -> fcproj
       fcproj + residual2 = residual3                                                  the next block's x
    fcproj + residual2 - backout * (residual3 of layer L / 2) = backed -> lnf -> logits -> soft-cap -> loss       head

The stream is rounded where it is stored, as x0, residual2, residual3 and backed, and nowhere else. `mixed` is never
stored: each kernel that reads it computes it from x and x0 (kernels/mix.py). The last block's output is not stored
either. So neither is rounded. On a CPU, nanochat under torch.compile rounds so too.
Each layer has two learned numbers, `resid` and `x0`. The second one has the name of the stream that it multiplies.

Norms have no weights: the constant `ones` is in their place. nanochat multiplies the norms of q and k by 1.2 each, and
here that is a part of attention's scale. nanochat rotates q and k the other way. In its weights, the rows that make
the second half of a head of q or k therefore have the opposite sign. One kernel rotates and norms q and k, and rounds
once. Backward computes its outputs again, in a buffer that all layers share.

Backward adds up two gradients on the way down: d, that of the residual stream, and d_x0. Backout reads the output of
layer L / 2, so it has a part in that output's gradient: d_middle. This part waits, in fp32, until d has come down to
there. Then both are added, and the sum is rounded once:

    backward      lnf, backout    blocks L - 1 to L / 2 + 1          blocks L / 2 to 0      embedding
    d             written         goes down, then += d_middle        goes down              += d_x0
    d_middle      written         waits
    d_x0                          written, then added to             added to               is in d

`recompute`: level 1 keeps no output of the squared ReLU, level 2 none of ln1 and ln2 either. Level 3 keeps only the
blocks' inputs, and runs `block` again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from daybreak.models import blocks
from daybreak.models.frame import Documents, Frame, Matrix, Mode
from daybreak.models.head import Head
from daybreak.models.rows import Row
from daybreak.shapes.nanochat import GATE_CHANNELS, SMEAR_CHANNELS, NanochatConfig

REWRITTEN = {1: ("relu2",), 2: ("relu2", "ln1", "ln2")}  # by recompute level: outputs that backward writes again
RECOMPUTE_BLOCK = 3
SHARPER = 1.2  # what queries and keys are multiplied by after their norms
MATMULS: Mapping[str, tuple[str, str]] = {  # weight -> its input, and its output's gradient: fp8 takes all three
    "qkvw": ("ln1", "d_qkv"),
    "attprojw": ("att", "d_residual2"),
    "fcw": ("ln2", "d_fc"),
    "fcprojw": ("relu2", "d_residual3"),
}


class Nanochat(Head):
    """nanochat (Karpathy 2025), as its run of March 2026 has it."""

    cfg: NanochatConfig
    matmuls = MATMULS
    weightless: Mapping[str, str] = {"ln1": "ones", "ln2": "ones"}
    head_weight = "headw"
    parts: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v")}
    asks: Mapping[str, Collection[str]] = dict.fromkeys(
        ("attention_forward", "attention_backward", "attention_decode"), ("window",)
    )

    def __init__(self, cfg: NanochatConfig, recompute: int = 0, device_type: str = "cpu") -> None:
        super().__init__(device_type)
        self.cfg, self.recompute, self.softcap = cfg, recompute, cfg.softcap
        self.remade = [x for x, _ in MATMULS.values()] if recompute == RECOMPUTE_BLOCK else REWRITTEN.get(recompute, ())
        self.scale, self.middle = SHARPER**2 / math.sqrt(cfg.HS), cfg.L // 2

    def constants(self) -> dict[str, Tensor]:
        freq = 1.0 / self.cfg.theta ** (torch.arange(0, self.cfg.HS, 2, dtype=torch.float32) / self.cfg.HS)
        return {"freq": freq, "ones": torch.ones(self.cfg.C)}

    def rows(self) -> list[Row]:
        """The parameters in forward order, with nanochat's initialisation: projections onto the stream start at 0."""
        c, C, L = self.cfg, self.cfg.C, self.cfg.L
        bound = math.sqrt(3 / C)  # a standard deviation of 1 / sqrt(C)
        rows = [Row("wte", (c.Vp, C), True, 0.8, drawn_rows=c.V)]
        rows += [Row("smearw", (SMEAR_CHANNELS,), False, bound=0.02, positive=True)]
        rows += [Row("smear", (1,), False, wide=True)]
        for l in range(L):
            h, depth = f"h.{l}.", l / max(L - 1, 1)
            rows += [Row(h + "resid", (1,), True, fill=1.15 - 0.1 * depth, wide=True)]
            rows += [Row(h + "x0", (1,), False, fill=0.2 - 0.15 * depth, wide=True)]
            if c.valued(l):
                rows += [Row(h + "ve", (c.Vp, C), True, bound=bound, drawn_rows=c.V)]
                rows += [Row(h + "gatew", (c.NH, GATE_CHANNELS), True, bound=0.02, positive=True)]
            rows += [Row(h + "qkvw", (3 * C, C), True, bound=bound, stacked=(C, C, C))]
            rows += [Row(h + "attprojw", (C, C), True), Row(h + "fcw", (4 * C, C), True, bound=0.4 * bound)]
            rows += [Row(h + "fcprojw", (C, 4 * C), True)]
        rows += [Row("backout", (1,), False, fill=0.2, wide=True)]
        return [*rows, Row("headw", (c.Vp, C), True, 0.001, drawn_rows=c.V)]

    def flops_per_token(self, T: int, num_parameters: int) -> int:
        """Training FLOPs per token: 6 for each parameter that a matmul reads, and 12 C in each layer for each key that
        a query sees on average, T / 2 without a window."""
        c = self.cfg
        tables = 1 + sum(map(c.valued, range(c.L)))
        seen = [min(T, c.window) if c.kind(l) == "w" else T for l in range(c.L)]
        return 6 * (num_parameters - tables * c.Vp * c.C) + 6 * c.C * sum(2 * T * w - w * w for w in seen) // T

    # ------------------------------------------------------------------------------------------------ one block

    def block(self, b: Frame, x: Tensor, x0: Tensor, tokens: Tensor, B: int, T: int) -> tuple[Tensor, Matrix]:
        """One block for its input x (n, C), x0 (n, C) and tokens (n), up to the squared ReLU: (residual2, relu2).
        fcproj is left to the caller.

        Training, prefill and decode use it. Backward with recompute 3 runs it again, without fcproj."""
        c, n = self.cfg, B * T
        qkv = blocks.linear(b, "qkv", self._mixed_norm(b, "ln1", None, x, x0), b.a("qkv", n, 3 * c.C), bias=False)
        if c.valued(b.index):
            values = qkv.view(n, 3 * c.NH, c.HS)[:, 2 * c.NH :]
            b.k.value_forward(values, tokens, b.w("ve"), b.w("gatew"), *self._mixed(b, x, x0))
        qk, att = self._turned(b, b.a("qk", n, 2 * c.NH, c.HS), qkv, T), b.a("att", n, c.C)
        q, k, v = self._attended(qk, qkv, B, T)
        blocks.attention(b, att.view(B, T, c.NH, c.HS), q, k, v, self.scale, **self._sees(b))
        residual2 = blocks.linear(b, "attproj", b.matmul_copy("att", att), b.a("residual2", n, c.C), bias=False)
        ln2 = self._mixed_norm(b, "ln2", residual2, x, x0)  # which first adds the stream to residual2
        fc, relu2 = b.a("fc", n, 4 * c.C), b.matmul_a("relu2", n, 4 * c.C)
        if not b.mode.few and (w := blocks.fused_w(b, "fc", ln2, relu2)) is not None:
            b.k.matmul_relu2_forward(relu2, fc, ln2, w)
        else:
            b.k.relu2_forward(relu2, blocks.linear(b, "fc", ln2, fc, bias=False))
        return residual2, relu2

    def block_backward(
        self, b: Frame, d: Tensor, d_x0: Tensor, x: Tensor, x0: Tensor, tokens: Tensor, B: int, T: int, d_middle: Tensor
    ) -> None:
        """d (n, C) is the gradient of the block's output, and becomes that of its input x. Block L / 2 + 1 adds
        d_middle (n, C) to it. The last block writes d_x0 (n, C), and the others add to it. Makes every gradient of the
        block."""
        c, n = self.cfg, B * T
        residual2, fc = b.a("residual2", n, c.C), b.a("fc", n, 4 * c.C)
        d_out = b.matmul_copy("d_residual3", d, plain=True)
        blocks.adapter_grad(b, "fcproj", d_out)
        d_fc, (relu2, rewrite) = b.d("relu2", n, 4 * c.C), b.output("relu2", n, 4 * c.C)  # d_relu2 becomes d_fc
        if (w := blocks.fused_w(b, "fcproj", d_out, relu2)) is not None:
            b.k.matmul_relu2_backward(d_fc, rewrite, d_out, w, fc)
        else:
            b.k.relu2_backward(blocks.input_grad(b, "fcproj", d_fc, d_out), rewrite, fc)
        blocks.weight_grad(b, "fcproj", d_out, relu2)
        d_fc_copy = b.matmul_copy("d_fc", d_fc, plain=True)
        blocks.adapter_grad(b, "fc", d_fc_copy)
        d_ln2 = blocks.input_grad(b, "fc", b.d("ln2", n, c.C), d_fc_copy)
        ln2 = self._norm_backward(b, "ln2", d, d_ln2, residual2)
        blocks.weight_grad(b, "fc", d_fc_copy, ln2, late=not b.index)

        qkv, att, d_qkv = b.a("qkv", n, 3 * c.C), b.a("att", n, c.C), b.d("qkv", n, 3 * c.C)
        qk = b.a("qk.again", n, 2 * c.NH, c.HS, plain=True)
        if not b.mode.recomputed:  # else `block` has just made it, under this name
            self._turned(b, qk, qkv, T)
        d_mid = b.matmul_copy("d_residual2", d, plain=True)
        blocks.adapter_grad(b, "attproj", d_mid)
        blocks.weight_grad(b, "attproj", d_mid, b.matmul_copy("att", att, made=True))
        d_att = blocks.input_grad(b, "attproj", b.d("att", n, c.C), d_mid)
        heads, d_both = (B, T, c.NH, c.HS), self._qk_heads(d_qkv)
        grads = self._attended(d_both, d_qkv, B, T)
        seen = self._attended(qk, qkv, B, T)
        blocks.attention_backward(b, grads, d_att.view(heads), seen, att.view(heads), self.scale, **self._sees(b))
        b.k.rope_norm_backward(d_both, self._qk_heads(qkv), b.constant("freq"), b.mode.places, T=T, eps=c.eps)
        d_sum = b.matmul_copy("d_qkv", d_qkv, plain=True)
        blocks.adapter_grad(b, "qkv", d_sum)
        d_ln1 = blocks.input_grad(b, "qkv", b.d("ln1", n, c.C), d_sum)
        if c.valued(b.index):
            d_values = d_qkv.view(n, 3 * c.NH, c.HS)[:, 2 * c.NH :]
            self._value_backward(b, d_ln1, d_values, x, x0, tokens, B, T)
        ln1, rewrite = b.output("ln1", n, c.C)
        outputs, add = (d, d_x0, b.g("resid"), b.g("x0"), rewrite), d_middle if b.index == self.middle + 1 else None
        how = {"accumulate_dy": b.index < c.L - 1, "accumulate": b.mode.accumulate}
        b.k.mix_norm_backward(*outputs, d, d_ln1, *self._mixed(b, x, x0), add, **how)
        blocks.weight_grad(b, "qkv", d_sum, ln1, late=not b.index)

    def _value_backward(
        self, b: Frame, d_ln1: Tensor, d_values: Tensor, x: Tensor, x0: Tensor, tokens: Tensor, B: int, T: int
    ) -> None:
        """Gradients of the layer's value embeddings and their gates; adds to that of ln1's output."""
        n, adds = B * T, b.mode.accumulate
        d_ve, stream = b.d("ve", n, self.cfg.C), self._mixed(b, x, x0)
        b.k.value_backward(
            d_ve, d_ln1, b.g("gatew"), d_values, tokens, b.w("ve"), b.w("gatew"), *stream, accumulate=adds
        )
        if (d_table := b.g("ve")) is not None:
            b.k.embedding_backward(d_table, None, d_ve, tokens.view(B, T), accumulate=adds, tied=False)

    # ---------------------------------------------------------------------------------------------- whole model

    def _embedded(self, f: Frame, tokens: Tensor, mode: Mode, B: int, T: int) -> Tensor:
        """x0 (n, C) of tokens (B, T), or of one more token of each sequence."""
        c, n = self.cfg, B * T
        x, e, out = f.a("embedded", n, c.C), f.a("normed", n, c.C), f.a("smeared", n, c.C)
        f.k.embedding_forward(x, tokens, f.w("wte"), None)
        f.k.rmsnorm_forward(e, f.a("normed.rstd", n, dtype=f.acc), x, f.constant("ones"), eps=c.eps)
        gate, cache = (f.w("smearw"), f.w("smear")), None if mode.cache is None else mode.cache[c.L, 0]
        if mode.positions is not None:
            f.k.smear_decode(out, cache, e, *gate, mode.positions)
            return out
        f.k.smear_forward(out.view(B, T, c.C), e.view(B, T, c.C), *gate, mode.places)
        if mode.cache is not None:
            f.k.cache_write(mode.cache[c.L], *[e.view(B, T, c.NH, c.HS)] * 2)
        return out

    def _blocks(self, f: Frame, tokens: Tensor, B: int, T: int, mode: Mode, backed: Tensor | None = None) -> Tensor:
        """From tokens (B, T) to the last norm's output (n, C). `backed`, if given, is for the stream before it."""
        c, eps = self.cfg, self.cfg.eps
        x = x0 = self._embedded(f, tokens, mode, B, T)
        backed = f.a("backed", *x.shape) if backed is None else backed
        for l in range(c.L):
            b = f.layer(f"h.{l}.", l, mode)
            residual2, relu2 = self.block(b, x, x0, tokens.view(-1), B, T)
            last = l == c.L - 1
            x, add = (backed, None) if last else (b.a("residual3", *x.shape), residual2)
            blocks.linear(b, "fcproj", relu2, x, add=add, bias=False)
        middle, out = f.a(f"h.{self.middle}.residual3", *x.shape), f.a("lnf", *x.shape)
        if self.middle == c.L - 1:  # in one or two layers this is the last block's output, which backout reads stored
            f.k.mix_add(middle, residual2, backed)
        rstd = f.a("lnf.rstd", len(x), dtype=f.acc)
        f.k.mix_norm_forward(backed, out, rstd, residual2, middle, None, f.w("backout"), eps=eps, factor=-1.0)
        return out

    def forward(self, f: Frame, tokens: Tensor, kv: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """tokens (B, T) int64 -> the last norm's output (n, C). `kv`, if given, takes all keys, values and embeddings.
        documents: of packed rows."""
        B, T = tokens.shape
        return self._blocks(f, tokens, B, T, Mode(cache=kv, documents=documents))

    def decode(self, f: Frame, tokens: Tensor, positions: Tensor, kv: Tensor, last: Tensor) -> Tensor:
        """Logits (n, Vp) that follow one more token of each of n sequences, at their positions (n). Reads and adds to
        kv. `last` (n, C) is for the stream before the last norm, as the logits may have the bytes of any other."""
        n = tokens.shape[0]
        return self.head_logits(f, self._blocks(f, tokens.view(n, 1), n, 1, Mode(cache=kv, positions=positions), last))

    def backward(self, f: Frame, tokens: Tensor, *, first: bool, documents: Documents | None = None) -> None:
        """From d_lnf (n, C) to every gradient. `first` overwrites gradients, later micro-steps add.

        It ends at the lowest layer with a trainable parameter."""
        c, (B, T) = self.cfg, tokens.shape
        n, L, again = B * T, c.L, self.recompute == RECOMPUTE_BLOCK
        embeds = f.trains("wte", "smear", "smearw")
        lowest = 0 if embeds else next((l for l in range(L) if f.trains(f"h.{l}.")), L)
        rewritten = REWRITTEN.get(self.recompute, ())
        mode = Mode(True, not first, recomputed=again, rewritten=rewritten, documents=documents)
        top = f.layer("", 0, Mode(True, not first, documents=documents))
        d, d_x0 = f.a("d_residual", n, c.C), f.a("d_x0", n, c.C)
        d_middle = f.a("d_middle", n, c.C, dtype=f.acc)  # its rounding would show in step 1's gradients of the scalars
        x0, middle = f.a("smeared", n, c.C), f.a(f"h.{self.middle}.residual3", n, c.C)
        inputs = (f.a("d_lnf", n, c.C), f.a("backed", n, c.C), middle, f.a("lnf.rstd", n, dtype=f.acc), f.w("backout"))
        f.k.mix_backward(d, d_middle, f.g("backout"), *inputs, factor=-1.0, accumulate=not first)
        if self.middle == L - 1:  # no block L / 2 + 1 is there to add it
            f.k.mix_add(d, d, d_middle)
        for l in reversed(range(lowest, L)):
            b = f.layer(f"h.{l}.", l, mode)
            x = f.a(f"h.{l - 1}.residual3", n, c.C) if l else x0
            if again:
                self.block(b, x, x0, tokens.view(-1), B, T)
            self.block_backward(b, d, d_x0, x, x0, tokens.view(-1), B, T, d_middle)
            if l:
                f.final()
        if embeds:
            f.k.mix_add(d, d, d_x0)
            self._embedded_backward(top, d, tokens)
        f.final()
        for gradient in mode.late:
            gradient()
        f.final()

    def _embedded_backward(self, f: Frame, d: Tensor, tokens: Tensor) -> None:
        """From d (n, C), the gradient of x0, to those of smear and embedding."""
        (B, T), C, adds = tokens.shape, self.cfg.C, f.mode.accumulate
        d_e, e, rows = f.d("normed", *d.shape), f.a("normed", *d.shape), (B, T, C)
        f.k.smear_backward(
            d_e.view(rows), f.g("smearw"), f.g("smear"), d.view(rows), e.view(rows), f.w("smearw"), f.w("smear"),
            f.mode.places, accumulate=adds,
        )  # fmt: skip
        self._norm_backward(f, "normed", d_e, d_e, f.a("embedded", *d.shape), starts=True, kept=False)
        if (d_table := f.g("wte")) is not None:
            f.k.embedding_backward(d_table, None, d_e, tokens, accumulate=adds, tied=False)

    def cache_shape(self, rows: int, T: int) -> tuple[int, ...]:
        """Keys and values of `rows` sequences of up to T tokens, heads in front of time, as decoding reads them. One
        layer more keeps the normed embeddings: smear reads that of the token before."""
        return self.cfg.L + 1, 2, rows, self.cfg.NH, T, self.cfg.HS

    # --------------------------------------------------------------------------------------------------- pieces

    def _mixed(self, b: Frame, x: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        """The parts of the block's mixed stream, and what ln1 kept of it."""
        return x, x0, b.a("ln1.rstd", len(x), dtype=b.acc), b.w("resid"), b.w("x0")

    def _mixed_norm(self, b: Frame, name: str, res: Tensor | None, x: Tensor, x0: Tensor) -> Matrix:
        """The RMSNorm (n, C) of the mixed stream. With res (n, C), res += the stream, and the norm is that of res."""
        out, rstd = b.matmul_a(name, *x.shape), b.a(name + ".rstd", len(x), dtype=b.acc)
        b.k.mix_norm_forward(res, out, rstd, x, x0, b.w("resid"), b.w("x0"), eps=self.cfg.eps)
        return out

    def _turned(self, b: Frame, qk: Tensor, qkv: Tensor, T: int) -> Tensor:
        """qk (n, 2 NH, HS) = the heads of queries and keys of qkv (n, 3 C), turned and normed. Returns qk."""
        b.k.rope_norm_forward(qk, self._qk_heads(qkv), b.constant("freq"), b.mode.places, T=T, eps=self.cfg.eps)
        return qk

    def _norm_backward(
        self, b: Frame, name: str, d: Tensor, d_out: Tensor, x: Tensor, *, starts: bool = False, kept: bool = True
    ) -> Matrix:
        """Add the gradient of the norm's input x (n, C) to d; `starts` overwrites d instead, which may then be d_out.
        Returns the norm's output, or x if the output is not `kept` for a matmul."""
        out, rewrite = b.output(name, *x.shape) if kept else (x, None)
        rstd, ones = b.a(name + ".rstd", len(x), dtype=b.acc), b.constant("ones")
        b.k.rmsnorm_backward(d, None, rewrite, d_out, x, rstd, ones, accumulate_dx=not starts, accumulate=False)
        return out

    def _qk_heads(self, qkv: Tensor) -> Tensor:
        """The heads of queries and keys (n, 2 NH, HS) of a packed qkv (n, 3 C)."""
        return qkv.view(len(qkv), -1, self.cfg.HS)[:, : 2 * self.cfg.NH]

    def _attended(self, qk: Tensor, qkv: Tensor, B: int, T: int) -> list[Tensor]:
        """q and k of qk (n, 2 NH, HS), and v of qkv (n, 3 C), as attention reads or writes them: (B, T, NH, HS)."""
        NH = self.cfg.NH
        heads = (qk[:, :NH], qk[:, NH:], qkv.view(len(qkv), -1, self.cfg.HS)[:, 2 * NH :])
        return [x.view(B, T, NH, self.cfg.HS) for x in heads]

    def _sees(self, b: Frame) -> dict[str, int]:
        """How attention of this layer is limited."""
        return {"window": self.cfg.window} if self.cfg.kind(b.index) == "w" else {}
