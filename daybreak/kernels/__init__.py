"""One file per operation: plain-torch reference and signature here, the fused CUDA kernels in `kernels/cuda`.

An operation is a function that writes into tensors it is given: outputs first, then inputs, then keywords. It never
returns or allocates a tensor; temporaries come from `scratch`, whose size the planner knows from the same `temps`
function that the kernel uses. Every row-wise loop is over bounded chunks, so scratch does not grow with the batch.

An operation has one implementation per backend. `choose` picks, for a device and dtype, the first backend of its
group's order that exists; `Kernels` binds the picks to one device. A `Recorder` runs nothing and notes what each call
reads and writes: from that list the arena takes lifetimes, and a test sees an unintended change of schedule.
Where formats are chosen (operand.py), `in_formats` gives operations that look at the formats of their arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from daybreak.kernels.operand import PARTS, Operand, tensors_of

Temps = Sequence[tuple[tuple[int, ...], torch.dtype]]
Flops = Callable[[Mapping[str, Any]], int]
Decorator = Callable[[Callable[..., None]], Callable[..., None]]
MAX_VIEWS = 64
CHUNK = 1 << 17  # elements per chunk of a row-wise torch kernel: a few chunks stay in a core's L2 cache
FILES = (
    "attention", "classifier", "embedding", "glu", "guard", "lora", "matmul", "mix", "muon", "nf4", "norm", "optimizer",
    "pick", "relu", "rope", "smear", "value",
)  # fmt: skip
# Backends on CUDA, best first; every group ends with the plain-torch reference. The CPU has only that.
CUDA_ORDER = {
    "matmul": ("quack", "cublaslt", "triton", "torch"),
    "attention": ("fa4", "cudnn", "triton", "torch"),
    **dict.fromkeys((name for name in FILES if name not in ("attention", "matmul")), ("triton", "torch")),
}
CUDA_FILES = (
    *(name for name in FILES if name != "matmul"),
    *("batched", "bias", "cublaslt", "cudnn", "decode", "fa4", "gated", "gelu", "quack", "fp8"),
)
ON_HOST = (  # their references read values on the host, so no CUDA graph can hold them
    "adamw_update", "embedding_backward", "muon_momentum", "muon_update", "smear_decode", "step_guard",
)  # fmt: skip
CUDA_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Impl:
    """One implementation of an operation: the function, the scratch it needs, and the compute dtypes it serves.

    parts: argument -> the parts of an Operand that it reads or writes there. An argument that is not named: all."""

    fn: Callable[..., None]
    temps: Callable[..., Temps] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    parts: Mapping[str, Collection[str]] = field(default_factory=dict)

    def serves(self, dtype: torch.dtype, arguments: Collection[str]) -> bool:
        """Whether it serves this compute dtype, and has all of these arguments."""
        known = inspect.signature(self.fn).parameters.keys()
        return (self.dtypes is None or dtype in self.dtypes) and set(arguments) <= known


@dataclass
class Op:
    """An operation: its group (the file it lives in), which arguments it writes, its implementations by backend.

    adds: outputs that a call also reads, because it adds to them. It may be a function that gives these, from the
    arguments by name. Where a call has `accumulate_NAME`, `accumulate` or `backward`, that must be true as well.
    flops: floating-point operations of a call, from its arguments by name.
    """

    name: str
    group: str
    writes: tuple[str, ...]
    impls: dict[str, Impl] = field(default_factory=dict)
    adds: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]] = ()
    flops: Flops = lambda given: 0

    @property
    def parameters(self) -> list[str]:
        """Names of the arguments, in order."""
        return list(inspect.signature(next(iter(self.impls.values())).fn).parameters)


# quantise(out, x) makes an Operand of a matrix. It has no plain form: the backend of every format brings its own.
OPS: dict[str, Op] = {"quantise": Op("quantise", "operand", ("out", "db"), adds=("db",))}


def op(*writes: str, temps: Callable[..., Temps] | None = None, **costs: Any) -> Decorator:
    """Register a plain-torch kernel as an operation that writes the arguments named in `writes`. costs: see `Op`."""

    def register(fn: Callable[..., None]) -> Callable[..., None]:
        group = fn.__module__.rsplit(".", 1)[1]
        OPS[fn.__name__] = Op(fn.__name__, group, writes, {"torch": Impl(fn, temps)}, **costs)
        return fn

    return register


def backend(
    name: str, *, temps: Callable[..., Temps] | None = None, dtypes: tuple[torch.dtype, ...] = CUDA_DTYPES,
    parts: Mapping[str, Collection[str]] | None = None,
) -> Decorator:  # fmt: skip
    """Register an implementation of the operation that bears the function's name, with the same signature."""

    def register(fn: Callable[..., None]) -> Callable[..., None]:
        OPS[fn.__name__].impls[name] = Impl(fn, temps, dtypes, parts or {})
        return fn

    return register


