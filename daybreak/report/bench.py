"""`daybreak bench`: how fast a step is, and how near each operation comes to its floor on this device.

The floor is the least time that a call can take. `limits` measures two rates of the device, and the floor is the larger
of two times:

    bytes / copy rate      each tensor that the call reads or writes, once, and twice if the call adds to it
    FLOPs / matmul rate    of matmuls and attention; 0 for the other operations

The operations declare what they add to and their FLOPs (`op` in kernels/__init__.py). Steps are timed as training runs
them, with CUDA graphs. After that, `meter` runs one micro-step and one update without graphs. It records an event on
the device's own clock before and after every kernel call. The device sleeps first, so that the host is ahead and no
event waits for a launch:

    host      | launch | launch | launch | launch ...
    device    | sleep ...................... | e kernel e | e kernel e | e kernel e ...
                                               <-------->   seconds of one call

`tune_products` is `daybreak bench --tune`: it finds all matmuls of a step, and the fastest way to compute each.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.config import Config
from daybreak.engine import Engine, plan_engine
from daybreak.engine.arena import PlanFrame
from daybreak.engine.capture import Pending
from daybreak.engine.collectives import Collectives
from daybreak.engine.device import engine_spec, missing_on, pick_device, set_precision, used_mib
from daybreak.engine.fit import check_fits, plan_memory
from daybreak.engine.formats import formats_of, in_formats
from daybreak.engine.passes import micro_step
from daybreak.errors import ConfigError
from daybreak.formatting import several
from daybreak.kernels import OPS, Impl, Op, all_ops
from daybreak.kernels.cuda.products import Key
from daybreak.kernels.operand import Operand, tensors_of
from daybreak.parallel import ALONE
from daybreak.state.throughput import peak_flops

WARM_STEPS = 5  # not counted


@dataclass
class Cost:
    """All calls of one operation: their number, their seconds, the bytes that they move at least, and their FLOPs."""

    backend: str = ""
    calls: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    flops: int = 0


@dataclass
class Bench:
    """The measurements. `costs` has the operations of one micro-step and one update."""

    device: str
    tokens: int
    micro_steps: int
    seconds: list[float] = field(default_factory=list)
    memory_mib: int = 0
    bandwidth: float = 0.0
    flop_rate: float = 0.0
    mfu: float | None = None
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def step_seconds(self) -> float:
        """The median step."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def nbytes_of(operation: Op, given: Mapping[str, Any]) -> int:
    """Bytes that a call with these arguments moves at least: every tensor once, and twice what it adds to."""
    total, adds = 0, operation.adds
    adds = adds(given) if callable(adds) else adds
    for name, x in given.items():
        if isinstance(x, Operand):
            parts = operation.impls[x.format.backend].parts.get(name, ("value", "transposed"))
            total += sum(t.nbytes for t in tensors_of(x, parts))
        elif isinstance(x, Tensor):
            flag = next((f for f in (f"accumulate_{name}", "accumulate", "backward") if f in given), "")
            total += x.nbytes * (2 if name in adds and given.get(flag, True) else 1)
    return total


