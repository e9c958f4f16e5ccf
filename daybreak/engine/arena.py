"""Memory, known before anything runs: every tensor's name, shape, dtype, lifetime and offset in a few flat buffers.

The planner makes every pass once with a recorder in place of the kernels, and tensors that have no memory. The list of
calls says when each activation is first written and last read. Activations that are never alive at the same call may
share bytes. The largest one is placed first, each at the lowest offset that is free in all of its calls:

    offset       call 0        1        2        3        4        5        6
    0            |----- qkv -----------------------| |----- d_fc --------------------
    6 C n        |- ln1 ---------|        |- att --------------------|
    8 C n                                 |- lse -------|

Every other tensor (weights, optimizer state, batch) stays, and has bytes of its own. Nothing here touches a device:
`plan` prints the list, and training allocates exactly it. Different passes, such as training and decode, use the same
bytes, because they never run at once.
"""

from __future__ import annotations

import math
import mmap
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from daybreak.engine.collectives import Collectives, Sharding, gradient_of, reduce_gradients
from daybreak.engine.params import ParamTable
from daybreak.engine.wide import wide_views
from daybreak.kernels import Call, Kernels, Recorder, acc_dtype, storage_key
from daybreak.kernels.held import SUFFIXES, TURNED, Eight, Held, assembled, widened
from daybreak.kernels.nf4 import Packed
from daybreak.models.adapters import Adapter
from daybreak.models.frame import Frame, Mode
from daybreak.models.rows import Row

ALIGN = 256  # bytes
FROZEN = "frozen."  # what the entry of a frozen parameter is called, before its name
CONSTANT = "constant."  # and of one of the model's constants
MAX_CHUNKS = 64  # of one calculation in chunks, that a plan records one by one


