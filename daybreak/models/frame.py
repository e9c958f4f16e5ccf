"""The surroundings of a model while it runs: kernels, and tensors by name.

A model owns no memory. It asks a frame for tensors by name, and gives them to kernels. The same model code runs in
three ways, depending on the frame behind it:

    planning    tensors without memory; kernels note what they read and write (engine/arena.py)
    running     views of the memory that was planned; kernels compute
    counting    nothing but the order in which gradients become final (engine/moments.py)

`b = f.layer("h.3.", 3, mode)` is the same frame as one layer sees it. It puts the prefix before every name, so
`b.w("qkvw")` is the weight `h.3.qkvw`. Its mode says how the model runs this time: whether gradients start or add up,
what backward has to compute again, and whether sequences or single tokens are read. The pieces in blocks.py look that
up, so a model need not say it call by call.

`matmul_w`, `matmul_a` and `matmul_copy` give tensors to matmuls. In fp32, bf16 and fp64 they are plain tensors. Where
training chooses a narrower format for a name, such as fp8, each gives an Operand instead (kernels/operand.py):

    matmul_w       a weight         made from the plain weight when the step begins
    matmul_a       an activation    written in its format by the kernel that computes it
    matmul_copy    a copy           made on the spot, of a tensor that other kernels read in compute dtype
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from daybreak.kernels import Kernels
from daybreak.kernels.operand import Matrix as Matrix
from daybreak.models.adapters import Adapter


class Documents(NamedTuple):
    """Rows of tokens (B, T) that hold several documents each. Attention stays inside a document, and places restart.

    positions (n) int64: the place of each token in its document. lo (B, T) int32: where that document begins."""

    positions: Tensor
    lo: Tensor


@dataclass
class Mode:
    """How all layers run in one pass over the model.

    Backward: `backward` is true. `accumulate` adds gradients to those of earlier micro-steps. `rewritten` names outputs
    that forward did not keep: kernels of backward write them again, on the way. `recomputed`: backward runs whole
    layers again, and their activations get names that end in `.again`. `late` collects weight gradients that the model
    puts off to the end of backward.
    Prefill and decode: `cache` has the keys and values of all layers. `positions` (n) are the places of the tokens that
    decode reads, one of each row. `few`: so few rows decode that one kernel computes a linear layer with its norm.
    Packed rows: `documents` says where each document begins.
    """

    backward: bool = False
    accumulate: bool = False
    rewritten: Collection[str] = ()
    recomputed: bool = False
    late: list[Callable[[], None]] = field(default_factory=list)
    cache: Tensor | None = None
    positions: Tensor | None = None
    few: bool = False
    documents: Documents | None = None

    @property
    def places(self) -> Tensor | None:
        """The place of every token (n); None where it is its place in the row."""
        return self.positions if self.documents is None else self.documents.positions


class Frame(Protocol):
    """Kernels, and tensors by name: of a whole model, or of one layer (see `layer`)."""

    k: Kernels
    dtype: torch.dtype
    acc: torch.dtype  # of statistics and sums
    prefix: str = ""
    index: int = 0
    mode: Mode = Mode()

    def w(self, name: str) -> Tensor:
        """A weight, in compute dtype; a wide scalar (Row.wide) in fp32 at least."""

    def g(self, name: str) -> Tensor | None:
        """Its gradient; a frozen parameter has none."""

    def adapter(self, name: str) -> Adapter | None:
        """The adapter of a linear layer, if it has one."""

    def trains(self, *names: str) -> bool:
        """Whether one of these parameters is trainable, or, of a name such as "h.3.", one of that layer."""

    def constant(self, name: str) -> Tensor:
        """The tensor of this name in the model's `constants`."""

    def a(self, name: str, *shape: int, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        """An activation of this shape (compute dtype by default). Asking for it declares it.

        Where backward runs a layer again, the name gets the ending `.again`. So forward's tensor and the new one have
        lives of their own, and between the two the bytes are free. `plain` asks for the name without the ending."""

    def matmul_w(self, name: str) -> Matrix:
        """A weight (O, I), as matmuls read it."""

    def matmul_a(self, name: str, *shape: int, plain: bool = False) -> Matrix:
        """An activation or gradient of this shape that only matmuls read."""

    def matmul_copy(
        self, name: str, x: Any, *, plain: bool = False, made: bool = False, db: Tensor | None = None
    ) -> Matrix:
        """x, as matmuls read it: itself, or its copy in the format of `name`. `made`: this copy exists already.

        db: the gradient of a bias, which is x's column sums. A kernel that makes a copy computes them on its way."""
        if db is not None:
            self.k.bias_backward(db, x, accumulate=self.mode.accumulate)
        result: Matrix = x
        return result

    def d(self, name: str, *shape: int) -> Tensor:
        """The gradient of an activation."""
        return self.a("d_" + name, *shape, plain=True)

    def output(self, name: str, *shape: int) -> tuple[Matrix, Matrix | None]:
        """The matrix `name` for weight gradients; and the same matrix if the caller must write it again, else None."""
        rewrite = name in self.mode.rewritten
        out = self.matmul_a(name + ".again" if rewrite else name, *shape)
        return out, out if rewrite else None

    def layer(self, prefix: str, index: int, mode: Mode) -> Self:
        """This frame as layer `index` sees it in this mode: a shallow copy, with `prefix` before every name."""
        b = object.__new__(type(self))
        b.__dict__ |= {**self.__dict__, "prefix": prefix, "index": index, "mode": mode}
        return b

    def chunks(self, n: int, step: int) -> Sequence[int]:
        """Where chunks of `step` of n rows start."""
        return range(0, n, step)

    def final(self) -> None:
        """Backward has finished some gradients, so they may be reduced. engine/moments.py finds out which."""
