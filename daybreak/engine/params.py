"""The parameter table: the only truth about weights. Names, shapes, decay, initialisation, and where each one lies.

Weights, gradients, fp32 master weights and moments are flat buffers with one layout. Rows are ordered by optimizer
group, and in a group by backward order. So the optimizer is one launch a group, and gradients become final front to
back: buckets of contiguous memory can be reduced while backward still runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from daybreak.models.rows import Row

ALIGN = 128  # elements: 256 bytes in bf16, more in wider dtypes


@dataclass(frozen=True)
class Group:
    """Consecutive rows that the optimizer treats alike: elements [start, stop) of every flat buffer."""

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
        for decay in (True, False):
            start = offset
            for row in reversed(rows):
                if row.decay == decay:
                    self.offsets[row.name] = offset
                    offset += -(-row.numel // ALIGN) * ALIGN
            self.groups.append(Group(start, offset, decay))
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


@torch.no_grad()
def draw_parameters(rows: list[Row], seed: int, put: Callable[[str, Tensor], None]) -> None:
    """Draw initial weights, fp32 on the CPU, on all of torch's threads; put(name, value) is called on several of them.

    Equal to llm.c's and PyTorch's, however many those are: torch.nn.init.normal_ with one CPU generator, tensor after
    tensor in forward order. Turning the generator's numbers into normal ones is the slow part; the generator runs
    ahead to the beginning of each tensor, so that several can be drawn at once.
    """

    def draw(row: Row, state: Tensor | None) -> None:
        value = torch.full(row.shape, row.fill)
        if row.std is not None and state is not None:
            generator = torch.Generator()
            generator.set_state(state)
            value[: row.drawn_rows].normal_(0.0, row.std, generator=generator)
        put(row.name, value)

    ahead, skipped = torch.Generator().manual_seed(seed), torch.empty(1 << 20)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        jobs = []
        for row in rows:
            jobs.append(pool.submit(draw, row, ahead.get_state() if row.std is not None else None))
            if row.std is not None:
                _skip(ahead, math.prod((row.drawn_rows or row.shape[0], *row.shape[1:])), skipped)
        for job in jobs:
            job.result()


def _skip(generator: torch.Generator, numel: int, buffer: Tensor) -> None:
    """Advance `generator` as a normal_ of `numel` fp32 elements does: one number each, if they are multiples of 16."""
    if numel % 16:
        torch.empty(numel).normal_(generator=generator)
        return
    for start in range(0, numel, buffer.numel()):
        buffer[: numel - start].random_(generator=generator)
