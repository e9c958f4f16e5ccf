"""GPT-2 as a schedule: what is computed, in which order, into which buffer. Read it top to bottom; that is what runs.

Shapes: B sequences of T tokens, n = B T rows; C channels, NH heads of HS; V vocabulary, Vp padded. Activations are
named `h.LAYER.NAME`; asking the frame for one declares it. Names used in both directions live from their first
writing to their last reading; the arena lets everything else share bytes.

Fusions that cross layer borders are spelled out: a block's last residual addition also normalises the next block's
input, and the head's forward, loss and backward run chunk by chunk, so full-size logits never exist.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daybreak.engine.arena import Frame
from daybreak.engine.params import Row
from daybreak.kernels import acc_dtype
from daybreak.shapes import GPT2Config

HEAD_BYTES = 256 << 20  # upper limit for one chunk of logits
RECOMPUTE_GELU, RECOMPUTE_LAYERNORM = 1, 2


class GPT2:
    """The schedule of one GPT-2 / GPT-3 shape (Radford et al. 2019; Brown et al. 2020, dense attention)."""

    def __init__(self, cfg: GPT2Config, recompute: int = 0) -> None:
        self.cfg, self.recompute = cfg, recompute
        self.scale = 1.0 / math.sqrt(cfg.HS)

    def rows(self) -> list[Row]:
        """The parameters in forward order, with llm.c's names and initialisation."""
        c, C = self.cfg, self.cfg.C
        std, residual_std = 0.02, 0.02 / math.sqrt(2 * c.L)
        rows = [Row("wte", (c.Vp, C), True, std, drawn_rows=c.V), Row("wpe", (c.max_T, C), True, std)]
        for l in range(c.L):
            h = f"h.{l}."
            rows += [
                Row(h + "ln1w", (C,), False, fill=1.0),
                Row(h + "ln1b", (C,), False),
                Row(h + "qkvw", (3 * C, C), True, std),
                Row(h + "qkvb", (3 * C,), False),
                Row(h + "attprojw", (C, C), True, residual_std),
                Row(h + "attprojb", (C,), False),
                Row(h + "ln2w", (C,), False, fill=1.0),
                Row(h + "ln2b", (C,), False),
                Row(h + "fcw", (4 * C, C), True, std),
                Row(h + "fcb", (4 * C,), False),
                Row(h + "fcprojw", (C, 4 * C), True, residual_std),
                Row(h + "fcprojb", (C,), False),
            ]
        return [*rows, Row("lnfw", (C,), False, fill=1.0), Row("lnfb", (C,), False)]

    def flops_per_token(self, T: int, num_parameters: int) -> int:
        """Training FLOPs per token as llm.c counts them: 6 P for the products, 6 L C T for causal attention."""
        return 6 * num_parameters + 6 * self.cfg.L * self.cfg.C * T

    def ln_name(self, l: int) -> str:
        """Name of the layernorm that opens block l (of the final one for l = L), parameters and activation alike."""
        return f"h.{l}.ln1" if l < self.cfg.L else "lnf"

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, f: Frame, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> the final layernorm's output (n, C)."""
        c, k, B, T = self.cfg, f.k, tokens.shape[0], tokens.shape[1]
        n, C = B * T, c.C
        residual = f.a("embedded", n, C)
        k.embedding_forward(residual, tokens, f.w("wte"), f.w("wpe"))
        ln = f.a("h.0.ln1", n, C)
        mean, rstd = self._stats(f, "h.0.ln1", n)
        k.layernorm_forward(ln, mean, rstd, residual, f.w("h.0.ln1w"), f.w("h.0.ln1b"))

        for l in range(c.L):
            h = f"h.{l}."
            qkv = f.a(h + "qkv", n, 3 * C)
            k.matmul_forward(qkv, ln, f.w(h + "qkvw"), f.w(h + "qkvb"))

            att = f.a(h + "att", n, C)
            q, key, v = self._heads(qkv, B, T)
            k.attention_forward(self._heads(att, B, T)[0], self._lse(f, h, B, T), q, key, v, scale=self.scale)

            proj = f.a(h + "attproj", n, C)
            k.matmul_forward(proj, att, f.w(h + "attprojw"), f.w(h + "attprojb"))

            # residual + layernorm in one pass
            residual2, ln2 = f.a(h + "residual2", n, C), f.a(h + "ln2", n, C)
            mean, rstd = self._stats(f, h + "ln2", n)
            k.residual_layernorm_forward(residual2, ln2, mean, rstd, residual, proj, f.w(h + "ln2w"), f.w(h + "ln2b"))

            fc, gelu = f.a(h + "fc", n, 4 * C), f.a(h + "gelu", n, 4 * C)
            k.matmul_forward(fc, ln2, f.w(h + "fcw"), f.w(h + "fcb"))
            k.gelu_forward(gelu, fc)
            proj = f.a(h + "fcproj", n, C)
            k.matmul_forward(proj, gelu, f.w(h + "fcprojw"), f.w(h + "fcprojb"))

            # residual + the NEXT block's layernorm (the final one after the last block)
            name = self.ln_name(l + 1)
            residual, ln = f.a(h + "residual3", n, C), f.a(name, n, C)
            mean, rstd = self._stats(f, name, n)
            k.residual_layernorm_forward(residual, ln, mean, rstd, residual2, proj, f.w(name + "w"), f.w(name + "b"))
        return ln

    # ---------------------------------------------------------------------------------------- head and classifier

    def head_rows(self, n: int, dtype: torch.dtype) -> int:
        """Rows of one chunk of logits: a power of two under HEAD_BYTES. Changes summation order, so a fixed rule."""
        return min(n, 1 << max(0, (HEAD_BYTES // (self.cfg.Vp * dtype.itemsize)).bit_length() - 1))

    def head_loss(
        self, f: Frame, hidden: Tensor, targets: Tensor, losses: Tensor, scale: Tensor, *, backward: bool, first: bool
    ) -> None:
        """Per-token losses (n) of hidden (n, C) for targets (n); with `backward` also d_lnf and the head's gradient."""
        k, n = f.k, hidden.shape[0]
        wte, step = f.w("wte"), self.head_rows(n, hidden.dtype)
        d_hidden = f.a("d_lnf", n, self.cfg.C) if backward else None
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            logits = f.a("logits", rows.stop - start, self.cfg.Vp)
            k.matmul_forward(logits, hidden[rows], wte)
            k.classifier(losses[rows], logits, targets[rows], scale, V=self.cfg.V, backward=backward)
            if d_hidden is not None:  # logits now hold d_logits
                k.matmul_backward_input(d_hidden[rows], logits, wte)
                k.matmul_backward_weight(f.g("wte"), logits, hidden[rows], accumulate=not first or start > 0)

    def head_logits(self, f: Frame, hidden: Tensor) -> Tensor:
        """Logits (r, Vp) of r rows of hidden, r at most one chunk."""
        logits = f.a("logits", hidden.shape[0], self.cfg.Vp)
        f.k.matmul_forward(logits, hidden, f.w("wte"))
        return logits

    # ------------------------------------------------------------------------------------------------- backward

    def backward(self, f: Frame, tokens: Tensor, *, first: bool) -> None:
        """The mirror image of forward, from d_lnf (n, C) to every gradient. `first` overwrites, others add."""
        c, k, B, T = self.cfg, f.k, tokens.shape[0], tokens.shape[1]
        n, C, acc = B * T, c.C, not first
        d_res = f.a("d_residual", n, C)  # gradient of the residual stream, updated in place all the way down
        self._layernorm_backward(f, d_res, f.a("d_lnf", n, C), c.L, n, first)

        for l in reversed(range(c.L)):
            h = f"h.{l}."
            fc, residual2 = f.a(h + "fc", n, 4 * C), f.a(h + "residual2", n, C)

            # MLP: residual3 = residual2 + fcproj(gelu(fc(ln2)))
            gelu = self._gelu_again(f, h, fc)
            k.bias_backward(f.g(h + "fcprojb"), d_res, accumulate=acc)
            k.matmul_backward_weight(f.g(h + "fcprojw"), d_res, gelu, accumulate=acc)
            d_fc = f.a(h + "d_fc", n, 4 * C)  # first the gradient of gelu's output, then in place of its input
            k.matmul_backward_input(d_fc, d_res, f.w(h + "fcprojw"))
            k.gelu_backward(d_fc, d_fc, fc)
            ln2 = self._layernorm_again(f, h + "ln2", residual2)
            k.bias_backward(f.g(h + "fcb"), d_fc, accumulate=acc)
            k.matmul_backward_weight(f.g(h + "fcw"), d_fc, ln2, accumulate=acc)
            d_ln2 = f.a(h + "d_ln2", n, C)
            k.matmul_backward_input(d_ln2, d_fc, f.w(h + "fcw"))
            mean, rstd = self._stats(f, h + "ln2", n)
            k.layernorm_backward(
                d_res, f.g(h + "ln2w"), f.g(h + "ln2b"), d_ln2, residual2, mean, rstd, f.w(h + "ln2w"),
                accumulate_dx=True, accumulate=acc,
            )  # fmt: skip

            # attention: residual2 = residual + attproj(attention(qkv(ln1)))
            qkv, att = f.a(h + "qkv", n, 3 * C), f.a(h + "att", n, C)
            k.bias_backward(f.g(h + "attprojb"), d_res, accumulate=acc)
            k.matmul_backward_weight(f.g(h + "attprojw"), d_res, att, accumulate=acc)
            d_att, d_qkv = f.a(h + "d_att", n, C), f.a(h + "d_qkv", n, 3 * C)
            k.matmul_backward_input(d_att, d_res, f.w(h + "attprojw"))
            k.attention_backward(
                *self._heads(d_qkv, B, T), self._heads(d_att, B, T)[0], *self._heads(qkv, B, T),
                self._heads(att, B, T)[0], self._lse(f, h, B, T), scale=self.scale,
            )  # fmt: skip
            ln1 = self._layernorm_again(f, h + "ln1", self._residual_into(f, l, n))
            k.bias_backward(f.g(h + "qkvb"), d_qkv, accumulate=acc)
            k.matmul_backward_weight(f.g(h + "qkvw"), d_qkv, ln1, accumulate=acc)
            d_ln1 = f.a(h + "d_ln1", n, C)
            k.matmul_backward_input(d_ln1, d_qkv, f.w(h + "qkvw"))
            self._layernorm_backward(f, d_res, d_ln1, l, n, first)

        k.embedding_backward(f.g("wte"), f.g("wpe"), d_res, tokens, accumulate=acc)

    def _layernorm_backward(self, f: Frame, d_res: Tensor, d_ln: Tensor, l: int, n: int, first: bool) -> None:
        """Backward of the layernorm that opens block l. The final one (l = L) starts the residual gradient."""
        name = self.ln_name(l)
        mean, rstd = self._stats(f, name, n)
        f.k.layernorm_backward(
            d_res, f.g(name + "w"), f.g(name + "b"), d_ln, self._residual_into(f, l, n), mean, rstd,
            f.w(name + "w"), accumulate_dx=l < self.cfg.L, accumulate=not first,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------- named activations

    def _residual_into(self, f: Frame, l: int, n: int) -> Tensor:
        """The residual stream that enters block l (or, for l = L, the final layernorm)."""
        return f.a(f"h.{l - 1}.residual3" if l else "embedded", n, self.cfg.C)

    def _stats(self, f: Frame, name: str, n: int) -> tuple[Tensor, Tensor]:
        acc = acc_dtype(f.w("wte").dtype)
        return f.a(name + ".mean", n, dtype=acc), f.a(name + ".rstd", n, dtype=acc)

    def _lse(self, f: Frame, h: str, B: int, T: int) -> Tensor:
        return f.a(h + "lse", B, self.cfg.NH, T, dtype=acc_dtype(f.w("wte").dtype))

    def _heads(self, x: Tensor, B: int, T: int) -> list[Tensor]:
        """(n, j C) as j strided views (B, T, NH, HS): q, k, v of a packed qkv, or one output."""
        return list(x.view(B, T, -1, self.cfg.NH, self.cfg.HS).unbind(2))

    def _gelu_again(self, f: Frame, h: str, fc: Tensor) -> Tensor:
        """gelu(fc): what forward kept, or computed again."""
        if self.recompute < RECOMPUTE_GELU:
            return f.a(h + "gelu", *fc.shape)
        again = f.a(h + "gelu.again", *fc.shape)
        f.k.gelu_forward(again, fc)
        return again

    def _layernorm_again(self, f: Frame, name: str, residual: Tensor) -> Tensor:
        """A layernorm's output: what forward kept, or computed again (its statistics come out bit-identical)."""
        if self.recompute < RECOMPUTE_LAYERNORM:
            return f.a(name, *residual.shape)
        again = f.a(name + ".again", *residual.shape)
        mean, rstd = self._stats(f, name, residual.shape[0])
        f.k.layernorm_forward(again, mean, rstd, residual, f.w(name + "w"), f.w(name + "b"))
        return again
