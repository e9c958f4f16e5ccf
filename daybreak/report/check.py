"""`daybreak doctor --check`: does daybreak compute and recover as it promises on this machine and this GPU?

Autograd stays out of the package, so gradients are checked in two steps. Finite differences of the loss in fp64 prove
the hand-written backward, which is the same code for every device. Its fp64 gradients then judge the kernels that this
device uses. The other checks train with `daybreak train` in processes of their own, in a folder that is removed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from daybreak import __version__
from daybreak.config import resolve
from daybreak.data.shards import ShardWriter
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.device import pick_compute, pick_device, used_mib
from daybreak.report.plan import MIB, Plan, plan
from daybreak.shapes import model_config
from daybreak.state.run import Run

EVERY, LIMIT = 5, 300.0  # steps between saves; seconds that one run may take, compiling included
STEP = 1e-5  # of a finite difference, times a direction of unit normal numbers
DERIVATIVE, FP32, BF16 = 1e-5, 1e-4, 5e-2  # largest error of a tensor, over its norm


def _batch(V: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(V, (1, B, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[..., :-1], tokens[..., 1:]


def _derivatives() -> float:
    """The largest error of a derivative that backward computes, over the gradient's norm, in fp64.

    It is compared with a finite difference of the loss, along one random direction in each parameter."""
    cfg = model_config({"L": 2, "C": 32, "NH": 2, "max_T": 16, "V": 61})
    engine = Engine(EngineSpec(cfg, B=2, T=16, compute="fp64"))
    tokens, targets = _batch(61, 2, 16)
    generator, worst = torch.Generator().manual_seed(2), 0.0
    engine.forward_backward(tokens, targets)
    for name in engine.names():
        weight, grad = engine.param(name), engine.grad(name).clone()
        direction = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        losses = []
        for step in (STEP, -2 * STEP, STEP):  # there, to the other side, and back
            weight += step * direction
            losses.append(engine.eval_losses(tokens[0], targets[0]).mean().item())
        error = abs((losses[0] - losses[1]) / (2 * STEP) - (grad * direction).sum().item()) / grad.norm().item()
        worst = max(worst, error) if error == error else error
    return worst


def _gradients(device: torch.device, compute: str) -> float:
    """The largest error of a parameter's gradient on this device, over its norm, against fp64 on the CPU."""
    cfg, (B, T) = model_config({"L": 2, "C": 256, "NH": 4, "max_T": 256, "V": 1000}), (4, 256)
    engine = Engine(EngineSpec(cfg, B=B, T=T, compute=compute), device=device)
    exact = Engine(EngineSpec(cfg, B=B, T=T, compute="fp64"))
    exact.load_params({name: engine.param(name).double().cpu() for name in engine.names()})
    for each in (engine, exact):
        each.forward_backward(*_batch(cfg.V, B, T))
    pairs = ((engine.grad(name).double().cpu(), exact.grad(name)) for name in engine.names())
    return torch.stack([(got - want).norm() / want.norm() for got, want in pairs]).max().item()  # NaN stays


def _setting(device: torch.device) -> tuple[str, dict[str, Any]]:
    """The target and keys of the runs: `tiny` on a CPU, else GPT-2 124M with as many sequences as fit, 8 at most."""
    target = "tiny" if device.type == "cpu" else "d12"
    config = resolve(target)[0]
    B = 8 if device.type == "cpu" else max(1, min(8, plan(config).fit.largest_B(config)))
    return target, {
        "batch.B": B, "batch.total_tokens": 2 * B * config.T, "schedule.name": "constant", "optim.lr": 1e-3,
        "optim.horizon": 10**6, "checkpoint.every": EVERY, "eval.every": 0, "eval.tokens": config.T,
        "eval.sample_tokens": 0,
    }  # fmt: skip


def _write(folder: Path, V: int, T: int) -> dict[str, Any]:
    """Write shards of random tokens, and return the keys that name them."""
    for split, samples in (("train", 4096), ("val", 4)):
        writer = ShardWriter(folder / f"{split}.bin")
        writer.write(torch.randint(V - 1, (samples * T + 1,)).numpy())
        writer.close()
    return {"run.dir": folder, "data.train": folder / "train.bin", "data.val": folder / "val.bin"}


def _train(target: str | Path, keys: dict[str, Any], log: Path, until: Callable[[], bool] = bool) -> None:
    """Run `daybreak train` to its end, or kill it once `until` holds. If it fails, RuntimeError has its last line."""
    flags = [x for key, value in keys.items() for x in (f"--{key}", str(value))]
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "daybreak", "train", str(target), "--quiet", *flags],
                                   stdout=out, stderr=out)  # fmt: skip
        try:
            deadline = time.monotonic() + LIMIT
            while process.poll() is None and not until() and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            process.kill()
            code = process.wait()
    if code and not (code < 0 and until()):
        raise RuntimeError([f"ended by signal {-code}", *log.read_text().strip().splitlines()][-1])