@dataclass(frozen=True)
class Entry:
    """One tensor: its flat buffer, byte offset there, and the calls (first, last) between which it is alive.

    saved: how a checkpoint holds it. "ranges" are a rank's ranges of a flat buffer, with one value an element. "whole"
    belongs to a parameter that is one rank's, and "once" is the same on all ranks.
    """

    name: str
    buffer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    first: int = 0
    last: int = 0
    saved: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def padded(self) -> int:
        return -(-self.nbytes // ALIGN) * ALIGN


class StepFrame(Frame, Protocol):
    """The part of a frame that only a step sees: the tensors that stay, and the collectives between ranks."""

    comm: Collectives
    state: dict[str, Tensor]
    table: ParamTable
    wide: dict[str, Tensor]  # scalars that are read in fp32 (engine/wide.py)

    def adapter(self, name: str) -> Adapter | None:
        return self.table.adapters.get(self.prefix + name)

    def trains(self, *names: str) -> bool:
        return not self.table.trainable.isdisjoint(names)

    def constant(self, name: str) -> Tensor:
        return self.state[CONSTANT + name]

    def readable(self, stored: Tensor | Held, name: str) -> TypeGuard[Tensor]:
        """Whether kernels read a weight as it is held: in compute dtype, or as a wide scalar."""
        return stored.dtype == self.dtype or self.table.rows[self.prefix + name].wide

    def converted(self, name: str, stored: Tensor | Held) -> Tensor:
        """A copy, in compute dtype, of a frozen weight that is held otherwise. Each call that reads it makes it anew.

        Forward and backward have a copy each, so that between the two its bytes are free."""
        copy = self.a(f"{name}.{'backward' if self.mode.backward else 'forward'}", *stored.shape, plain=True)
        if isinstance(stored, Packed):
            self.k.nf4_unpack(copy, *stored.tensors, rows=stored.rows)
            return copy
        if isinstance(stored, Eight):
            self.k.do("convert", partial(widened, stored, copy), [copy], [*stored.tensors])
        else:
            self.k.do("convert", partial(copy.copy_, stored), [copy], [stored])
        return copy

    def final(self) -> None:
        reduce_gradients(self)

    # Only frames with number formats have something to do in these three (engine/formats.py).

    def convert_weights(self) -> None:
        """When a step begins: make the weights that matmuls read in a format of their own, from the plain ones."""
        return

    def note_amax(self) -> None:
        """Before the guard decides: take the largest magnitudes of the step over all ranks (engine/scales.py)."""
        return

    def keep_amax(self) -> None:
        """After it: take these into the history that later scales come from, unless the guard refused the step."""
        return


def frozen_weight(state: Mapping[str, Tensor], row: Row) -> Tensor | Held:
    """A frozen parameter as it is held."""
    name = FROZEN + row.name
    if (whole := state.get(name)) is not None:
        return whole
    parts = [state[name + part] for part in SUFFIXES[row.held]]
    return assembled(row.held, row.shape, row.stacked or row.shape[:1], parts, state.get(name + TURNED))


def name_inputs(state: dict[str, Tensor]) -> None:
    """Name the parts of state["batch"], which holds 2 int64 tensors (B, T), or 4 for packed rows:

        tokens | targets | positions | lo, learned      the last has the bytes of two int32 tensors

    models.frame.Documents explains positions and lo. learned (B T) is `at` of passes.learned_part."""
    state["tokens"], state["targets"], *places = state["batch"]
    if places:
        state["positions"], lo = places
        state["lo"], learned = lo.view(-1).view(torch.int32).view(2, *lo.shape)
        state["learned"] = learned.view(-1)


def constant_entries(constants: Mapping[str, Tensor]) -> list[Entry]:
    """The memory of a model's constants."""
    return [Entry(CONSTANT + name, "state", tuple(x.shape), x.dtype) for name, x in constants.items()]


class PlanFrame(StepFrame):
    """Hands out storage-less tensors and remembers what was asked for."""

    def __init__(
        self, table: ParamTable, dtype: torch.dtype, state: list[Entry], comm: Collectives,
        choices: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.table, self.dtype, self.acc, self.comm = table, dtype, acc_dtype(dtype), comm
        self.recorder = Recorder(choices)
        self.k: Kernels = self.recorder
        self.activations: dict[str, Tensor] = {}
        self.state = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in state}
        name_inputs(self.state)
        self.wide = wide_views(self.state, table)

    def w(self, name: str) -> Tensor:
        if (wide := self.wide.get(self.prefix + name)) is not None:
            return wide
        if self.prefix + name in self.table.offsets:
            return self.table.view(self.state["weights"], self.prefix + name)
        stored = frozen_weight(self.state, self.table.rows[self.prefix + name])
        return stored if self.readable(stored, name) else self.converted(name, stored)

    def g(self, name: str) -> Tensor | None:
        if self.prefix + name not in self.table.offsets:
            return None
        if "grads" in self.state:
            return self.table.view(self.state["grads"], self.prefix + name)
        return gradient_of(self.layer("", 0, Mode()), self.prefix + name)  # stage 2: in a buffer of no layer's

    def a(self, name: str, *shape: int, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        name, dtype = self.prefix + name + (".again" if self.mode.recomputed and not plain else ""), dtype or self.dtype
        if (tensor := self.activations.get(name)) is None:
            tensor = self.activations[name] = torch.empty(shape, dtype=dtype, device="meta")
        assert tensor.dtype == dtype, f"{name} is asked for as {dtype}"
        assert math.prod(shape) <= tensor.numel(), f"{name} is asked for as {shape}, larger than declared"
        return tensor.view(-1)[: math.prod(shape)].view(shape)

    matmul_w, matmul_a = w, a

    def chunks(self, n: int, step: int) -> Sequence[int]:
        """Of very many only the first two and the last: the others make the same calls in the same bytes."""
        starts = range(0, n, step)
        return starts if len(starts) <= MAX_CHUNKS else [*starts[:2], starts[-1]]


class LiveFrame(StepFrame):
    """Hands out views of allocated buffers."""

    def __init__(
        self, arena: Arena, table: ParamTable, dtype: torch.dtype, device: torch.device, comm: Collectives
    ) -> None:
        self.table, self.dtype, self.acc, self.comm = table, dtype, acc_dtype(dtype), comm
        self.buffers = {name: zeros(size, device) for name, size in arena.sizes().items()}
        tensors = {e.name: self._view(e) for e in arena.entries}
        self.state = {e.name: tensors[e.name] for e in arena.entries if e.buffer != "activations"}
        self.activations = {e.name: tensors[e.name] for e in arena.entries if e.buffer == "activations"}
        self.k = Kernels(self.state["scratch"], arena.choices)
        views = {name: table.view(self.state["weights"], name) for name in table.offsets}
        self.weights: dict[str, Tensor | Held] = {
            **views, **{row.name: frozen_weight(self.state, row) for row in table.frozen}
        }  # fmt: skip
        self.wide = wide_views(self.state, table)
        self.grads: dict[str, Tensor | None] = dict.fromkeys(table.rows)
        if "grads" in self.state:
            self.grads |= {name: table.view(self.state["grads"], name) for name in table.offsets}
        elif "shard" in self.state:  # stage 2
            self.grads |= {name: gradient_of(self, name) for name in table.offsets}

    def _view(self, e: Entry) -> Tensor:
        return self.buffers[e.buffer][e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape)

    def w(self, name: str) -> Tensor:
        if (wide := self.wide.get(self.prefix + name)) is not None:
            return wide
        if self.comm.gathering:
            self.comm.need(self.prefix + name)
        stored = self.weights[self.prefix + name]
        return stored if self.readable(stored, name) else self.converted(name, stored)

    def g(self, name: str) -> Tensor | None:
        return self.grads[self.prefix + name]

    def a(self, name: str, *shape: int, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        tensor = self.activations[self.prefix + name + (".again" if self.mode.recomputed and not plain else "")]
        if tensor.shape == shape:
            return tensor
        return tensor.view(-1)[: math.prod(shape)].view(shape)  # a smaller batch uses the front

    matmul_w, matmul_a = w, a


def zeros(size: int, device: torch.device) -> Tensor:
    """`size` zero bytes. On the CPU these are new pages of the system, if possible huge, zeroed when first touched."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass(frozen=True)
class Arena:
    """The complete list of tensors, the calls of the first pass (a micro-step and an update), and the backends."""

    entries: list[Entry]
    calls: list[Call]
    choices: Mapping[str, str]  # operation -> backend
    sharding: Sharding

    def sizes(self) -> dict[str, int]:
        """Bytes of each flat buffer."""
        sizes: dict[str, int] = {}
        for e in self.entries:
            sizes[e.buffer] = max(sizes.get(e.buffer, 0), e.offset + e.padded)
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(self.sizes().values())


def plan_arena(
    table: ParamTable, dtype: torch.dtype, state: list[Entry], passes: Sequence[Callable[[PlanFrame], None]],
    choices: Mapping[str, str], comm: Collectives,
) -> Arena:  # fmt: skip
    """Record the passes and place every tensor. An entry's first and last call are those in the first pass with it."""
    placed, ends = [], dict[str, int]()
    for e in state:
        placed.append(replace(e, offset=ends.get(e.buffer, 0)))
        ends[e.buffer] = ends.get(e.buffer, 0) + e.padded
    frame = PlanFrame(table, dtype, state, comm, choices)
    recorded: list[list[Call]] = []
    for run in passes:
        frame.recorder.calls.clear()
        run(frame)
        recorded.append(list(frame.recorder.calls))
    calls, ends["scratch"] = recorded[0], max(c.scratch for calls in recorded for c in calls)
    scratch_entry = Entry("scratch", "scratch", (max(ends["scratch"], 64),), torch.uint8, last=len(calls))
    spans = [_lifetimes(frame, calls) for calls in recorded]
    activations = _place(frame.activations, [s for i, s in enumerate(spans) if s not in spans[:i]])
    return Arena(
        [*(replace(e, last=len(calls)) for e in placed), scratch_entry, *activations], calls, choices, comm.sharding
    )


def _lifetimes(frame: PlanFrame, calls: list[Call]) -> dict[str, tuple[int, int]]:
    """First and last call of every activation that these calls use."""
    names = {storage_key(t): name for name, t in frame.activations.items()}
    spans: dict[str, tuple[int, int]] = {}
    for i, call in enumerate(calls):
        for key in (*call.reads, *call.writes):
            if name := names.get(key):
                assert name in spans or key in call.writes, f"{call.name} reads {name} before anything wrote it"
                spans[name] = spans.get(name, (i, i))[0], i
    return spans


def _place(tensors: Mapping[str, Tensor], passes: Sequence[Mapping[str, tuple[int, int]]]) -> list[Entry]:
    """Offsets such that tensors alive at the same call of a pass never overlap: largest first, lowest free gap.

    passes: of each, the first and last call of every tensor that it uses."""
    entries = [
        Entry(name, "activations", tuple(t.shape), t.dtype, 0, *next((s[name] for s in passes if name in s), (0, 0)))
        for name, t in tensors.items()
    ]
    placed: list[list[tuple[int, int, int, int]]] = [[] for _ in passes]  # (offset, end, first, last), by offset
    found = []
    for e in sorted(entries, key=lambda e: (-e.padded, e.first, e.name)):
        offset, size = 0, e.padded
        mine = [(others, *s[e.name]) for others, s in zip(placed, passes, strict=True) if e.name in s]
        taken = [(o[0], o[1]) for others, first, last in mine for o in others if o[2] <= last and first <= o[3]]
        for start, end in sorted(taken):
            if offset + size <= start:
                break
            offset = max(offset, end)
        for others, first, last in mine:
            insort(others, (offset, offset + size, first, last))
        found.append(replace(e, offset=offset))
    return sorted(found, key=lambda e: (e.first, e.offset))
