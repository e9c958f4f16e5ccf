"""The whole training step on one GPU, beside its yardstick: the same matmuls and attention calls through torch.

    python bench/gpu_step.py d48 --B 16 --tokens 131072 --recompute 2 --out results.csv
    python bench/gpu_step.py d48 --B 16 --tokens 131072 --recompute 2 --precision fp8

Blocks of steady steps alternate with blocks of the yardstick in one process (same GPU, same temperature, same power
limit): every matmul of one micro-step through torch.mm and every attention call through torch's cuDNN
attention, in schedule order, on non-zero data. In fp8 there is no yardstick. Medians, clock and watts are printed; a
row is appended to --out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import append_row

from daybreak.engine import Engine, EngineSpec
from daybreak.engine.capture import Graphs
from daybreak.engine.device import missing_on, used_mib
from daybreak.engine.scales import SATURATED
from daybreak.kernels import OPS
from daybreak.report.bench import batches, time_steps
from daybreak.shapes import parse_shape
from daybreak.state.throughput import peak_flops


class Smi:
    """Samples clock and power while a block runs."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
        while not self._stop.wait(1.0):
            out = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].split(",")
            if len(out) == 2:
                self.samples.append((float(out[0]), float(out[1])))

    def __enter__(self) -> Smi:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def medians(self) -> tuple[float, float]:
        clocks, watts = zip(*self.samples, strict=True) if self.samples else ((0.0,), (0.0,))
        return statistics.median(clocks), statistics.median(watts)


class Shapes:
    """Records the matmuls and attention calls of a micro-step in order, running nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def recording(self, name: str, _: object) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if name == "matmul_backward_weight":  # dw (O, I), dout (n, O)
                self.calls.append(("wgrad", (tensors[1].shape[0], *tensors[0].shape)))
            elif OPS[name].flops and "w" in OPS[name].parameters:
                w = args[OPS[name].parameters.index("w")]
                self.calls.append(("dgrad" if "backward" in name else "forward", (tensors[0].shape[0], *w.shape)))
            elif name.startswith("attention"):
                q = tensors[2] if name == "attention_forward" else tensors[4]
                self.calls.append((name, tuple(q.shape)))

        return call


def recorded(engine: Engine) -> list[tuple[str, tuple[int, ...]]]:
    kernels, graphs, shapes = engine.frame.k, engine.graphs, Shapes()
    engine.frame.k, engine.graphs = kernels.each(shapes.recording), Graphs(False)
    tokens = batches(engine, 1)[0]
    try:
        engine.micro_step(tokens[:, :-1], tokens[:, 1:], first=True)
        engine.update()
    finally:
        engine.frame.k, engine.graphs = kernels, graphs
    return shapes.calls


def yardstick(calls: list[tuple[str, tuple[int, ...]]]) -> Callable[[], None]:
    """A function that runs the calls through torch. Tensors are shared between calls of one shape."""
    pool: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def tensor(role: str, *shape: int) -> torch.Tensor:
        key = (role, shape)
        if key not in pool:
            pool[key] = 0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return pool[key]

    todo: list[Callable[[], object]] = []
    for kind, shape in calls:
        if kind.startswith("attention"):
            B, T, NH, HS = shape
            qkv = tensor("qkv", B, T, 3, NH, HS).transpose(1, 3)  # (B, NH, 3, T, HS)
            dout = tensor("dout", B, T, NH, HS).transpose(1, 2)
            todo.append(attention_call(kind, *(qkv[:, :, i] for i in range(3)), dout))
            continue
        n, O, I = shape
        x, w, y = tensor("x", n, I), tensor("w", O, I), tensor("y", n, O)
        if kind == "forward":
            todo.append(partial(torch.mm, x, w.t(), out=tensor("out", n, O)))
        elif kind == "dgrad":
            todo.append(partial(torch.mm, y, w, out=tensor("out", n, I)))
        else:
            todo.append(partial(torch.mm, y.t(), x, out=tensor("out", O, I)))

    def run() -> None:
        for call in todo:
            call()

    return run


def attention_call(kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> Callable:
    """torch's cuDNN attention, causal, forward or backward, on (B, NH, T, HS) views."""
    aten = torch.ops.aten
    forward = partial(aten._scaled_dot_product_cudnn_attention, q, k, v, None, True, 0.0, True, False)
    if kind == "attention_forward":
        return forward
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = forward()
    return partial(
        aten._scaled_dot_product_cudnn_attention_backward,
        dout, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True,
    )  # fmt: skip


