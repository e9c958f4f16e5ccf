"""How a frozen matrix is held, if not as a plain tensor: in NF4 (nf4.py), or in fp8.

In fp8 a frozen matrix (O, I) is in e4m3 for good, with one scale, a power of two, so that matmuls read it as it lies:

    h.0.qkvw.e4m3    (O, I)   its values, as bytes         in checkpoints
    h.0.qkvw.scale   ()       fp32                         in checkpoints
    h.0.qkvw.turned  (I, O)   the bytes transposed, which input gradients read; made when weights are loaded

Evaluation and generation read value * scale in compute dtype. bf16 and fp32 hold all such products exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from daybreak.kernels import nf4
from daybreak.kernels.fp8 import E4M3, F32, power_of_two
from daybreak.kernels.nf4 import Packed
from daybreak.kernels.operand import Operand

ROWS = 512  # of a matrix that are rounded at a time
TURNED = ".turned"
SUFFIXES: Mapping[str, tuple[str, ...]] = {"nf4": nf4.SUFFIXES, "fp8": (".e4m3", ".scale")}  # of what is saved


@dataclass(frozen=True)
class Eight:
    """A matrix (O, I) in e4m3. turned: the transposed copy, if input gradients read it."""

    value: Tensor
    scale: Tensor
    turned: Tensor | None = None
    dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.value.shape)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """In the order of SUFFIXES."""
        return self.value, self.scale

    def operand(self, backend: str) -> Operand:
        """The matrix as fp8 matmuls of this backend read it."""
        format = E4M3.of(backend)
        turned = None if self.turned is None else self.turned.view(format.dtype)
        return Operand(format, self.value.view(format.dtype), self.scale, turned)


Held = Packed | Eight


def plain_name(name: str) -> str:
    """The matrix that a tensor is a part of, or the tensor itself."""
    parts = (part for suffixes in SUFFIXES.values() for part in suffixes)
    return next((name.removesuffix(part) for part in parts if name.endswith(part)), name)


def parts_of(
    how: str, name: str, shape: tuple[int, ...], rows: tuple[int, ...]
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the saved parts of matrix `name`, in the order of SUFFIXES. rows: how many rows each of the
    matrices has that are packed in it. Raises ConfigError if it cannot be held so."""
    return nf4.packed_parts(name, shape, rows) if how == "nf4" else [(shape, torch.uint8), ((), F32)]


def assembled(
    how: str, shape: tuple[int, ...], rows: tuple[int, ...], parts: Sequence[Tensor], turned: Tensor | None = None
) -> Held:
    """The matrix that these parts make, in the order of SUFFIXES."""
    return Packed(shape, rows, *parts) if how == "nf4" else Eight(parts[0], parts[1], turned)


@torch.no_grad()
def pack(out: Held, value: Tensor) -> None:
    """out = value (O, I), of any float dtype and device."""
    if isinstance(out, Packed):
        nf4.pack(out, value)
        return
    largest = torch.stack([part.abs().amax() for part in torch.split(value, ROWS)]).amax()
    out.scale.copy_(power_of_two(largest.to(F32).div(E4M3.largest).view(1))[0])
    for rows, part in zip(torch.split(out.value, ROWS), torch.split(value, ROWS), strict=True):
        wide = part.to(out.value.device, F32).div_(out.scale)
        rows.view(E4M3.dtype).copy_(wide.clamp_(-E4M3.largest, E4M3.largest))
    turn(out)


def turn(out: Held) -> None:
    """Make the transposed copy, after the parts were set."""
    if isinstance(out, Eight) and out.turned is not None:
        out.turned.copy_(out.value.t())


def dense(held: Held, out: Tensor) -> Tensor:
    """out (O, I) = the matrix. out has any float dtype, on the CPU or the matrix's device. Returns out."""
    if isinstance(held, Packed):
        return nf4.dense(held, out)
    return widened(held, out)


def widened(held: Eight, out: Tensor) -> Tensor:
    """out (O, I) = value * scale. Nothing is allocated. Returns out."""
    return out.copy_(held.value.view(E4M3.dtype)).mul_(held.scale)