def limits(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a large copy, reads and writes counted, and FLOP/s of a large matmul after two seconds."""
    cuda = device.type == "cuda"
    n, size, dtype = (1 << 28, 8192, torch.bfloat16) if cuda else (1 << 24, 1024, torch.float32)
    source, target = torch.randn(n, device=device, dtype=dtype), torch.empty(n, device=device, dtype=dtype)
    copied = _seconds(lambda: target.copy_(source), 0.3, cuda)
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    _seconds(lambda: torch.mm(a, b, out=out), 2.0 if cuda else 0.3, cuda)  # to the power limit
    return 2 * n * dtype.itemsize / copied, 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), 0.5, cuda)


def _seconds(fn: Callable[[], Any], duration: float, cuda: bool) -> float:
    """Mean seconds of a call, over as many calls as fill `duration`."""
    fn()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < duration:
        for _ in range(10):
            fn()
        calls += 10
        if cuda:
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def batches(engine: Engine, steps: int) -> Tensor:
    """Random tokens (steps, B, T + 1), the same in every run. Small ids are the frequent ones, as in text."""
    generator = torch.Generator().manual_seed(7)
    u = torch.rand(steps, engine.B, engine.T + 1, generator=generator)
    return ((engine.cfg.V + 1) ** u - 1).long().clamp_(max=engine.cfg.V - 1)


def inputs(engine: Engine, steps: int) -> list[tuple[Tensor, ...]]:
    """The arguments of `micro_step` for random tokens: tokens and targets (B, T), int64. If the engine takes packed
    rows, also positions (B, T): one document fills each row."""
    places = [torch.arange(engine.T).expand(engine.B, -1)] if engine.spec.documents else []
    return [(part[:, :-1], part[:, 1:], *places) for part in batches(engine, steps)]


def time_steps(engine: Engine, micro_steps: int, seconds: float) -> list[float]:
    """The seconds of each step, for at least `seconds` in all. They include input copies and the late reading of
    results."""
    parts, times = inputs(engine, 8), list[float]()
    pending: Pending | None = None
    while len(times) < WARM_STEPS + 3 or sum(times[WARM_STEPS:]) < seconds:
        began, step = time.perf_counter(), len(times)
        engine.begin_step(lr=1e-5, step=step, valid=micro_steps * engine.B * engine.T)
        for i in range(micro_steps):
            engine.micro_step(*parts[(step * micro_steps + i) % len(parts)], first=i == 0)
        previous, pending = pending, engine.update()
        if previous is not None:
            previous.values()
        times.append(time.perf_counter() - began)
    return times[WARM_STEPS:]


def meter(engine: Engine) -> dict[str, Cost]:
    """The costs of one micro-step and one update, each kernel call timed by itself. The engine has no graphs
    afterwards."""
    kernels, part, cuda = engine.training.k, inputs(engine, 1)[0], engine.device.type == "cuda"
    costs, marks = defaultdict[str, Cost](Cost), list[tuple[str, Any, Any]]()

    def mark() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def metered(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        if name not in OPS:
            return kernel
        operation = OPS[name]

        def call(*args: Any, **kwargs: Any) -> None:
            given, cost = {**dict(zip(operation.parameters, args, strict=False)), **kwargs}, costs[name]
            backend = next((x.format.backend for x in args if isinstance(x, Operand)), "")
            cost.backend, cost.calls = backend or kernels.choices[name], cost.calls + 1
            cost.nbytes += nbytes_of(operation, given)
            cost.flops += operation.flops(given)
            start = mark()
            kernel(*args, **kwargs)
            marks.append((name, start, mark()))

        return call

    engine.graphs.clear()
    engine.training.k = kernels.each(metered)
    try:
        for _ in range(2):  # the first time loads and compiles
            costs.clear()
            marks.clear()
            if cuda:
                torch.cuda._sleep(1_500_000_000)  # type: ignore[no-untyped-call]  # lets the host run ahead, so that no mark waits for a launch
            engine.begin_step(lr=1e-5, step=0, valid=engine.B * engine.T)
            engine.micro_step(*part, first=True)
            engine.update()
            if cuda:
                torch.cuda.synchronize()
    finally:
        engine.training.k = kernels
    for name, start, stop in marks:
        costs[name].seconds += start.elapsed_time(stop) / 1e3 if cuda else stop - start
    return dict(costs)


def bench(config: Config, seconds: float = 10.0) -> Bench:
    """Measure a configuration on its device, on random tokens. Raises ConfigError, OutOfMemory."""
    config.check()
    device = pick_device(config.run.device)
    set_precision(config, device)
    arena, outside = plan_memory(config, device, missing_on(device))
    check_fits(arena, device, config, outside=outside)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    tokens = config.tokens_at(0)
    engine = Engine(engine_spec(config, device), device=device)
    result = Bench(name, tokens, tokens // (config.batch.B * config.T))
    result.seconds = time_steps(engine, result.micro_steps, seconds)
    result.memory_mib = used_mib(device)
    peak = peak_flops(name) if engine.spec.compute == "bf16" else None
    result.mfu = engine.flops_per_token * tokens / result.step_seconds / peak if peak else None
    result.costs = meter(engine)
    result.bandwidth, result.flop_rate = limits(device)
    return result


def _list_product(impls: Mapping[str, Impl], *args: Any, **more: Any) -> None:
    """Call a matmul on tensors without storage, in fp8 if an argument is, so that cuBLASLt's keys are noted."""
    eight = any(isinstance(x, Operand) for x in (*args, *more.values()))
    impl = impls.get("fp8 cuda" if eight else "cublaslt")
    if impl and "cublaslt" in impls:  # the operation is a matmul
        impl.fn(*args, **more, scratch=lambda temps: [torch.empty(s, dtype=t, device="meta") for s, t in temps])


def step_products(config: Config, device: torch.device) -> list[Key]:
    """Every matmul of a step, of its first and its later micro-steps, found by running them on tensors without
    storage."""
    from daybreak.kernels.cuda import cublaslt

    spec, ops = engine_spec(config, device, missing=()), all_ops("cuda")
    model, table, arena = plan_engine(spec)
    state = [e for e in arena.entries if e.buffer not in ("activations", "scratch")]
    frame = PlanFrame(table, spec.dtype, state, Collectives(arena.sharding, ALONE))
    frame = in_formats(frame, formats_of(spec, model), model)
    frame.k = frame.k.each(lambda name, _: partial(_list_product, ops[name].impls if name in ops else {}))

    def run() -> None:
        for first in (True, False):
            micro_step(model, frame, frame.state, first=first)

    return cublaslt.listed(run)


def tune_products(config: Config, folder: str) -> None:
    """Search the fastest algorithm for each matmul of a configuration's step that the table in `folder` does not have,
    and write it there. Raises ConfigError without a GPU or cuBLASLt, and for a damaged table."""
    from daybreak.kernels.cuda import tune

    config.check()
    device = pick_device(config.run.device)
    if device.type != "cuda" or "cublaslt" in missing_on(device):
        raise ConfigError("run.device must be a CUDA device with cuBLASLt to tune its matmuls.")
    set_precision(config, device)
    torch.cuda.set_device(device)
    print(tune.search(step_products(config, device), Path(folder)))


def print_bench(b: Bench) -> None:
    """Print the step, and a table of its operations, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, width=120)
    mfu = "n/a" if b.mfu is None else f"{100 * b.mfu:.1f} %"
    console.print(
        f"{b.device}: {1e3 * b.step_seconds:.1f} ms a step of {b.tokens:,} tokens "
        f"({several(b.micro_steps, 'micro-step')}), {b.tokens / b.step_seconds:,.0f} tok/s, MFU {mfu}, "
        f"{b.memory_mib:,} MiB in use (median of {len(b.seconds)})"
    )
    one, moved, computed = (1e9, "GB/s", "GFLOP/s") if b.device == "cpu" else (1e12, "TB/s", "TFLOP/s")
    console.print(f"measured limits: copy {b.bandwidth / one:.3f} {moved}, matmul {b.flop_rate / one:.1f} {computed}")
    table = Table("operation", "backend", "calls", "ms", "floor ms", "of floor", moved, computed,
                  title="One micro-step and one update", title_justify="left")  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    total = floor_total = 0.0
    for name, c in sorted(b.costs.items(), key=lambda item: -item[1].seconds):
        floor = max(c.nbytes / b.bandwidth, c.flops / b.flop_rate)
        total, floor_total = total + c.seconds, floor_total + floor
        table.add_row(
            name, c.backend, str(c.calls), f"{1e3 * c.seconds:.2f}", f"{1e3 * floor:.2f}",
            f"{c.seconds / floor:.2f}x" if floor else "", f"{c.nbytes / c.seconds / one:.2f}",
            f"{c.flops / c.seconds / one:.0f}" if c.flops else "",
        )  # fmt: skip
    table.add_section()
    table.add_row("all", "", "", f"{1e3 * total:.2f}", f"{1e3 * floor_total:.2f}", f"{total / floor_total:.2f}x")
    console.print(table)
