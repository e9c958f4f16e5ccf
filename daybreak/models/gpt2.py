"""GPT-2 as a list of kernel calls: what is computed, in which order, into which buffer. Read it from top to bottom.

B sequences of T tokens are n = B T rows. There are C channels, NH heads of HS, and a vocabulary of V, padded to Vp.
The residual stream x (n, C) runs through L blocks:

    tokens -> embedded                                                              embedding
       x -> ln1 -> qkv -> attention -> attproj -> + x = residual2                   `block`
            residual2 -> ln2 -> fc -> gelu -> fcproj -> + residual2 = residual3     the next block's x
    residual3 -> lnf -> logits -> loss                                              head

Backward goes through the same list from its end. One tensor, d, is the gradient of the residual stream all the way
down: each half of a block adds its part. The pieces are in blocks.py. Some cross the border of a layer to save a pass
over memory: a matmul adds the residual stream, and a layernorm's backward sums the bias gradient of the linear layer
below it. The head (head.py) runs in chunks, forward, loss and backward.

`recompute` trades time for memory. Level 1 keeps no GELU output, and level 2 no layernorm output either. A backward
kernel that has the input at hand writes them once more. Level 3 keeps only the blocks' inputs, and runs `block` again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch import Tensor

from daybreak.models import blocks
from daybreak.models.frame import Documents, Frame, Matrix, Mode
from daybreak.models.head import Head
from daybreak.models.rows import Row, layernorm_rows, linear_rows
from daybreak.shapes import GPT2Config

FEW_ROWS = 2  # decoded at once by the kernel for few rows: it takes 0.8 ms for each more of 1558M's (NOTES.md)
REWRITTEN = {1: ("gelu",), 2: ("gelu", "ln1", "ln2")}  # by recompute level: outputs that backward kernels write again
RECOMPUTE_BLOCK = 3
MATMULS: Mapping[str, tuple[str, str]] = {  # weight -> its input, and its output's gradient: fp8 takes all three
    "qkvw": ("ln1", "d_qkv"),
    "attprojw": ("att", "d_residual2"),
    "fcw": ("ln2", "d_fc"),
    "fcprojw": ("gelu", "d_residual3"),
}


class GPT2(Head):
    """GPT-2 or GPT-3 of one shape (Radford et al. 2019; Brown et al. 2020, dense attention)."""

    matmuls = MATMULS
    together: Collection[tuple[str, str]] = (("fcw", "fcprojw"),)  # a kernel with GELU spans both

    def __init__(self, cfg: GPT2Config, recompute: int = 0, device_type: str = "cpu") -> None:
        super().__init__(device_type)
        self.cfg, self.recompute = cfg, recompute
        self.remade = [x for x, _ in MATMULS.values()] if recompute == RECOMPUTE_BLOCK else REWRITTEN.get(recompute, ())
        self.heads, self.scale = (cfg.NH, cfg.HS), 1.0 / math.sqrt(cfg.HS)

    def rows(self) -> list[Row]:
        """The parameters in forward order, with llm.c's names and initialisation."""
        c, C = self.cfg, self.cfg.C
        std, residual_std = 0.02, 0.02 / math.sqrt(2 * c.L)
        rows = [Row("wte", (c.Vp, C), True, std, drawn_rows=c.V), Row("wpe", (c.max_T, C), True, std)]
        for h in (f"h.{l}." for l in range(c.L)):
            rows += [*layernorm_rows(h + "ln1", C), *linear_rows(h + "qkv", 3 * C, C, std, (C, C, C))]
            rows += linear_rows(h + "attproj", C, C, residual_std)
            rows += [*layernorm_rows(h + "ln2", C), *linear_rows(h + "fc", 4 * C, C, std)]
            rows += linear_rows(h + "fcproj", C, 4 * C, residual_std)
        return [*rows, *layernorm_rows("lnf", C)]

    def flops_per_token(self, T: int, num_parameters: int) -> int:
        """Training FLOPs per token as llm.c counts them: 6 P for the matmuls, 6 L C T for causal attention."""
        return 6 * num_parameters + 6 * self.cfg.L * self.cfg.C * T

    # ------------------------------------------------------------------------------------------------ one block

    def block(self, b: Frame, x: Tensor, B: int, T: int) -> tuple[Tensor, Matrix]:
        """One block for x (n, C), up to its GELU: (residual2, gelu). fcproj is left to the caller.

        Training, prefill and decode use it. Backward with recompute 3 runs it again, without fcproj."""
        n, C = B * T, self.cfg.C
        qkv = blocks.linear(b, "qkv", x, b.a("qkv", n, 3 * C), norm="ln1")
        att = b.a("att", n, C)
        (out,), (q, k, v) = self._heads(att, B, T), self._heads(qkv, B, T)
        blocks.attention(b, out, q, k, v, self.scale)
        residual2 = blocks.linear(b, "attproj", b.matmul_copy("att", att), b.a("residual2", n, C), add=x)
        gelu = blocks.linear(b, "fc", residual2, b.matmul_a("gelu", n, 4 * C), norm="ln2", pre=b.a("fc", n, 4 * C))
        return residual2, gelu

    def block_backward(self, b: Frame, d: Tensor, x: Tensor, B: int, T: int, below: Tensor | None) -> None:
        """d (n, C) is the gradient of the block's output, and becomes that of its input x. ln1's backward sums d into
        `below` (C), the gradient of fcproj's bias one block down. This block's own came with d, from the one above."""
        n, C = B * T, self.cfg.C
        residual2, fc, d_fc = b.a("residual2", n, C), b.a("fc", n, 4 * C), b.matmul_a("d_fc", n, 4 * C, plain=True)
        d_out = b.matmul_copy("d_residual3", d, plain=True)
        blocks.adapter_grad(b, "fcproj", d_out)
        gelu = blocks.gelu_input_grad(b, "fcproj", "fc", d_fc, d_out, fc)
        blocks.weight_grad(b, "fcproj", d_out, gelu)
        blocks.adapter_grad(b, "fc", d_fc)
        d_ln2 = blocks.input_grad(b, "fc", b.d("ln2", n, C), d_fc)
        ln2 = blocks.layernorm_backward(b, "ln2", d, d_ln2, residual2, below=b.g("attprojb"))
        blocks.weight_grad(b, "fc", d_fc, ln2, late=not b.index)

        qkv, att, d_qkv = b.a("qkv", n, 3 * C), b.a("att", n, C), b.d("qkv", n, 3 * C)
        d_mid = b.matmul_copy("d_residual2", d, plain=True)
        blocks.adapter_grad(b, "attproj", d_mid)
        blocks.weight_grad(b, "attproj", d_mid, b.matmul_copy("att", att, made=True))
        d_att = blocks.input_grad(b, "attproj", b.d("att", n, C), d_mid)
        (out,), (d_heads,) = self._heads(att, B, T), self._heads(d_att, B, T)
        blocks.attention_backward(b, self._heads(d_qkv, B, T), d_heads, self._heads(qkv, B, T), out, self.scale)
        d_sum = b.matmul_copy("d_qkv", d_qkv, plain=True, db=b.g("qkvb"))
        blocks.adapter_grad(b, "qkv", d_sum)
        d_ln1 = blocks.input_grad(b, "qkv", b.d("ln1", n, C), d_sum)
        ln1 = blocks.layernorm_backward(b, "ln1", d, d_ln1, x, below=below)
        blocks.weight_grad(b, "qkv", d_sum, ln1, late=not b.index)

    # ---------------------------------------------------------------------------------------------- whole model

    def _blocks(self, f: Frame, x: Tensor, B: int, T: int, mode: Mode, last: Tensor | None = None) -> Tensor:
        """All blocks. The output of the last one goes into `last`, if given."""
        for l in range(self.cfg.L):
            b = f.layer(f"h.{l}.", l, mode)
            residual2, gelu = self.block(b, x, B, T)
            out = last if last is not None and l == self.cfg.L - 1 else b.a("residual3", *x.shape)
            x = blocks.linear(b, "fcproj", gelu, out, add=residual2)
        return x

    def forward(self, f: Frame, tokens: Tensor, kv: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """tokens (B, T) int64 -> the final layernorm's output (n, C). `kv`, if given, takes all keys and values.
        documents: of packed rows."""
        (B, T), C = tokens.shape, self.cfg.C
        x = f.a("embedded", B * T, C)
        if documents is None:
            f.k.embedding_forward(x, tokens, f.w("wte"), f.w("wpe"))
        else:
            f.k.embedding_decode(x, tokens.view(-1), documents.positions, f.w("wte"), f.w("wpe"))
        mode = Mode(cache=kv, documents=documents)
        return blocks.layernorm(f, "lnf", self._blocks(f, x, B, T, mode), f.a("lnf", B * T, C))

    def decode(self, f: Frame, tokens: Tensor, positions: Tensor, kv: Tensor, last: Tensor) -> Tensor:
        """Logits (n, Vp) that follow one more token of each of n sequences, at their positions (n). Reads and adds to
        kv. `last` (n, C) takes the last block's output. The logits may use the bytes of any activation, not these."""
        n = tokens.shape[0]
        mode = Mode(cache=kv, positions=positions, few=n <= FEW_ROWS)
        x = f.a("embedded", n, self.cfg.C)
        f.k.embedding_decode(x, tokens, positions, f.w("wte"), f.w("wpe"))
        x = self._blocks(f, x, n, 1, mode, last)
        return blocks.linear(f.layer("", 0, mode), "", x, f.a("logits", n, self.cfg.Vp), norm="lnf", tied="wte")

    def backward(self, f: Frame, tokens: Tensor, *, first: bool, documents: Documents | None = None) -> None:
        """From d_lnf (n, C) to every gradient. `first` overwrites gradients, later micro-steps add.

        It ends at the lowest layer with a trainable parameter."""
        (B, T), L, C = tokens.shape, self.cfg.L, self.cfg.C
        n, again = B * T, self.recompute == RECOMPUTE_BLOCK
        embeds = f.trains("wte", "wpe")
        lowest = 0 if embeds else next((l for l in range(L) if f.trains(f"h.{l}.")), L)
        rewritten = REWRITTEN.get(self.recompute, ())
        mode = Mode(True, not first, recomputed=again, rewritten=rewritten, documents=documents)
        d, x, below = f.a("d_residual", n, C), f.a(f"h.{L - 1}.residual3", n, C), f.g(f"h.{L - 1}.fcprojb")
        top = f.layer("", 0, Mode(True, not first))  # for the norm above the layers
        blocks.layernorm_backward(top, "lnf", d, f.a("d_lnf", n, C), x, below=below, starts=True)
        for l in reversed(range(lowest, L)):
            b = f.layer(f"h.{l}.", l, mode)
            x = f.a(f"h.{l - 1}.residual3" if l else "embedded", n, C)
            if again:
                self.block(b, x, B, T)
            self.block_backward(b, d, x, B, T, below=f.g(f"h.{l - 1}.fcprojb") if l else None)
            if l:
                f.final()
        # The embedding's gradient is the largest and the last that the chain of d gives. Two matmuls of block 0 that
        # nothing waits for come after it, so that its reduction between ranks has something to hide behind.
        if embeds:
            dwpe = f.g("wpe")
            f.k.embedding_backward(f.g("wte"), None if documents else dwpe, d, tokens, accumulate=not first)
            if documents:  # places restart, so wpe is a table that they look up as tokens do
                places = documents.positions.view(B, T)
                f.k.embedding_backward(dwpe, None, d, places, accumulate=not first, tied=False)
        f.final()
        for gradient in mode.late:
            gradient()
        f.final()

    def cache_shape(self, rows: int, T: int) -> tuple[int, ...]:
        """Keys and values of `rows` sequences of up to T tokens; heads in front of time, as decoding reads them."""
        return self.cfg.L, 2, rows, self.cfg.NH, T, self.cfg.HS

    def _heads(self, x: Tensor, B: int, T: int) -> list[Tensor]:
        """(n, j C) as j strided views (B, T, NH, HS): q, k, v of a packed qkv, or one output."""
        return list(x.view(B, T, -1, *self.heads).unbind(2))
