"""GPT-2 as a schedule: what is computed, in which order, into which buffer. Read it top to bottom; that is what runs.

Shapes: B sequences of T tokens, n = B T rows; C channels, NH heads of HS; V vocabulary, Vp padded. Activations are
named `h.LAYER.NAME`; asking the frame for one declares it. Names used in both directions live from their first
writing to their last reading; the arena lets everything else share bytes.

Fusions that cross layer borders are spelled out: the products that end a block's two halves add the residual stream
themselves; a layernorm's backward pass also sums the bias gradient of the linear layer below it; the head's forward,
loss and backward run chunk by chunk, so full-size logits never exist.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daybreak.engine.arena import Frame
from daybreak.engine.params import Row
from daybreak.kernels import acc_dtype
from daybreak.shapes import GPT2Config

HEAD_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # upper limit for one chunk of logits; a GPU needs more work at once
FEW_TEXTS = 2  # written at once by kernels that read weights for few rows: 0.8 ms for each more of 1558M's (NOTES.md)
RECOMPUTE_GELU, RECOMPUTE_LAYERNORM, RECOMPUTE_BLOCK = 1, 2, 3


class GPT2:
    """The schedule of one GPT-2 / GPT-3 shape (Radford et al. 2019; Brown et al. 2020, dense attention)."""

    def __init__(self, cfg: GPT2Config, recompute: int = 0, device_type: str = "cpu") -> None:
        self.cfg, self.recompute, self.head_bytes = cfg, recompute, HEAD_BYTES[device_type]
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

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, f: Frame, tokens: Tensor, kv: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 -> the final layernorm's output (n, C). `kv`, if given, takes all keys and values."""
        k, (B, T), C = f.k, tokens.shape, self.cfg.C
        residual = f.a("embedded", B * T, C)
        k.embedding_forward(residual, tokens, f.w("wte"), f.w("wpe"))
        for l in range(self.cfg.L):
            h = f"h.{l}."
            residual2, gelu = self._block_forward(f, l, residual, B, T, kv=kv)
            residual = f.a(h + "residual3", B * T, C)
            k.matmul_forward(residual, gelu, f.w(h + "fcprojw"), f.w(h + "fcprojb"), residual2)
        return self._layernorm_forward(f, "lnf", residual)

    def _block_forward(
        self, f: Frame, l: int, residual: Tensor, B: int, T: int, again: str = "", kv: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Block l up to its GELU: (residual2, gelu). `again` renames the activations of a recomputation."""
        k, c, h, n = f.k, self.cfg, f"h.{l}.", B * T
        ln1 = self._layernorm_forward(f, h + "ln1", residual, again)
        qkv = f.a(h + "qkv" + again, n, 3 * c.C)
        k.matmul_forward(qkv, ln1, f.w(h + "qkvw"), f.w(h + "qkvb"))
        att = f.a(h + "att" + again, n, c.C)
        (out,), (q, key, v) = self._heads(att, B, T), self._heads(qkv, B, T)
        k.attention_forward(out, self._lse(f, h, B, T, again), q, key, v, scale=self.scale)
        if kv is not None:
            k.cache_write(kv[l], key, v)
        residual2 = f.a(h + "residual2" + again, n, c.C)
        k.matmul_forward(residual2, att, f.w(h + "attprojw"), f.w(h + "attprojb"), residual)

        ln2 = self._layernorm_forward(f, h + "ln2", residual2, again)
        fc, gelu = f.a(h + "fc" + again, n, 4 * c.C), f.a(h + "gelu" + again, n, 4 * c.C)
        k.matmul_gelu_forward(gelu, fc, ln2, f.w(h + "fcw"), f.w(h + "fcb"))
        return residual2, gelu

    def _layernorm_forward(self, f: Frame, name: str, x: Tensor, again: str = "") -> Tensor:
        out = f.a(name + again, *x.shape)
        mean, rstd = self._stats(f, name, x.shape[0], again)
        f.k.layernorm_forward(out, mean, rstd, x, f.w(name + "w"), f.w(name + "b"))
        return out

    def decode(self, f: Frame, tokens: Tensor, positions: Tensor, kv: Tensor, last: Tensor) -> Tensor:
        """Logits (b, Vp) that follow one more token of each of b texts, at their positions (b). Reads and adds to kv;
        `last` (b, C) is for the last block's output, where logits may have the bytes of any other.

        Few texts: five launches a block, as a layernorm is part of the product that reads it."""
        k, c, b = f.k, self.cfg, tokens.shape[0]

        def product(
            out: Tensor, x: Tensor, name: str, add: Tensor | None = None, norm: str = "", pre: str = ""
        ) -> None:
            w, bias = f.w(name if name == "wte" else name + "w"), None if name == "wte" else f.w(name + "b")
            if b <= FEW_TEXTS:
                ln = (f.w(norm + "w"), f.w(norm + "b")) if norm else (None, None)
                k.matmul_decode(out, x, w, bias, add, *ln, gelu=bool(pre))
                return
            x = self._layernorm_forward(f, norm, x) if norm else x
            if pre:
                k.matmul_gelu_forward(out, f.a(pre, *out.shape), x, w, bias)
            else:
                k.matmul_forward(out, x, w, bias, add)

        residual = f.a("embedded", b, c.C)
        k.embedding_decode(residual, tokens, positions, f.w("wte"), f.w("wpe"))
        for l in range(c.L):
            h = f"h.{l}."
            qkv, att = f.a(h + "qkv", b, 3 * c.C), f.a(h + "att", b, c.C)
            product(qkv, residual, h + "qkv", norm=h + "ln1")
            (out,), heads = self._heads(att, b, 1), self._heads(qkv, b, 1)
            k.attention_decode(out[:, 0], kv[l], *(x[:, 0] for x in heads), positions, scale=self.scale)
            residual2, gelu = f.a(h + "residual2", b, c.C), f.a(h + "gelu", b, 4 * c.C)
            product(residual2, att, h + "attproj", add=residual)
            product(gelu, residual2, h + "fc", norm=h + "ln2", pre=h + "fc")
            residual = f.a(h + "residual3", b, c.C) if l < c.L - 1 else last
            product(residual, gelu, h + "fcproj", add=residual2)
        logits = f.a("logits", b, c.Vp)
        product(logits, residual, "wte", norm="lnf")
        return logits

    def memory_shape(self, rows: int, T: int) -> tuple[int, ...]:
        """Keys and values of `rows` texts of up to T tokens; heads in front of time, as decoding reads them."""
        return self.cfg.L, 2, rows, self.cfg.NH, T, self.cfg.HS

    # ---------------------------------------------------------------------------------------- head and classifier

    def head_rows(self, n: int, dtype: torch.dtype) -> int:
        """Rows of one chunk of logits: a power of two under the limit. Changes summation order, so a fixed rule."""
        return min(n, 1 << max(0, (self.head_bytes // (self.cfg.Vp * dtype.itemsize)).bit_length() - 1))

    def head_loss(
        self, f: Frame, hidden: Tensor, targets: Tensor, losses: Tensor, scale: Tensor, *, backward: bool, first: bool
    ) -> None:
        """Per-token losses (n) of hidden (n, C) for targets (n); with `backward` also d_lnf and the head's gradient."""
        k, n = f.k, hidden.shape[0]
        wte, step = f.w("wte"), self.head_rows(n, hidden.dtype)
        d_hidden = f.a("d_lnf", n, self.cfg.C) if backward else None
        for start in f.chunks(n, step):
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
        c, k, (B, T) = self.cfg, f.k, tokens.shape
        n, C, acc = B * T, c.C, not first
        whole = self.recompute >= RECOMPUTE_BLOCK
        again = ".again" if whole else ""
        renew = self.recompute in (RECOMPUTE_GELU, RECOMPUTE_LAYERNORM)  # compute GELU once more
        d_res = f.a("d_residual", n, C)  # gradient of the residual stream, updated in place all the way down
        self._layernorm_backward(f, "lnf", d_res, f.a("d_lnf", n, C), self._residual_into(f, c.L, n), first)

        for l in reversed(range(c.L)):
            h, residual = f"h.{l}.", self._residual_into(f, l, n)
            if whole:
                self._block_forward(f, l, residual, B, T, again)
            fc, residual2 = f.a(h + "fc" + again, n, 4 * C), f.a(h + "residual2" + again, n, C)

            # MLP: residual3 = residual2 + fcproj(gelu(fc(ln2))). fcproj's bias gradient came with d_res.
            d_fc, gelu = f.a(h + "d_fc", n, 4 * C), f.a(h + "gelu" + (".again" if renew else again), n, 4 * C)
            k.matmul_gelu_backward(
                d_fc, gelu if renew else None, f.g(h + "fcb"), d_res, f.w(h + "fcprojw"), fc, accumulate=acc
            )
            k.matmul_backward_weight(f.g(h + "fcprojw"), d_res, gelu, accumulate=acc)
            d_ln2 = f.a(h + "d_ln2", n, C)
            k.matmul_backward_input(d_ln2, d_fc, f.w(h + "fcw"))
            ln2 = self._layernorm_backward(f, h + "ln2", d_res, d_ln2, residual2, first)
            if l:
                k.matmul_backward_weight(f.g(h + "fcw"), d_fc, ln2, accumulate=acc)

            # attention: residual2 = residual + attproj(attention(qkv(ln1))). attproj's bias gradient came with d_res.
            qkv, att = f.a(h + "qkv" + again, n, 3 * C), f.a(h + "att" + again, n, C)
            k.matmul_backward_weight(f.g(h + "attprojw"), d_res, att, accumulate=acc)
            d_att, d_qkv = f.a(h + "d_att", n, C), f.a(h + "d_qkv", n, 3 * C)
            k.matmul_backward_input(d_att, d_res, f.w(h + "attprojw"))
            k.attention_backward(
                *self._heads(d_qkv, B, T), self._heads(d_att, B, T)[0], *self._heads(qkv, B, T),
                self._heads(att, B, T)[0], self._lse(f, h, B, T, again), scale=self.scale,
            )  # fmt: skip
            k.bias_backward(f.g(h + "qkvb"), d_qkv, accumulate=acc)
            d_ln1 = f.a(h + "d_ln1", n, C)
            k.matmul_backward_input(d_ln1, d_qkv, f.w(h + "qkvw"))
            ln1 = self._layernorm_backward(f, h + "ln1", d_res, d_ln1, residual, first)
            if l:
                k.matmul_backward_weight(f.g(h + "qkvw"), d_qkv, ln1, accumulate=acc)
                f.final(c.L - 1 - l)

        # The embedding's gradient is the largest and the last that the chain of d_res gives. Two products of block 0
        # that nothing waits for come after it, so that its exchange between ranks has something to hide behind.
        k.embedding_backward(f.g("wte"), f.g("wpe"), d_res, tokens, accumulate=acc)
        f.final(c.L - 1)
        k.matmul_backward_weight(f.g("h.0.fcw"), d_fc, ln2, accumulate=acc)
        k.matmul_backward_weight(f.g("h.0.qkvw"), d_qkv, ln1, accumulate=acc)
        f.final(c.L)

    def final_at(self, name: str) -> int:
        """Blocks L-1 to 1, the embedding, block 0 with all that is no matrix: the moments 0 to L of f.final."""
        part, _, rest = name.removeprefix("h.").partition(".")
        if part in ("wte", "wpe"):
            return self.cfg.L - 1
        matrix = rest in ("qkvw", "attprojw", "fcw", "fcprojw")
        return self.cfg.L - 1 - int(part) if matrix and int(part) else self.cfg.L

    def _layernorm_backward(self, f: Frame, name: str, d_res: Tensor, d_ln: Tensor, x: Tensor, first: bool) -> Tensor:
        """Backward of a layernorm of x into d_res, with the bias gradient below it. Returns the layernorm's output:
        what forward kept, or computed again in the same pass. The final one starts the residual stream's gradient."""
        again = ".again" if self.recompute >= RECOMPUTE_BLOCK and name != "lnf" else ""
        renew = self.recompute == RECOMPUTE_LAYERNORM and name != "lnf"
        out = f.a(name + (".again" if renew else again), *x.shape)
        mean, rstd = self._stats(f, name, x.shape[0], again)
        below = self._bias_below(name)
        f.k.layernorm_backward(
            d_res, f.g(name + "w"), f.g(name + "b"), f.g(below) if below else None, out if renew else None,
            d_ln, x, mean, rstd, f.w(name + "w"), f.w(name + "b"), accumulate_dx=name != "lnf", accumulate=not first,
        )  # fmt: skip
        return out

    def _bias_below(self, name: str) -> str:
        """The bias that was added to the residual stream just before the layernorm `name`; "" for the embedding."""
        if name == "lnf":
            return f"h.{self.cfg.L - 1}.fcprojb"
        _, l, ln = name.split(".")
        if ln == "ln2":
            return f"h.{l}.attprojb"
        return f"h.{int(l) - 1}.fcprojb" if int(l) else ""

    # ------------------------------------------------------------------------------------------- named activations

    def _residual_into(self, f: Frame, l: int, n: int) -> Tensor:
        """The residual stream that enters block l (or, for l = L, the final layernorm)."""
        return f.a(f"h.{l - 1}.residual3" if l else "embedded", n, self.cfg.C)

    def _stats(self, f: Frame, name: str, n: int, again: str) -> tuple[Tensor, Tensor]:
        acc = acc_dtype(f.w("wte").dtype)
        return f.a(name + ".mean" + again, n, dtype=acc), f.a(name + ".rstd" + again, n, dtype=acc)

    def _lse(self, f: Frame, h: str, B: int, T: int, again: str) -> Tensor:
        return f.a(h + "lse" + again, B, self.cfg.NH, T, dtype=acc_dtype(f.w("wte").dtype))

    def _heads(self, x: Tensor, B: int, T: int) -> list[Tensor]:
        """(n, j C) as j strided views (B, T, NH, HS): q, k, v of a packed qkv, or one output."""
        return list(x.view(B, T, -1, self.cfg.NH, self.cfg.HS).unbind(2))
