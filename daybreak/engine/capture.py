"""CUDA graphs, and the traffic between host and device: recorded launches, pinned input, results that are read late.

On CUDA the calls of a micro-step and of the update are captured once and replayed. The host only copies the next batch
in and reads an earlier step's scalars, so it never waits inside a step:

    host      | copy batch 1 | copy batch 2 | read step 0 | copy batch 3 | read step 1 ...
    device    | step 0             | step 1             | step 2             | ...

On a CPU everything here is a plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from daybreak.engine.arena import LiveFrame

Action = Callable[[], object]
SLOTS = 4  # batches and results in flight, at most


class Graphs:
    """Runs functions by key: `capture` records one on CUDA, and `run` replays it."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def capture(self, key: Hashable, fn: Action) -> None:
        """Record fn, which has run before (its kernels are compiled and its libraries loaded)."""
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # thread_local: other threads (prefetching, drawing weights) may talk to the driver meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            fn()
        self._graphs[key] = graph

    def run(self, key: Hashable, fn: Action) -> None:
        """Replay the graph that was captured under `key`, or call fn if there is none."""
        if graph := self._graphs.get(key):
            graph.replay()
        else:
            fn()

    def clear(self) -> None:
        """Forget all graphs. A communicator of NCCL cannot end while graphs hold its calls."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def run_or_record(self, key: Hashable, before: Action, fn: Action, after: Action) -> None:
        """Run the three by the graph under `key`. The first call runs them without one, and then records it."""

        def all_three() -> None:
            before()
            fn()
            after()

        self.run(key, all_three)
        if self.enabled and key not in self._graphs:
            self.capture(key, all_three)


class Tapes:
    """Graphs for a CPU: the kernel calls of a function, noted with their tensors, and made again without the Python
    that leads to them. That Python is half of the time of a small model's token."""

    def __init__(self, frame: LiveFrame) -> None:
        self._frame, self._tapes = frame, dict[Hashable, list[Action]]()

    def run_or_record(self, key: Hashable, before: Action, fn: Action, after: Action) -> None:
        """Run before, fn's kernel calls and after. The first call under a key runs fn and notes its calls, so fn may do
        nothing but call kernels."""
        before()
        if (tape := self._tapes.get(key)) is None:
            self._tapes[key] = self._note(fn)
        else:
            for call in tape:
                call()
        after()

    def _note(self, fn: Action) -> list[Action]:
        kernels, calls = self._frame.k, list[Action]()

        def noting(_: str, operation: Callable[..., None]) -> Callable[..., None]:
            def call(*args: Any, **kwargs: Any) -> None:
                operation(*args, **kwargs)
                calls.append(partial(operation, *args, **kwargs))

            return call

        self._frame.k = kernels.each(noting)
        try:
            fn()
        finally:
            self._frame.k = kernels
        return calls


class Ring:
    """Slots of pinned memory for a small tensor, so that the host need not wait for a transfer. A slot is used again
    once its own transfer is over.

    wait: is called with a function that says whether the transfer is over. A wait for the event could not be ended."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
        wait: Callable[[Callable[[], bool]], None] | None = None,
    ) -> None:  # fmt: skip
        cuda = device.type == "cuda"
        self._until = wait
        self.slots = [torch.zeros(shape, dtype=dtype, pin_memory=cuda) for _ in range(SLOTS if cuda else 1)]
        self.events = [torch.cuda.Event() for _ in self.slots] if cuda else []  # type: ignore[no-untyped-call]
        self.next = 0

    def take(self) -> int:
        """The next slot, once nothing in flight uses it."""
        slot, self.next = self.next, (self.next + 1) % len(self.slots)
        self.wait(slot)
        return slot

    def wait(self, slot: int) -> None:
        """Wait until the slot's transfer is over."""
        if self.events:
            event = self.events[slot]
            event.synchronize() if self._until is None else self._until(event.query)

    def upload(self, slot: int, target: Tensor) -> None:
        """Copy the slot to the device, in stream order."""
        target.copy_(self.slots[slot], non_blocking=True)
        self._mark(slot)

    def download(self, source: Tensor) -> Pending:
        """Copy `source` to a slot, in stream order."""
        slot = self.take()
        self.slots[slot].copy_(source, non_blocking=True)
        self._mark(slot)
        return Pending(self, slot)

    def _mark(self, slot: int) -> None:
        if self.events:
            self.events[slot].record()


class Pending:
    """Values that are copied to the host."""

    def __init__(self, ring: Ring, slot: int) -> None:
        self._ring, self._slot = ring, slot
        self._values: list[float] | None = None

    def values(self) -> list[float]:
        """The values. Waits for them if necessary. Ask before SLOTS further downloads, which use the slot again."""
        if self._values is None:
            self._ring.wait(self._slot)
            self._values = self._ring.slots[self._slot].tolist()
        return self._values