def all_ops(device_type: str = "cpu") -> dict[str, Op]:
    """Every operation, by name; for "cuda" with the implementations of kernels/cuda."""
    for name in FILES:
        importlib.import_module(f"daybreak.kernels.{name}")
    importlib.import_module("daybreak.kernels.fp8")
    if device_type == "cuda":
        for name in CUDA_FILES:
            module = f"daybreak.kernels.cuda.{name}"
            if name not in FILES or importlib.util.find_spec(module):  # a new operation begins in plain torch
                importlib.import_module(module)
    return OPS


def choose(
    device_type: str, dtype: torch.dtype, forced: Mapping[str, str] | None = None, missing: Collection[str] = (),
    asks: Mapping[str, Collection[str]] | None = None,
) -> dict[str, str]:  # fmt: skip
    """The backend of every operation. `forced` (group -> backend) starts a group's order there instead of at its best.

    A backend is passed over if it is in `missing` (kernels.cuda.missing_backends), or if its function lacks an argument
    that a model gives (operation -> `asks`, see models.registry)."""
    choices = {}
    for name, operation in all_ops(device_type).items():
        order = CUDA_ORDER.get(operation.group, ()) if device_type == "cuda" else ("torch",)
        first = (forced or {}).get(operation.group, "auto")
        order = order[order.index(first) :] if first in order else order
        for candidate in order:
            impl = operation.impls.get(candidate)
            if impl and candidate not in missing and impl.serves(dtype, (asks or {}).get(name, ())):
                choices[name] = candidate
                break
    return choices


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

    def __init__(self, scratch: Tensor, choices: Mapping[str, str] | None = None) -> None:
        self.scratch = Scratch(scratch)
        self.choices = dict(choices or choose("cpu", torch.float32))
        for name, chosen in self.choices.items():
            setattr(self, name, self._bind(OPS[name], OPS[name].impls[chosen]))

    def _bind(self, operation: Op, impl: Impl) -> Callable[..., None]:
        if impl.temps is None:
            return impl.fn

        def call(*args: Any, **kwargs: Any) -> None:
            impl.fn(*args, **kwargs, scratch=self.scratch)

        return call

    def do(self, name: str, fn: Callable[[], object], writes: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
        """Call fn, which is not an operation, but writes and reads tensors as one does, so plans must know of it."""
        fn()

    def each(self, make: Callable[[str, Callable[..., None]], Callable[..., None]]) -> Self:
        """The same, with make(name, operation) in place of every operation, which can note or measure its calls."""
        kernels = copy(self)
        for name in (*OPS, "do"):
            if name in vars(self) or name == "do":
                setattr(kernels, name, make(name, getattr(self, name)))
        return kernels

    def in_formats(self, backends: Collection[str]) -> Self:
        """The same operations, but a call with Operands among its arguments goes to their backend, one of these."""
        kernels = copy(self)
        for name, operation in OPS.items():
            setattr(kernels, name, self._by_format(operation, backends))
        return kernels

    def _by_format(self, operation: Op, backends: Collection[str]) -> Callable[..., None]:
        served = {b: self._bind(operation, operation.impls[b]) for b in backends if b in operation.impls}
        plain: Callable[..., None] | None = vars(self).get(operation.name)

        def call(*args: Any, **kwargs: Any) -> None:
            asked = {x.format.backend for x in (*args, *kwargs.values()) if isinstance(x, Operand)}
            fn = plain if not asked else served.get(next(iter(asked))) if len(asked) == 1 else None
            assert fn is not None, f"{operation.name} has no kernel for {', '.join(sorted(asked)) or 'plain tensors'}"
            fn(*args, **kwargs)

        return call

    def __getattr__(self, name: str) -> Callable[..., None]:
        listed = "the files that FILES in daybreak/kernels/__init__.py lists"
        raise AttributeError(f"no operation {name!r} in {listed}; they define {', '.join(OPS)}")


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


class Recorder(Kernels):
    """Kernels while planning: notes calls, computes nothing. Works on storage-less (meta) tensors."""

    def __init__(self, choices: Mapping[str, str] | None = None) -> None:
        self.calls: list[Call] = []
        super().__init__(torch.empty(0, dtype=torch.uint8), choices)

    def do(self, name: str, fn: Callable[[], object], writes: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
        read, written = (tuple(map(storage_key, tensors)) for tensors in (reads, writes))
        self.calls.append(Call(name, read, written, 0))

    def _bind(self, operation: Op, impl: Impl) -> Callable[..., None]:
        names = operation.parameters

        def record(*args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            keys = {k: [storage_key(t) for t in tensors_of(v, impl.parts.get(k, PARTS))] for k, v in given.items()}
            writes = tuple(key for k in operation.writes for key in keys.get(k, ()))
            reads = tuple(key for k, v in keys.items() if k not in operation.writes for key in v)
            scratch = temps_bytes(impl.temps(*args, **kwargs)) if impl.temps else 0
            self.calls.append(Call(operation.name, reads, writes, scratch))

        return record
