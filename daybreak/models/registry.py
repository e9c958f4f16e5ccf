"""The registry of families. Everything outside `models` reaches a model through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from daybreak.models.frame import Documents, Frame
from daybreak.models.gpt2 import GPT2
from daybreak.models.llama import Llama
from daybreak.models.nanochat import Nanochat
from daybreak.models.rows import Row
from daybreak.shapes import Shape


class Model(Protocol):
    """The parts that a model file provides: its parameters, forward, backward, decode, and its cost."""

    # Operation -> arguments that not every backend has, as attention's lo. Attention whose heads share keys and values
    # asks for `window`: backends that have it take fewer heads of keys than of queries.
    asks: Mapping[str, Collection[str]]
    # Of a block, for fp8 (engine/formats.py): weight -> the matrix that it is multiplied with, and the gradient of the
    # result.
    matmuls: Mapping[str, tuple[str, str]]
    together: Collection[tuple[str, str]]  # pairs of weights whose layers share a kernel: both or none are in fp8
    remade: Collection[str]  # inputs of matmuls that backward makes again: only there have they transposed copies
    offset: float  # that norms add to their weights
    z_loss: float  # optim.z_loss
    weightless: Mapping[str, str]  # outputs of norms without weights -> the constant that is in their place
    # Packed linear layer -> its parts, in order. Each part may have an adapter of its own (adapters.py).
    parts: Mapping[str, tuple[str, ...]]

    @property
    def cfg(self) -> Shape:
        """Its shape."""

    def rows(self) -> list[Row]:
        """Parameters in forward order."""

    def constants(self) -> Mapping[str, Tensor]:
        """Tensors that never change, by the names under which the frame then has them on its device."""

    def flops_per_token(self, T: int, num_parameters: int) -> int:
        """Training FLOPs per token."""

    def forward(self, f: Frame, tokens: Tensor, kv: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """tokens (B, T) -> hidden (n, C), `lnf`; their keys and values into kv, if given. documents: of packed rows."""

    def decode(self, f: Frame, tokens: Tensor, positions: Tensor, kv: Tensor, last: Tensor) -> Tensor:
        """Logits (n, Vp) that follow one more token of each of n sequences, whose keys and values are in kv. `last`
        (n, C) shares bytes with nothing else."""

    def cache_shape(self, rows: int, T: int) -> tuple[int, ...]:
        """Of the keys and values of `rows` sequences of up to T tokens; rows are dimension 2."""

    def head_rows(self, n: int, dtype: torch.dtype) -> int:
        """Rows per chunk of logits."""

    def head_loss(
        self, f: Frame, hidden: Tensor, targets: Tensor, losses: Tensor, scale: Tensor, *, backward: bool, first: bool
    ) -> None:
        """Per-token losses, and the head's backward."""

    def head_learned(
        self, f: Frame, hidden: Tensor, targets: Tensor, at: Tensor, losses: Tensor, scale: Tensor, *, first: bool
    ) -> None:
        """Both for the learned rows alone."""

    def head_logits(self, f: Frame, hidden: Tensor) -> Tensor:
        """Logits (r, Vp) of r rows."""

    def backward(self, f: Frame, tokens: Tensor, *, first: bool, documents: Documents | None = None) -> None:
        """All gradients."""


MODELS: dict[str, Callable[[Any, int, str], Model]] = {  # each takes its own shape
    "gpt2": GPT2,
    "llama": Llama,
    "nanochat": Nanochat,
}


def build_model(cfg: Shape, recompute: int = 0, device_type: str = "cpu") -> Model:
    """The model of a family, by its config's `arch`."""
    return MODELS[cfg.arch](cfg, recompute, device_type)
