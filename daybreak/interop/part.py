"""How our parameters lie in other programs' tensors, and how they are read from there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from daybreak.errors import CheckpointError
from daybreak.interop.source import layout
from daybreak.shapes import Shape


@dataclass(frozen=True)
class Part:
    """A tensor of Hugging Face's: it holds `rows` of one of our parameters, (out, in), or `transposed`, (in, out)."""

    name: str
    rows: slice | Tensor
    transposed: bool = False

    def theirs(self, x: Tensor) -> Tensor:
        """The tensor's values, from those of our parameter."""
        return (x[self.rows].T if self.transposed else x[self.rows]).contiguous()

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write the tensor's values into our parameter x."""
        x[self.rows] = value.T if self.transposed else value


def reader(
    path: Path, cfg: Shape, parts: Mapping[str, list[tuple[Part, str]]], found: Mapping[str, tuple[int, ...]],
    raw: Callable[[str], Tensor], spare: Collection[str], says: str,
) -> Callable[[str], Tensor]:  # fmt: skip
    """A function from our parameter's name to its values, in the dtype of the file's tensors.

    parts: of each parameter, with their tensors. found: the file's tensors and their shapes. raw: a tensor's values.
    spare: tensors that are left out. says: what describes the shape, for messages. CheckpointError unless the file has
    what is wanted, and nothing else.
    """
    shapes = {name: shape for name, _, shape in layout(cfg)}
    wanted = {key: (shapes[name], part) for name in shapes for part, key in parts[name]}
    if odd := next((key for key in found if key not in wanted and key not in spare), None):
        raise CheckpointError(f"{path} is no plain {cfg.arch}: daybreak has no place for {odd!r}.")
    for key, (shape, part) in wanted.items():
        if key not in found:
            raise CheckpointError(f"{path} lacks the tensor {key!r}; copy the model again.")
        if found[key] != (theirs := tuple(part.theirs(torch.empty(shape, device="meta")).shape)):
            raise CheckpointError(f"{path}: {key!r} has shape {found[key]}, its {says} says {theirs}.")

    def read(name: str) -> Tensor:
        values = [raw(key) for _, key in parts[name]]
        out = values[0].new_zeros(shapes[name])
        for (part, _), value in zip(parts[name], values, strict=True):
            part.put(out, value)
        return out

    return read
