"""Times one launch of a kernel: what bench/kernels.py runs over the cases of every bench/kernel_GROUP.py.

A case is timed on as many sets of buffers as hold 1 GB at least, so that no launch finds its input in the L2 cache.
One CUDA graph launches the kernel once on each set; the figure is the median of REPLAYS replays over the sets.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Kernels, all_ops, temps_bytes

DEVICE = "cuda"
ROTATE = 1 << 30  # bytes that the sets of buffers hold together
KEEP_FREE = 6 << 30  # bytes of device memory that they leave alone
REPLAYS, WARMUP = 11, 3
MAX_SETS = 2000  # launches in one graph
PRODUCT = "a matrix product: bound by arithmetic, not by memory"  # a reason for an exemption, as is the next
DECODE = "a few us: what counts is a whole token, whose launches overlap (decode_speed.py)"


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    nbytes: the fewest bytes that the operation must move, each input and each output once (twice if it is added to);
    flops: its multiplications and additions in matrix products, or 0; make: allocates ONE set of non-zero random
    buffers and returns the launch; exempt: why the 85 % rule does not apply, if it does not; note: tells cases of
    one operation apart.
    """

    op: str
    backend: str
    nbytes: int
    flops: int
    make: Callable[[], Callable[[], None]]
    exempt: str = ""
    note: str = ""


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Normal random numbers on the device."""
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(std=scale)


def launch(op: str, backend: str, *args: Any, **kwargs: Any) -> Callable[[], None]:
    """The operation on these arguments as a call without arguments, through `Kernels`, with scratch of its own."""
    impl = all_ops("cuda")[op].impls[backend]
    size = temps_bytes(impl.temps(*args, **kwargs)) if impl.temps else 0
    bound = getattr(Kernels(torch.empty(size, dtype=torch.uint8, device=DEVICE), {op: backend}), op)
    return lambda: bound(*args, **kwargs)


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add a row to a CSV file, which begins with the columns' names."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def seconds(case: Case) -> float:
    """Seconds of one launch of the case."""
    wanted = min(MAX_SETS, max(2, math.ceil(ROTATE / max(case.nbytes, 1)) + 1))
    launches: list[Callable[[], None]] = []
    while len(launches) < wanted:
        before = torch.cuda.mem_get_info()[0]
        launches.append(case.make())
        if len(launches) > 1 and torch.cuda.mem_get_info()[0] < KEEP_FREE + 2 * (before - torch.cuda.mem_get_info()[0]):
            break
    return time_launches(launches)


def time_launches(launches: list[Callable[[], None]]) -> float:
    """Median seconds of one of these launches, run in order in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be filling the buffers
    with torch.cuda.stream(stream):  # compiles, and lets libraries allocate, before the capture
        for fn in launches[:3]:
            fn()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for fn in launches:
            fn()
    times = []
    for i in range(WARMUP + REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= WARMUP:
            times.append(start.elapsed_time(stop) / 1e3)
    graph.reset()
    return statistics.median(times) / len(launches)


def copy_rate() -> float:
    """Bytes a second, read and written together, of torch's copy of 1 GB at a time, outside of a graph: a graph makes
    of it a node that is no kernel, and slower (2.43 TB/s instead of 2.96 on an H100)."""
    source, target = (torch.empty(1 << 29, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    source.normal_()
    times = []
    for _ in range(WARMUP + REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 4e3)
    return 2 * tensor_bytes(source) / statistics.median(times[WARMUP:])


def product_rate(size: int = 8192) -> float:
    """Floating-point operations a second of a short run of square bf16 products."""
    a, b = rand(size, size), rand(size, size)
    out = torch.empty_like(a)
    return 2 * size**3 / time_launches([lambda: torch.mm(a, b, out=out)] * 4)
