"""A matrix as matmuls read it, where a narrower number format is chosen for it.

In fp32, bf16 and fp64 a matmul reads and writes plain tensors. A format such as fp8 needs more than one tensor: the
values, a scale that they are multiplied by, and often the same values transposed. The fp8 matmuls of some GPUs only
sum over neighbours in memory, and a linear layer's three matmuls sum over three different dimensions:

    matmul                     sums over    reads of x (n, I)    of dout (n, O)    of w (O, I)
    out (n, O) = x w^T         I            value                                  value
    dx (n, I) = dout w         O                                 value             transposed
    dw (O, I) = dout^T x       n            transposed           transposed

A model asks its frame for such matrices by `matmul_w`, `matmul_a` and `matmul_copy` (models/frame.py). Patterns of
names choose their formats: {"h.*.ln1": e4m3} makes an Operand of every first layernorm's output. The arena counts the
parts like any other tensor, and a call whose arguments hold an Operand goes to the kernels of its format's backend.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor

V = TypeVar("V")
PARTS = ("value", "scale", "transposed", "amax")


@dataclass(frozen=True)
class Format:
    """How a matrix is held: the dtype of its values, whether a transposed copy belongs to it, and the backend whose
    kernels read and write it (see kernels.backend). slots: kernels do not choose its scale. It is a slot of a tensor
    that has the scales of all matrices, and engine/scales.py chooses it once a step."""

    backend: str
    dtype: torch.dtype
    transposed: bool = True
    slots: bool = False

    def of(self, backend: str, *, slots: bool = False, transposed: bool = True) -> Format:
        """The same dtype for other kernels, or with other parts."""
        return Format(backend, self.dtype, transposed, slots)

    @property
    def largest(self) -> float:
        """The largest value."""
        return torch.finfo(self.dtype).max

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a (rows, columns) matrix. One scale serves all of it."""
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"value": ((rows, columns), self.dtype)}
        if not self.slots:
            parts["scale"] = ((), torch.float32)
        return parts | ({"transposed": ((columns, rows), self.dtype)} if self.transposed else {})


@dataclass(frozen=True, eq=False)
class Operand:
    """The matrix value * scale. `transposed` holds the same values with rows and columns exchanged.

    In a format with slots, a part that nobody reads is None. The kernel that rounds takes the largest magnitude into
    `amax`. If `current`, it also chooses the scale, from the values themselves."""

    format: Format
    value: Tensor | None
    scale: Tensor
    transposed: Tensor | None = None
    amax: Tensor | None = None
    current: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: rows and columns."""
        if self.value is not None:
            return tuple(self.value.shape)
        assert self.transposed is not None, "an operand has a part at least"
        return tuple(self.transposed.shape)[::-1]

    def numel(self) -> int:
        """Entries of the matrix."""
        return math.prod(self.shape)


Matrix = Tensor | Operand


def chosen(of: Mapping[str, V], name: str) -> V | None:
    """The value, such as a format, of the first pattern that a name fits."""
    return next((value for pattern, value in of.items() if fnmatchcase(name, pattern)), None)


def tensors_of(x: object, parts: Collection[str] = PARTS) -> list[Tensor]:
    """The tensors behind an argument of a kernel; of an Operand, these parts."""
    if isinstance(x, Operand):
        return [part for name in parts if (part := getattr(x, name)) is not None]
    return [x] if isinstance(x, Tensor) else []