def since_start() -> float:
    """Seconds since this process began, its interpreter's start and imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def digest(engine: Engine) -> str:
    """A checksum of every bit of weights, masters and moments. In small pieces: what they take counts as the run's."""
    total = 0
    for name in ("weights", "masters", "m", "v"):
        if name in engine.state:
            for i, part in enumerate(engine.state[name].view(torch.int16).split(1 << 20)):
                place = torch.arange(1, part.numel() + 1, device=part.device) % 65521
                total = (total * 31 + i + int((part.long() * place).sum())) % (1 << 61)
    return f"{total:016x}"


def first_steps(engine: Engine, micro: int) -> None:
    """Three steps from the initial weights: losses to the last digit, time of the first, a checksum of the result."""
    tokens, losses = batches(engine, 8), []
    for step in range(3):
        engine.begin_step(lr=1e-4, step=step, valid=micro * engine.B * engine.T)
        for i in range(micro):
            part = tokens[(step * micro + i) % 8]
            engine.micro_step(part[:, :-1], part[:, 1:], first=i == 0)
        engine.update()
        losses.append(engine.stats()["loss"])
        if step == 0:
            print(f"first step done {since_start():.1f} s after the process began")
            allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    new = torch.cuda.memory_stats()["allocation.all.allocated"] - allocated
    if SATURATED in engine.state:
        print("steps in which a matrix saturated:", int(engine.state[SATURATED].sum()))
    print("losses", losses, "weights and moments", digest(engine), "allocations after the first step", new)


def block(fn: Callable[[], None], seconds: float) -> float:
    """Median seconds of fn over a block of `seconds`."""
    times: list[float] = []
    while sum(times) < seconds:
        torch.cuda.synchronize()
        began = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--B", type=int, required=True)
    parser.add_argument("--T", type=int, default=1024)
    parser.add_argument("--tokens", type=int, required=True, help="tokens a step")
    parser.add_argument("--recompute", type=int, default=0)
    parser.add_argument("--masters", default="auto")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp8"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one block")
    parser.add_argument("--no-yardstick", action="store_true")
    parser.add_argument("--first-only", action="store_true", help="three steps, then stop")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    began = time.perf_counter()
    spec = EngineSpec(parse_shape(a.model), B=a.B, T=a.T, compute=a.precision, recompute=a.recompute, masters=a.masters)
    engine = Engine(spec, device="cuda")
    torch.cuda.synchronize()
    print(f"engine ready after {time.perf_counter() - began:.1f} s: {engine.num_parameters:,} parameters")
    print("arena MiB:", {k: v >> 20 for k, v in engine.arena.sizes().items()}, "missing:", missing_on(engine.device))
    micro = a.tokens // (a.B * a.T)
    first_steps(engine, micro)
    if a.first_only:
        return
    memory = used_mib(engine.device)
    stick = None if a.no_yardstick or a.precision == "fp8" else yardstick(recorded(engine))
    steps: list[float] = []
    sticks, clocks = [], []
    time_steps(engine, micro, 1.0)  # warm
    for _ in range(a.rounds):
        with Smi() as smi:
            steps += time_steps(engine, micro, a.seconds)
        clocks.append(smi.medians())
        if stick is not None:
            with Smi() as smi:
                sticks.append(block(stick, a.seconds))
            clocks.append(smi.medians())
    step = statistics.median(steps)
    name = torch.cuda.get_device_name()
    mfu = engine.flops_per_token * a.tokens / step / (peak_flops(name) or float("nan"))
    ratio = step / (micro * statistics.median(sticks)) if sticks else float("nan")
    row = {
        "model": a.model, "B": a.B, "T": a.T, "tokens": a.tokens, "recompute": a.recompute, "masters": a.masters,
        "ms": f"{1e3 * step:.2f}", "tok_s": f"{a.tokens / step:.0f}", "mfu": f"{mfu:.4f}",
        "yardstick_ms": f"{1e3 * statistics.median(sticks):.2f}" if sticks else "",
        "ratio": f"{ratio:.4f}" if sticks else "",
        "steps": len(steps), "memory_mib": memory, "card": name, "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "commit": commit(),
    }  # fmt: skip
    print(
        f"in {a.precision}:",
        ", ".join(f"{key} {value}" for key, value in row.items()),
        f"loss {engine.stats()['loss']:.3f}",
    )
    print("clock MHz, watts by block (step, yardstick, ...):", clocks)
    print("backends:", ", ".join(f"{op} {name}" for op, name in sorted(engine.frame.k.choices.items())))
    if a.out:
        append_row(a.out, row)


if __name__ == "__main__":
    main()
