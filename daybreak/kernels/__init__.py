"""One file per operation: plain-torch reference, dispatch, and (on CUDA) a fused kernel behind the same signature.

An operation is a function that writes into tensors it is given: outputs first, then inputs, then keywords. It never
returns or allocates a tensor; temporaries come from `scratch`, whose size the planner knows from the same `temps`
function that the kernel uses. Every row-wise loop is over bounded chunks, so scratch does not grow with the batch.

`Kernels` binds the operations to one device. `Recorder` has the same attributes, runs nothing, and notes what each
call reads and writes: from that list the arena takes lifetimes, and a test sees an unintended change of schedule.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Temps = Sequence[tuple[tuple[int, ...], torch.dtype]]
MAX_VIEWS = 64
CHUNK = 1 << 17  # elements per chunk of a row-wise torch kernel: a few chunks stay in a core's L2 cache
FILES = ("attention", "classifier", "embedding", "gelu", "guard", "matmul", "norm", "optimizer")


@dataclass
class Op:
    """An operation: which arguments it writes, what scratch it needs, and its implementations by backend."""

    name: str
    writes: tuple[str, ...]
    temps: Callable[..., Temps] | None
    impls: dict[str, Callable[..., None]] = field(default_factory=dict)


OPS: dict[str, Op] = {}


def op(*writes: str, temps: Callable[..., Temps] | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a plain-torch kernel as an operation that writes the arguments named in `writes`."""

    def register(fn: Callable[..., None]) -> Callable[..., None]:
        OPS[fn.__name__] = Op(fn.__name__, writes, temps, {"torch": fn})
        return fn

    return register


def all_ops() -> dict[str, Op]:
    """Every operation, by name."""
    for name in FILES:
        importlib.import_module(f"daybreak.kernels.{name}")
    return OPS


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics and sums are kept in: fp32, or the input's own where that is wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor, buffer: Tensor) -> Tensor:
    """`x` itself if it already has the accumulation dtype, else its copy in `buffer`."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Cut `rows` rows into slices of about CHUNK elements."""
    step = chunk_rows(rows, columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def chunk_rows(rows: int, columns: int) -> int:
    """Rows in one chunk of `row_chunks`."""
    return max(1, min(rows, CHUNK // columns))


def temps_bytes(temps: Temps) -> int:
    """Bytes of scratch that `temps` takes, each piece aligned to 64 bytes."""
    return sum(-(-math.prod(shape) * dtype.itemsize // 64) * 64 for shape, dtype in temps)


class Scratch:
    """One flat buffer from which a kernel call takes its temporaries; the next call takes the same bytes again."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.views: dict[Any, list[Tensor]] = {}

    def __call__(self, temps: Temps) -> list[Tensor]:
        """Uninitialised views of the given shapes and dtypes."""
        key = tuple(temps)
        if key not in self.views:
            if len(self.views) >= MAX_VIEWS:  # sampling asks for every length once
                self.views.clear()
            assert temps_bytes(temps) <= self.buffer.numel(), "scratch is smaller than the plan said"
            offset, out = 0, []
            for shape, dtype in temps:
                size = math.prod(shape) * dtype.itemsize
                out.append(self.buffer[offset : offset + size].view(dtype).view(shape))
                offset += -(-size // 64) * 64
            self.views[key] = out
        return self.views[key]


class Kernels:
    """The operations as attributes, bound to the implementation chosen for a device and to one scratch buffer."""

    def __init__(self, scratch: Tensor) -> None:
        self.scratch = Scratch(scratch)
        self.choices: dict[str, str] = {}
        for name, operation in all_ops().items():
            self.choices[name] = "torch"
            setattr(self, name, self._bind(operation, operation.impls["torch"]))

    def _bind(self, operation: Op, fn: Callable[..., None]) -> Callable[..., None]:
        if operation.temps is None:
            return fn

        def call(*args: Any, **kwargs: Any) -> None:
            fn(*args, **kwargs, scratch=self.scratch)

        return call

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AttributeError(f"no operation {name!r}; daybreak/kernels defines {', '.join(OPS)}")


@dataclass(frozen=True)
class Call:
    """One recorded kernel call: storage keys of what it reads and writes, and its scratch in bytes."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    scratch: int


def storage_key(x: Tensor) -> int:
    """Identifies the storage under a tensor and all its views."""
    return int(x.untyped_storage()._cdata)


class Recorder:
    """Stands in for `Kernels` while planning: notes calls, computes nothing. Works on storage-less (meta) tensors."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        for name, operation in all_ops().items():
            setattr(self, name, self._recorder(operation))

    def _recorder(self, operation: Op) -> Callable[..., None]:
        names = list(inspect.signature(operation.impls["torch"]).parameters)

        def record(*args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            tensors = {k: storage_key(v) for k, v in given.items() if isinstance(v, Tensor)}
            writes = tuple(tensors[k] for k in operation.writes if k in tensors)
            reads = tuple(v for k, v in tensors.items() if k not in operation.writes)
            scratch = temps_bytes(operation.temps(*args, **kwargs)) if operation.temps else 0
            self.calls.append(Call(operation.name, reads, writes, scratch))

        return record

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AttributeError(f"no operation {name!r}; daybreak/kernels defines {', '.join(OPS)}")