def _steps(run: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in Run(run).metrics("step")}


def _idle(device: torch.device, before: int = 1 << 40) -> int:
    """MiB of a GPU that are in use while no run is. Until it is what it was `before`, it may still be given back."""
    for _ in range(20):
        if device.type != "cuda" or used_mib(device) <= before:
            break
        time.sleep(0.1)
    return used_mib(device) if device.type == "cuda" else 0


def _checks(device: torch.device, compute: str, folder: Path) -> Iterator[tuple[bool | None, str]]:
    error, said = _derivatives(), "backward against finite differences of the loss in fp64: largest error"
    yield error <= DERIVATIVE, f"{said} {error:.1e} (limit {DERIVATIVE:.0e})"
    error, limit = _gradients(device, compute), BF16 if compute == "bf16" else FP32
    yield error <= limit, f"gradients on this device against fp64: largest error {error:.1e} (limit {limit:.0e})"
    target, keys = _setting(device)
    config = resolve(target)[0].override(keys)
    keys |= _write(folder, config.model.V, config.T)
    idle, p, log, killed, straight = [_idle(device)], plan(config), *(folder / x for x in ("log", "killed", "whole"))
    _train(target, {**keys, "run.name": killed.name, "run.steps": 10**6}, log,
           lambda: any(killed.glob("checkpoints/step-*")) and max(_steps(killed), default=0) > EVERY)  # fmt: skip
    idle, first = [*idle, _idle(device, idle[0])], _steps(killed)
    end = max(first) + EVERY
    _train(killed, {"run.steps": end}, log)
    idle.append(_idle(device, idle[0]))
    _train(target, {**keys, "run.name": straight.name, "run.steps": end}, log)
    idle, whole = [*idle, _idle(device, idle[0])], _steps(straight)
    equal = sum(first[step]["loss"] == whole[step]["loss"] for step in first)
    yield equal == len(first), f"two runs: {equal} of {len(first)} losses equal to the last bit"
    a, b = (Run(run).checkpoint().manifest for run in (killed, straight))
    same = all(a[key] == b[key] for key in ("step", "samples", "files"))  # sha256 of weights and optimizer state
    how = "equal" if same else "NOT equal"
    yield same, f"kill -9 after step {max(first)} and resume: every file of step {end} {how} to a run never stopped"
    pairs = [(whole[step]["mem_mib"], again["mem_mib"]) for step, again in _steps(killed).items() if step in whole]
    yield _memory(p, pairs, idle)
    rate = 1e3 * config.tokens_at(0) / median(r["ms"] for step, r in whole.items() if step > 3)
    beside = f"plan says {p.tok_s[0]:,.0f}, {p.tok_s[1].split(' ')[0].strip(':,')}" if p.tok_s else "plan has no figure"
    yield True, f"speed of {target}: {rate:,.0f} tok/s in the median step; {beside}"


def _memory(p: Plan, pairs: Sequence[tuple[int, int]], idle: Sequence[int]) -> tuple[bool | None, str]:
    """Memory beside the plan, None for not known. pairs: MiB in use at each step, which two processes made; idle: MiB
    in use between the runs.

    The driver only knows the sum of all programs. A run takes the same memory twice, so it is bad by the lower figure
    of two, less the most that others held. It is good by the higher one, less the least. Alone, both are the same.
    """
    planned = (p.nbytes + p.outside + (p.host_nbytes if p.device == "cpu" else 0)) // MIB
    most, limit = max(map(max, pairs)) - min(idle), 1.1 * planned + 128
    least = max(map(min, pairs)) - max(idle) if p.device == "cuda" else most
    used = f"{max(most, 0):,}" if least == most else f"between {max(least, 0):,} and {most:,}"
    said = f"{used} MiB used, {planned:,} MiB planned"
    if (least <= limit < most) or (p.device == "cuda" and most < planned // 2):
        return None, f"memory: not measured, another program uses this GPU; {said}"
    return most <= limit, f"memory: {said}"


def check() -> Iterator[str]:
    """Yield eight lines: the machine, six checks, and the verdict. The verdict starts with "all" if nothing is bad."""
    began, device = time.monotonic(), pick_device("auto")
    compute, marks = pick_compute("auto", device), list[str]()
    name = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    yield f"daybreak {__version__}, torch {torch.__version__}, {compute} on {name}; about two minutes"
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir="runs") as folder:
        try:
            for good, line in _checks(device, compute, Path(folder).resolve()):
                marks.append("n/a " if good is None else "good" if good else "BAD ")
                yield f"{marks[-1]}  {line}"
        except RuntimeError as error:
            marks.append("BAD ")
            yield f"BAD   a run failed, the rest is not checked: {error}"
    verdict = "all that was measured is good" if "n/a " in marks else "all good"
    verdict = f"{marks.count('BAD ')} bad" if "BAD " in marks else verdict
    yield f"{verdict}, in {time.monotonic() - began:.0f} s"
