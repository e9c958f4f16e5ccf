"""The parameter table: the only truth about weights. Names, shapes, decay, initialisation, and where each one lies.

Weights, gradients, masters and moments are flat buffers with one layout. Rows are ordered by (optimizer group,
backward order), so the optimizer is one launch a group and gradients become final front to back: buckets of
contiguous memory can be reduced while backward still runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 128  # elements: 256 bytes in bf16, more in wider dtypes


@dataclass(frozen=True)
class Row:
    """One parameter. `std` draws N(0, std) for the first `drawn_rows` rows (None: all), else every value is `fill`."""

    name: str
    shape: tuple[int, ...]
    decay: bool
    std: float | None = None
    fill: float = 0.0
    drawn_rows: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Consecutive rows that share an optimizer rule: elements [start, stop) of every flat buffer."""

    name: str
    start: int
    stop: int
    decay: bool


class ParamTable:
    """Rows in forward order with their offsets (in elements) in the flat buffers."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = {row.name: row for row in rows}
        assert len(self.rows) == len(rows), "parameter names must be unique"
        self.offsets: dict[str, int] = {}
        self.groups: list[Group] = []
        offset = 0
        for name, decay in (("decay", True), ("no_decay", False)):
            start = offset
            for row in reversed(rows):
                if row.decay == decay:
                    self.offsets[row.name] = offset
                    offset += -(-row.numel // ALIGN) * ALIGN
            self.groups.append(Group(name, start, offset, decay))
        self.numel = offset

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, padding rows of the vocabulary included (as llm.c counts)."""
        return sum(row.numel for row in self.rows.values())

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The parameter `name` inside a flat buffer, in its shape."""
        row = self.rows[name]
        return flat[self.offsets[name] : self.offsets[name] + row.numel].view(row.shape)

    def layout(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """(name, offset, shape) of every row: how a flat buffer maps to names, for checkpoints."""
        return [(name, self.offsets[name], row.shape) for name, row in self.rows.items()]

    def owned_ranges(self) -> Iterator[tuple[int, int]]:
        """Element ranges of the flat buffers whose optimizer state this process owns: all of them, on one process."""
        yield 0, self.numel


@torch.no_grad()
def init_parameters(table: ParamTable, flat: Tensor, seed: int) -> None:
    """Draw initial weights into `flat` (N, fp32 or wider, CPU), in forward order from one generator.

    Equal to llm.c's and PyTorch's: torch.nn.init.normal_ with a CPU generator, tensor after tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    flat.zero_()
    for name, row in table.rows.items():
        view = table.view(flat, name)
        if row.std is None:
            view.fill_(row.fill)
        elif flat.dtype == torch.float32:
            view[: row.drawn_rows].normal_(0.0, row.std, generator=generator)
        else:  # draw in fp32 so that every precision starts from the same numbers
            shape = view[: row.drawn_rows].shape
            view[: row.drawn_rows].copy_(torch.empty(shape).normal_(0.0, row.std, generator=generator))
