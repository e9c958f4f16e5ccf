"""Recordings of what the engine would do: every kernel call with its arguments, every offset, every bucket, as text.

The planner makes every pass with a recorder in place of the kernels and with tensors that have no memory. Here that
recorder also notes the arguments. So a recording costs a tenth of a second, and a GPU's can be made without a GPU.

    matmul_forward out=h.0.qkv[32,192] x=h.0.ln1[32,64] w=weights.h.0.qkvw[192,64] b=weights.h.0.qkvb[192]

A tensor is described by its name and its shape. Strides follow where it is not contiguous, the dtype where it is not
the compute dtype, and `+n` where it begins n elements after the named one does. An argument that has its default value
is left out, so a recording is the same for `f(x, None)` and `f(x)`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from daybreak.engine import Engine, EngineSpec, arena, passes
from daybreak.engine.collectives import Sharding
from daybreak.engine.params import ParamTable
from daybreak.engine.passes import micro_step, next_token, plan_engine
from daybreak.kernels import OPS, Impl, Kernels, Op, Recorder
from daybreak.parallel import Group
from daybreak.shapes import GPT2Config

Find = Callable[[Tensor], tuple[str, int]]  # a tensor -> the name of the buffer under it, and its first element there
# Operations newer than the stored recordings: their backends are listed only where they are used.
LATER = {"rmsnorm_forward", "rmsnorm_backward", "rope", "swiglu_forward", "swiglu_backward", "lora_forward",
         "lora_backward", "lora_backward_input", "lora_backward_weight", "gelu_forward", "gelu_backward",
         "matmul_batched", "muon_momentum", "muon_sums", "muon_update"}  # fmt: skip
LATER |= {"matmul_swiglu_forward", "matmul_swiglu_backward", "matmul_rms_decode", "nf4_unpack"}
LATER |= {"matmul_relu2_forward", "matmul_relu2_backward"}
LATER |= {"relu2_forward", "relu2_backward", "mix_add", "mix_backward", "mix_norm_forward", "mix_norm_backward",
          "rope_norm_forward", "rope_norm_backward", "smear_forward", "smear_backward", "smear_decode",
          "value_forward", "value_backward", "cap_logits"}  # fmt: skip
LATER |= {"pick_forward", "pick_backward"}
FLAT = ("weights", "grads")  # buffers in the parameter table's layout


@dataclass
class Recording:
    """The calls of one engine, and where it makes them. `lines` is all of it, as text."""

    calls: list[str]
    memory: list[str]
    buckets: list[str]

    def lines(self) -> list[str]:
        return ["# calls", *self.calls, "# memory", *self.memory, "# buckets", *self.buckets]

    def digest(self) -> str:
        """The number of calls, and a short hash each of the calls, the memory and the buckets."""
        parts = (hashlib.sha256("\n".join(part).encode()) for part in (self.calls, self.memory, self.buckets))
        return " ".join([str(len(self.calls)), *(part.hexdigest()[:16] for part in parts)])


def describe(x: object, find: Find, table: ParamTable, dtype: torch.dtype) -> str:
    """An argument as text."""
    if not isinstance(x, Tensor):
        return repr(x)
    (name, at), shape = find(x), tuple(x.shape)
    if name in FLAT:
        rows = (row for row, offset in table.offsets.items() if offset <= at < offset + table.rows[row].numel)
        if row := next(rows, None):
            name, at = f"{name}.{row}", at - table.offsets[row]
    where = f"{name}+{at}" if at else name
    strides = "" if x.is_contiguous() else ":" + ",".join(map(str, x.stride()))
    return f"{where}[{','.join(map(str, shape))}]{strides}{'' if x.dtype == dtype else ' ' + kind(x.dtype)}"


def kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def line(operation: Op, args: Sequence[Any], kwargs: Mapping[str, Any], say: Callable[[object], str]) -> str:
    """One call as text: every argument that does not have its default value, in the operation's order."""
    parameters = inspect.signature(operation.impls["torch"].fn).parameters
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    assert given.keys() <= parameters.keys(), f"{operation.name} has no {given.keys() - parameters.keys()}"
    given = {
        name: given[name] for name in parameters if name in given and not is_default(given[name], parameters[name])
    }
    shown = [f"{name}={say(value)}" for name, value in given.items()]
    return " ".join([operation.name, *shown])


def is_default(value: object, parameter: inspect.Parameter) -> bool:
    return value is None or (isinstance(value, bool) and value == parameter.default)


# --- without a device


