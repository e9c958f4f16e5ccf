"""Memory, known before anything runs: every tensor's name, shape, dtype, lifetime and offset in a few flat buffers.

The planner runs the schedule once with a recorder in place of the kernels. The call list it gets back says when each
activation is first written and last read; activations whose lifetimes do not overlap share bytes. Nothing here
touches a device: `plan` prints the list, training allocates exactly it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from daybreak.engine.params import ParamTable
from daybreak.kernels import Call, Kernels, Recorder, storage_key

ALIGN = 256  # bytes


@dataclass(frozen=True)
class Entry:
    """One tensor: its flat buffer, byte offset there, and the calls (first, last) between which it is alive."""

    name: str
    buffer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    first: int = 0
    last: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def padded(self) -> int:
        return -(-self.nbytes // ALIGN) * ALIGN


class Frame(Protocol):
    """What a schedule sees: kernels, and tensors by name."""

    k: Kernels

    def w(self, name: str) -> Tensor:
        """A weight, in compute dtype."""

    def g(self, name: str) -> Tensor:
        """Its gradient."""

    def a(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An activation of this shape (compute dtype by default). Declared by being used."""


class PlanFrame:
    """Hands out storage-less tensors and remembers what was asked for."""

    def __init__(
        self, table: ParamTable, dtype: torch.dtype, state: list[Entry], choices: Mapping[str, str] | None = None
    ) -> None:
        self.table, self.dtype = table, dtype
        self.recorder = Recorder(choices)
        self.k: Kernels = self.recorder  # type: ignore[assignment]  # same attributes, by construction
        self.activations: dict[str, tuple[Tensor, torch.dtype]] = {}
        self.state = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in state}
        self.state["tokens"], self.state["targets"] = self.state["batch"]

    def w(self, name: str) -> Tensor:
        return self.table.view(self.state["weights"], name)

    def g(self, name: str) -> Tensor:
        return self.table.view(self.state["grads"], name)

    def a(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if name not in self.activations:
            self.activations[name] = (torch.empty(shape, dtype=dtype, device="meta"), dtype)
        tensor = self.activations[name][0]
        assert self.activations[name][1] == dtype, f"{name} is asked for as {dtype}"
        assert math.prod(shape) <= tensor.numel(), f"{name} is asked for as {shape}, larger than declared"
        return tensor.view(-1)[: math.prod(shape)].view(shape)


class LiveFrame:
    """Hands out views of allocated buffers."""

    def __init__(self, arena: Arena, table: ParamTable, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.buffers = {name: zeros(size, device) for name, size in arena.sizes().items()}
        tensors = {e.name: self._view(e) for e in arena.entries}
        self.state = {e.name: tensors[e.name] for e in arena.entries if e.buffer != "activations"}
        self.activations = {e.name: tensors[e.name] for e in arena.entries if e.buffer == "activations"}
        self.k = Kernels(self.state["scratch"], arena.choices)
        self.weights = {name: table.view(self.state["weights"], name) for name in table.rows}
        grads = self.state.get("grads")
        self.grads = {} if grads is None else {name: table.view(grads, name) for name in table.rows}

    def _view(self, e: Entry) -> Tensor:
        return self.buffers[e.buffer][e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape)

    def w(self, name: str) -> Tensor:
        return self.weights[name]

    def g(self, name: str) -> Tensor:
        return self.grads[name]

    def a(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.activations[name]
        if tensor.shape == shape:
            return tensor
        return tensor.view(-1)[: math.prod(shape)].view(shape)  # a smaller batch uses the front


def zeros(size: int, device: torch.device) -> Tensor:
    """`size` zero bytes. On the CPU fresh pages of the system, huge ones where it can: zeroed when first touched."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass(frozen=True)
class Arena:
    """The complete list, the calls of one micro-step and update that it was derived from, and who serves them."""

    entries: list[Entry]
    calls: list[Call]
    choices: Mapping[str, str]  # operation -> backend

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
    table: ParamTable,
    dtype: torch.dtype,
    state: list[Entry],
    schedules: Sequence[Callable[[PlanFrame], None]],
    choices: Mapping[str, str],
) -> Arena:
    """Record the schedules and place every tensor. The first schedule gives lifetimes; the others must fit them."""
    placed, ends = [], dict[str, int]()
    for e in state:
        placed.append(replace(e, offset=ends.get(e.buffer, 0)))
        ends[e.buffer] = ends.get(e.buffer, 0) + e.padded
    frame = PlanFrame(table, dtype, state, choices)
    calls: list[Call] = []
    known: set[str] = set()
    for schedule in schedules:
        frame.recorder.calls.clear()
        schedule(frame)
        scratch = max((c.scratch for c in frame.recorder.calls), default=0)
        calls = calls or list(frame.recorder.calls)
        known = known or set(frame.activations)
        assert known == set(frame.activations), "a later schedule uses activations that the first does not"
        ends["scratch"] = max(ends.get("scratch", 0), scratch)
    scratch_entry = Entry("scratch", "scratch", (max(ends["scratch"], 64),), torch.uint8, last=len(calls))
    activations = _place(_lifetimes(frame, calls))
    return Arena([*(replace(e, last=len(calls)) for e in placed), scratch_entry, *activations], calls, choices)


def _lifetimes(frame: PlanFrame, calls: list[Call]) -> list[Entry]:
    """Entries of all activations with their first and last call."""
    names = {storage_key(t): name for name, (t, _) in frame.activations.items()}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, call in enumerate(calls):
        for key in (*call.reads, *call.writes):
            if name := names.get(key):
                assert name in first or key in call.writes, f"{call.name} reads {name} before anything wrote it"
                first.setdefault(name, i)
                last[name] = i
    entries = []
    for name, (t, dtype) in frame.activations.items():
        entries.append(Entry(name, "activations", tuple(t.shape), dtype, 0, first[name], last[name]))
    return entries


def _place(entries: list[Entry]) -> list[Entry]:
    """Offsets such that tensors alive at the same call never overlap: largest first, lowest free gap."""
    placed: list[Entry] = []
    for e in sorted(entries, key=lambda e: (-e.padded, e.first, e.name)):
        offset = 0
        for other in sorted((p for p in placed if p.first <= e.last and e.first <= p.last), key=lambda p: p.offset):
            if offset + e.padded <= other.offset:
                break
            offset = max(offset, other.offset + other.padded)
        placed.append(replace(e, offset=offset))
    return sorted(placed, key=lambda e: (e.first, e.offset))
