"""The parameter table: the only truth about weights. Names, shapes, groups, initialisation, and where each one lies.

Weights, gradients and fp32 master weights are flat buffers with one layout. Parameters are ordered by group, and in a
group by backward order. So AdamW is one launch a group, and gradients become final front to back: buckets of contiguous
memory can be reduced while backward still runs.

Of several ranks each updates an equal share of every bucket. A group whose optimizer needs whole parameters gets
buckets of its own, in front. For three ranks and two layers of four matrices each:

    | h.1.fc          | h.1.fcproj | h.1.qkv h.1.attproj || h.0.fc ...      || wte   wpe   biases and layernorms |
    | share of rank 0 | of rank 1  | of rank 2           || the next bucket || cut anywhere, see collectives.py  |

The largest parameter goes first, always into the emptiest share. The more parameters a bucket has, the more evenly they
fill the shares, so a bucket may span many layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate, groupby
from zlib import crc32

import torch
from torch import Tensor

from daybreak.config_keys import OptimConfig
from daybreak.models.adapters import Adapter
from daybreak.models.rows import Row
from daybreak.optimizers import SCALARS, Optimizer, ParamGroup
from daybreak.optimizers.adamw import adamw_group

ALIGN = 128  # elements: 256 bytes in bf16, more in wider dtypes
MOST_PADDING = 1 / 10  # of a group's parameters, where whole ones are spread over ranks; else buckets grow


@dataclass(frozen=True)
class Span:
    """Parameters of a group that lie one after the other, with weight decay or without: elements [start, stop).

    parts: (name, start, stop) of each parameter if the optimizer takes whole ones, else one of all, without a name.
    """

    start: int
    stop: int
    group: ParamGroup
    decay: bool
    parts: list[tuple[str, int, int]]


class ParamTable:
    """Rows in forward order, and offsets (in elements) in the flat buffers. Frozen rows are in no flat buffer.

    groups: a row belongs to the first that fits its name and can take it. world, limit: the number of ranks, and the
    elements of a bucket, for groups whose optimizers need whole parameters. `buckets` are the (start, stop) of these
    groups. They come first in the flat buffers, and end at `whole`. hyper: (optimizer, scale of the learning rate) ->
    its slice of the device scalars. trainable: names of trainable parameters and, as "h.3.", of their layers.
    adapters: of linear layers, by their names.
    """

    def __init__(
        self, rows: list[Row], groups: Sequence[ParamGroup] = (adamw_group(OptimConfig()),), world: int = 1,
        limit: int = 1 << 24, adapters: Mapping[str, Adapter] | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.adapters = {row.name: row for row in rows}, adapters or {}
        assert len(self.rows) == len(rows), "parameter names must be unique"
        self.offsets: dict[str, int] = {}
        self.spans: list[Span] = []
        self.buckets: list[tuple[int, int]] = []
        self.numel = 0
        group_of = {
            r.name: next(g for g in groups if fnmatchcase(r.name, g.names) and g.optimizer.takes(r))
            for r in rows if r.trainable
        }  # fmt: skip
        for group in sorted(dict.fromkeys(groups), key=lambda g: not g.optimizer.whole):
            for decay in (True, False):
                chosen = [row for row in reversed(rows) if row.decay == decay and group_of.get(row.name) is group]
                if not chosen:
                    continue
                start, whole = self.numel, group.optimizer.whole
                for shares in _spread(chosen, world, limit) if whole else [[chosen]]:
                    first = self.numel
                    self._place(shares)
                    self.buckets += [(first, self.numel)] if whole else []
                each = [(row.name, self.offsets[row.name], self.offsets[row.name] + row.numel) for row in chosen]
                self.spans.append(Span(start, self.numel, group, decay, each if whole else [("", start, self.numel)]))
        self.whole = self.buckets[-1][1] if self.buckets else 0
        # Of the model, padding rows of the vocabulary included (as llm.c counts).
        self.num_parameters = sum(row.numel for row in rows)
        self.frozen = [row for row in rows if not row.trainable]
        self.trainable = {*self.offsets, *(name.rpartition(".")[0] + "." for name in self.offsets)}
        self.hyper: dict[tuple[Optimizer, float], slice] = {}
        at = 0
        for key in dict.fromkeys((span.group.optimizer, span.group.lr_scale) for span in self.spans):
            size = len(SCALARS) + len(key[0].scalars(1))
            self.hyper[key], at = slice(at, at + size), at + size

    def _place(self, shares: list[list[Row]]) -> None:
        """Place the shares of a bucket one after the other, all as long as the fullest, and the rows in each."""
        size = _fullest(shares)
        for share in shares:
            for row, end in zip(share, accumulate(map(_padded, share)), strict=True):
                self.offsets[row.name] = self.numel + end - _padded(row)
            self.numel += size

    def unlike_ranks(self, world: int) -> list[int]:
        """One rank of each kind. The ranks of a kind own whole parameters of the same shapes, in the same order. So
        they need the same memory."""
        owned: list[list[tuple[int, ...]]] = [[] for _ in range(world)]
        whole = {start: name for span in self.spans for name, start, _ in span.parts if name}
        for first, stop in self.buckets:
            for start in sorted(at for at in whole if first <= at < stop):
                owned[(start - first) * world // (stop - first)].append(self.rows[whole[start]].shape)
        return [rank for rank, shapes in enumerate(owned) if owned.index(shapes) == rank]

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The parameter `name` inside a flat buffer, in its shape."""
        row = self.rows[name]
        return flat[self.offsets[name] : self.offsets[name] + row.numel].view(row.shape)

    def layout(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """(name, offset, shape) of every trainable row: how a flat buffer maps to names, for checkpoints."""
        return [(name, self.offsets[name], row.shape) for name, row in self.rows.items() if row.trainable]


def _padded(row: Row) -> int:
    return -(-row.numel // ALIGN) * ALIGN


def _spread(rows: list[Row], world: int, limit: int) -> list[list[list[Row]]]:
    """Cut rows, in backward order, into buckets of about `limit` elements. Returns each bucket's shares, each a list of
    rows. Buckets grow until the shares are filled evenly (MOST_PADDING)."""
    ends = dict(zip(rows, accumulate(map(_padded, rows)), strict=True))
    total = ends[rows[-1]]
    for count in range(max(1, total // limit), 0, -1):
        runs = groupby(rows, lambda row, n=count: (ends[row] - 1) * n // total)  # type: ignore[misc]
        buckets = [_shares(list(run), world) for _, run in runs]
        if world * sum(map(_fullest, buckets)) <= (1 + MOST_PADDING) * total:
            break
    return buckets


def _shares(rows: list[Row], world: int) -> list[list[Row]]:
    """The rows of each rank's share of a bucket: the largest row first, always into the emptiest share."""
    shares: list[list[Row]] = [[] for _ in range(world)]
    for row in sorted(rows, key=_padded, reverse=True):
        min(shares, key=lambda share: sum(map(_padded, share))).append(row)
    return shares


def _fullest(shares: list[list[Row]]) -> int:
    """Elements of the fullest share."""
    return max(sum(map(_padded, share)) for share in shares)


@torch.no_grad()
def draw_parameters(rows: list[Row], seed: int, put: Callable[[str, Tensor], None]) -> None:
    """Draw initial weights, fp32 on the CPU, on all of torch's threads. put(name, value) is called on several of them.

    They equal llm.c's and PyTorch's: torch.nn.init.normal_ with one CPU generator, tensor after tensor in forward
    order. The slow part turns the generator's numbers into normal ones. So one generator only runs `ahead`, to the
    start of each tensor, and threads draw the tensors from its states there. The number of threads changes no bit.
    """

    def draw(row: Row, state: Tensor | None) -> None:
        value = torch.full(row.shape, row.fill)
        if row.bound:
            own = torch.Generator().manual_seed(seed ^ crc32(row.name.encode()))
            value[: row.drawn_rows].uniform_(0.0 if row.positive else -row.bound, row.bound, generator=own)
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
    """Advance `generator` as far as normal_ of `numel` fp32 elements does: by one number each, if 16 divides numel."""
    if numel % 16:
        torch.empty(numel).normal_(generator=generator)
        return
    for start in range(0, numel, buffer.numel()):
        buffer[: numel - start].random_(generator=generator)