class NotingRecorder(Recorder):
    """The planner's recorder, which also keeps the arguments."""

    noted: list[Any]  # the frame's

    def do(self, name: str, fn: Callable[[], object], writes: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
        super().do(name, fn, writes, reads)
        self.noted.append((name, list(writes), list(reads)))

    def _bind(self, operation: Op, impl: Impl) -> Callable[..., None]:
        record = super()._bind(operation, impl)

        def call(*args: Any, **kwargs: Any) -> None:
            record(*args, **kwargs)
            self.noted.append((operation, args, kwargs, self.calls[-1].scratch))

        return call


class NotingFrame(arena.PlanFrame):
    """The planner's frame, which also keeps the arguments of its calls, collectives included."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.noted: list[Any] = []
        self.recorder.noted = self.noted

    def text(self) -> list[str]:
        """Everything noted, once all tensors are known by name."""
        tensors = {**self.activations, **self.state}
        names = {arena.storage_key(t): name for name, t in tensors.items() if name not in ("tokens", "targets")}
        say = partial(describe, find=lambda x: (names[arena.storage_key(x)], x.storage_offset()), table=self.table,
                      dtype=self.dtype)  # fmt: skip
        found = []
        for item in self.noted:
            if isinstance(item, str):
                found.append(item)
            elif isinstance(item[0], str):
                name, writes, reads = item
                found.append(f"{name} writes={', '.join(map(say, writes))} reads={', '.join(map(say, reads))}")
            else:
                operation, args, kwargs, scratch = item
                found.append(line(operation, args, kwargs, say) + (f" scratch={scratch}" if scratch else ""))
        return found


@contextmanager
def replaced(where: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(where, name) for name in values}
    try:
        for name, value in values.items():
            setattr(where, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(where, name, value)


def planned(cfg: GPT2Config, rank: int = 0, world: int = 1, decode: Sequence[int] = (), **options: Any) -> Recording:
    """The recording of what `plan_engine` plans for these options, and of more: micro-steps that are not a step's last,
    prefill of one row, and decoding of these numbers of rows."""
    frames: list[NotingFrame] = []

    def noting(*args: Any) -> NotingFrame:
        frames.append(NotingFrame(*args))
        return frames[-1]

    plan_arena = arena.plan_arena

    def numbered(table: ParamTable, dtype: torch.dtype, state: Any, schedules: Sequence[Any], *rest: Any) -> Any:
        def one(i: int, of: Any) -> Callable[[Any], None]:
            def run(f: Any) -> None:
                f.noted.append(f"-- schedule {i}")
                of(f)

            return run

        return plan_arena(table, dtype, state, [one(i, of) for i, of in enumerate(schedules)], *rest)

    with replaced(arena, PlanFrame=noting, Recorder=NotingRecorder), replaced(passes, plan_arena=numbered):
        model, table, plan = plan_engine(EngineSpec(cfg, **options), Group(rank=rank, world=world))
    (frame,) = frames
    s: Any = frame.state
    known = set(frame.activations)
    if options.get("train", True):
        for first in (True, False):
            frame.noted.append(f"-- micro-step, first={first}, not the last")
            micro_step(model, frame, s, first=first, last=False)
    frame.noted.append("-- prefill of one row")
    model.head_logits(frame, model.forward(frame, s["tokens"][:1], s["kv"][:, :, :1])[-1:])
    for b in decode:
        frame.noted.append(f"-- decode of {b}")
        next_token(model, frame, s, b)
    assert known == set(frame.activations), "the plan lacks an activation"
    return Recording(frame.text(), memory(plan, table), buckets(plan.sharding))


def memory(plan: arena.Arena, table: ParamTable) -> list[str]:
    """Where every tensor and every parameter lies, and the backend of every operation."""
    used = {call.name for call in plan.calls}
    return [
        *(
            f"{e.buffer}+{e.offset} {e.name}[{','.join(map(str, e.shape))}] {kind(e.dtype)} calls {e.first} to {e.last}"
            for e in plan.entries
        ),
        *(f"{name} at {offset}, {list(shape)}" for name, offset, shape in table.layout()),
        *(f"group {s.start} to {s.stop}, decay {s.decay}" for s in table.spans),
        f"{table.numel} elements of {table.num_parameters} parameters; "
        + " ".join(f"{op}:{backend}" for op, backend in sorted(plan.choices.items()) if op in used or op not in LATER),
    ]


def buckets(plan: Sharding) -> list[str]:
    """The exchanges in their order, and the parts that this rank owns."""
    return [
        f"stage {plan.zero}, rank {plan.rank} of {plan.world}: {plan.shard} of {plan.numel} elements",
        *(f"segment {start} to {stop}, final at {moment}" for start, stop, moment in plan.segments),
        *(f"bucket {b.start} to {b.stop}, final at {b.moment}, shard at {b.at}" for b in plan.buckets),
        f"order {plan.order}, last moment {plan.last_moment}",
        *(f"piece {p.start} to {p.stop} at {p.at}, decay {p.span.decay}" for p in plan.launches()),
        *(f"shard {start} to {stop} at {at}" for start, stop, at in plan.shards()),
    ]


# --- on the CPU, for real


def live(cfg: GPT2Config, drive: Callable[[Engine], None], **options: Any) -> Recording:
    """The recording of an engine that really runs on the CPU, while `drive` uses it."""
    engine = Engine(EngineSpec(cfg, **options))
    frame, calls = engine.frame, list[str]()
    named = [e for e in engine.arena.entries if e.buffer != "activations"]

    def find(x: Tensor) -> tuple[str, int]:
        """The state under x; of activations, which share bytes, the whole buffer."""
        for e in named:
            start = frame.buffers[e.buffer].data_ptr() + e.offset
            if start <= x.data_ptr() < start + e.nbytes:
                return e.name, (x.data_ptr() - start) // x.element_size()
        at = x.data_ptr() - frame.buffers["activations"].data_ptr()
        assert 0 <= at < frame.buffers["activations"].nbytes, "a kernel was given memory that is not the arena's"
        return "activations", at // x.element_size()

    say = partial(describe, find=find, table=engine.table, dtype=engine.spec.dtype)

    def noting(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            calls.append(line(OPS[name], args, kwargs, say))
            kernel(*args, **kwargs)

        return call

    kernels: Kernels = frame.k
    for name in engine.arena.choices:
        setattr(kernels, name, noting(name, getattr(kernels, name)))
    drive(engine)
    return Recording(calls, memory(engine.arena, engine.table), buckets(engine.arena.sharding))
