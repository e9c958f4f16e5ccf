"""The end that families share: logits and their loss, forward and backward, chunk by chunk of the rows.

Logits are by far the widest activation: V is 65 times C in GPT-2 124M. A chunk of rows goes through matmul, loss and
both matmuls of backward before the next one starts, in the same bytes. So full-size logits never exist.

In chats a row is often context, which is not learned. `head_learned` leaves such rows out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from daybreak.models.frame import Frame
from daybreak.shapes import Shape

HEAD_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # upper limit for one chunk of logits; a GPU needs more work at once


class Head:
    """Part of a model: `head_weight` (Vp, C) is the parameter that makes logits, the embedding where both are tied."""

    cfg: Shape
    head_weight = "wte"
    softcap = 0.0  # of logits; 0 = none
    z_loss = 0.0  # weight of logsumexp(logits)^2 in what is minimised, not in the losses
    offset = 0.0  # what norms add to their weights
    weightless: Mapping[str, str] = {}  # outputs of norms without weights -> the constant that is in their place
    matmuls: Mapping[str, tuple[str, str]] = {}  # what could be in fp8 (see registry.Model)
    together: Collection[tuple[str, str]] = ()
    remade: Collection[str] = ()  # inputs of matmuls that backward makes again
    asks: Mapping[str, Collection[str]] = {}  # nothing that a backend may lack (see registry.Model)
    parts: Mapping[str, tuple[str, ...]] = {}  # and packed layers count as one

    def __init__(self, device_type: str) -> None:
        self.head_bytes = HEAD_BYTES[device_type]

    def constants(self) -> Mapping[str, Tensor]:
        """None; see registry.Model."""
        return {}

    def head_rows(self, n: int, dtype: torch.dtype) -> int:
        """Rows of one chunk of logits: a power of two under the limit. Changes summation order, so a fixed rule."""
        return min(n, 1 << max(0, (self.head_bytes // (self.cfg.Vp * dtype.itemsize)).bit_length() - 1))

    def head_loss(
        self, f: Frame, hidden: Tensor, targets: Tensor, losses: Tensor, scale: Tensor, *, backward: bool, first: bool,
        d: str = "d_lnf",
    ) -> None:  # fmt: skip
        """Per-token losses (n) of hidden (n, C) for targets (n). With `backward` also the head's gradient, and that of
        hidden, which is called `d`."""
        k, n = f.k, hidden.shape[0]
        weight, step = f.matmul_w(self.head_weight), self.head_rows(n, hidden.dtype)
        given = {"softcap": self.softcap, "z_loss": self.z_loss * backward}
        how = {name: x for name, x in given.items() if x}
        d_hidden = f.a(d, n, self.cfg.C) if backward else None
        for start in f.chunks(n, step):
            rows = slice(start, min(start + step, n))
            logits = self._product(f, hidden[rows])
            k.classifier(losses[rows], logits, targets[rows], scale, V=self.cfg.V, backward=backward, **how)
            if d_hidden is not None:  # logits now hold d_logits
                adds = not first or start > 0
                k.matmul_backward_input(d_hidden[rows], logits, weight)
                if (dw := f.g(self.head_weight)) is not None:
                    k.matmul_backward_weight(dw, logits, hidden[rows], accumulate=adds)

    def head_learned(
        self, f: Frame, hidden: Tensor, targets: Tensor, at: Tensor, losses: Tensor, scale: Tensor, *, first: bool
    ) -> None:
        """The same with backward for r of the n rows, and their losses (r). Row i is row at[i] of them, for at (n)
        int32. Where that is r or more, the row is not learned, and its gradient is zero."""
        (n, C), r = hidden.shape, losses.shape[0]
        rows, learned = f.a("picked", r, C), f.a("picked_targets", r, dtype=torch.int64)
        f.k.pick_forward(rows, learned, hidden, targets, at)
        self.head_loss(f, rows, learned, losses, scale, backward=True, first=first, d="d_picked")
        f.k.pick_backward(f.a("d_lnf", n, C), f.a("d_picked", r, C), at)

    def head_logits(self, f: Frame, hidden: Tensor) -> Tensor:
        """Logits (r, Vp) of r rows of hidden, r at most one chunk."""
        logits = self._product(f, hidden)
        if self.softcap:
            f.k.cap_logits(logits, cap=self.softcap)
        return logits

    def _product(self, f: Frame, hidden: Tensor) -> Tensor:
        """The same before the soft-cap, which the loss takes too."""
        logits = f.a("logits", hidden.shape[0], self.cfg.Vp)
        f.k.matmul_forward(logits, hidden, f.matmul_w(self.head_weight))
        return logits
