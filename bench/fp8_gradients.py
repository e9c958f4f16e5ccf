"""Relative errors of gradients in fp8, tensor by tensor, and how each rung of the ladder for fp8 changes them.

    python bench/fp8_gradients.py d12 --steps 50,500,5000 --out errors.csv --data.train GLOB --data.val GLOB

A target is trained as `daybreak train` does it with the other flags: in bf16 on a GPU, and in fp32 on a CPU, where that
is faster. The folder of a run gives the weights of its checkpoints. At each of the steps, weights are rounded to bf16.
Engines of all variants then compute gradients of the same micro-batches with them, one engine after the other. The
reference computes in fp32 without TF32.

    bf16       no fp8
    fp8        as with precision.compute = fp8
    slow       fp8, and forward and input gradients add up in fp32 too. A CPU always does, so it leaves this one out
    e4m3       fp8 with gradients of activations in e4m3 and not e5m2, and with the room that activations have
    first      fp8 but for the first block, which is in bf16 by a pattern of precision.fp8; so is the last one in `last`
    ends       fp8 but for both
    weights    fp8 but for weight gradients, whose inputs are in bf16
    all        all rungs together

Scales come as in a run: its first micro-step is made twice, and later scales have a history, here of WARM steps without
an update. Nothing is recomputed. The configuration has no keys for slow, e4m3 and weights, so REPLACED and
`beside_bf16` change the engine. Packed rows and nanochat's family are not supported. It times nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from daybreak.config import Config, resolve
from daybreak.data.loader import Loader
from daybreak.data.mixing import open_loaders
from daybreak.engine import Engine, EngineSpec, formats, scales
from daybreak.engine.device import engine_spec, pick_device, set_precision
from daybreak.engine.passes import micro_step
from daybreak.kernels import Kernels
from daybreak.kernels.cuda import cublaslt
from daybreak.kernels.fp8 import E4M3
from daybreak.kernels.operand import Operand
from daybreak.state.run import Run
from daybreak.training.schedule import learning_rate

RUNGS: dict[str, Sequence[str]] = {rung: (rung,) for rung in ("slow", "e4m3", "first", "last", "weights")}
VARIANTS = {"bf16": (), "fp8": ()} | RUNGS | {"ends": ("first", "last"), "all": tuple(RUNGS)}
REPLACED: dict[str, Sequence[tuple[Any, str, Any]]] = {  # parts of the engine, while a rung's gradients are computed
    "slow": [(cublaslt, "gemm", partial(cublaslt.gemm, slow=True))],  # matmuls in bf16 ignore it
    "e4m3": [(formats, "E5M2", E4M3), (scales, "GRADIENT_ROOM", scales.ROOM)],
}
WARM = 4  # steps
Batches = tuple[Tensor, ...]  # tokens and targets (A, B, T) of A micro-batches


def beside_bf16(kernels: Kernels) -> Kernels:
    """The same operations, but each that makes an input of weight gradients in fp8 makes a bf16 copy too. They read
    that one."""
    plain: dict[Operand, Tensor] = {}

    def make(name: str, run: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **how: Any) -> None:
            if name == "matmul_backward_weight" and isinstance(args[1], Operand):
                args = args[0], plain[args[1]], plain[args[2]]
            run(*args, **how)
            out, *rest = args
            if not isinstance(out, Operand) or out.current:  # current ones are weights
                return
            copy = plain[out] = torch.empty(out.shape, dtype=torch.bfloat16, device=out.scale.device)
            if name == "quantise":
                copy.copy_(rest[0])
            elif name == "matmul_gelu_forward":  # of GELU's input after its rounding, as for fp8
                torch.ops.aten.gelu.out(rest[0], approximate="tanh", out=copy)
            elif name == "matmul_gelu_backward":
                kernels.matmul_backward_input(copy, *rest[2:4])
                torch.ops.aten.gelu_backward.grad_input(copy, rest[4], approximate="tanh", grad_input=copy)
            else:  # a norm or a gate
                run(copy, *rest, **how)

        return call

    return kernels.each(make)


def gradients(
    spec: EngineSpec, device: torch.device, weights: dict[str, Tensor], data: Batches, rungs: Sequence[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and gradient of the mean loss of all micro-batches but the first WARM, which are for
    scales alone. The engine's memory is free at the end."""
    spec = replace(spec, fp8=tuple(f"h.{l}.*" for l in range("first" in rungs, spec.cfg.L - ("last" in rungs))))
    with ExitStack() as until:
        for change in (change for rung in rungs for change in REPLACED.get(rung, ())):
            until.enter_context(patch.object(*change))
        engine = Engine(spec, device=device, init=False)
        engine.load_params(weights)
        chosen, model, s = formats.formats_of(engine.spec, engine.model), engine.model, engine.state
        measuring, frame = (formats.in_formats(engine.frame, chosen, model, current=c) for c in (True, False))
        if "weights" in rungs:
            frame.k = beside_bf16(frame.k)
        parts = [*(slice(i, i + 1) for i in range(WARM if chosen else 0)), slice(WARM, None)]
        for step, (tokens, targets) in enumerate((data[0][part], data[1][part]) for part in parts):
            engine.begin_step(lr=0.0, step=step, valid=targets.numel())
            for i in range(len(tokens)):
                s["tokens"].copy_(tokens[i])
                s["targets"].copy_(targets[i])
                for f in (measuring, frame) if chosen and step == i == 0 else (frame,):
                    micro_step(model, f, s, first=i == 0)
                    if f is measuring or i == len(tokens) - 1:
                        measuring.note_amax()  # and into the history, as an update does without a guard
                        measuring.keep_amax()
    yield from ((name, engine.grad(name)) for name in engine.names())
    del engine, measuring, frame, f, s
    gc.collect()
    torch.cuda.empty_cache()


def compared(found: Iterable[tuple[str, Tensor]], exact: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """|g - exact| / |exact| and the cosine of both, of each tensor, of all blocks' tensors together, and of all."""
    sums = defaultdict[str, list[float]](lambda: [0.0] * 4)
    for name, g in found:
        g, r = g.float(), exact[name]
        parts = [float((a * b).sum(dtype=torch.float64)) for a, b in ((g - r, g - r), (r, r), (g, g), (g, r))]
        for of in (name, "all", "blocks")[: 3 if name.startswith("h.") else 2]:
            sums[of] = [a + b for a, b in zip(sums[of], parts, strict=True)]
    return {of: (math.sqrt(d / r), both / math.sqrt(r * g)) for of, (d, r, g, both) in sums.items()}


def batches(config: Config, loader: Loader, step: int, B: int, many: int = 0) -> Batches:
    """The micro-batches that follow after this many steps: those of the next step, or `many` of B sequences."""
    at = config.tokens_between(0, step) // config.T
    pair = loader.batch(at, many * B or config.tokens_at(step) // config.T)
    return tuple(torch.from_numpy(x.astype("int64")).view(-1, B, config.T) for x in pair)


def trained(config: Config, loader: Loader, device: torch.device, steps: Sequence[int]) -> Iterator[Engine]:
    """An engine with the weights after each of these steps."""
    engine = Engine(engine_spec(config, device), device=device, seed=config.run.seed)
    for step in range(steps[-1]):
        tokens, targets = batches(config, loader, step, config.batch.B)
        engine.train_step(tokens, targets, lr=learning_rate(step, config.optim, config.schedule), step=step)
        if step + 1 in steps:
            yield engine


def line(variant: str, found: Mapping[str, tuple[float, float]]) -> str:
    """A row of the table, from the result of `compared`: median and maximum of each kind of tensor, then the sums."""
    kinds = defaultdict[str, list[float]](list)
    for name, (error, _) in found.items():
        leaf = name.rpartition(".")[2]
        kinds["norms" if "ln" in leaf or "norm" in leaf else "biases" if leaf.endswith("b") else leaf].append(error)
    ends = [f"{of} {kinds.pop(of)[0]:.4f} cosine {found[of][1]:.6f}" for of in ("blocks", "all")]
    cells = (f"{k} {statistics.median(v):.4f} {max(v):.4f}" for k, v in kinds.items())
    return "  ".join([f"{variant:8}", *cells, *ends])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="as for daybreak train, or the folder of a run")
    parser.add_argument("--steps", default="50,500,1000")
    parser.add_argument("--B", type=int, default=4, help="sequences of a micro-batch whose gradients are compared")
    parser.add_argument("--micro", type=int, default=2, help="number of these micro-batches")
    parser.add_argument("--out", type=Path, help="CSV of all tensors")
    a, rest = parser.parse_known_args()
    steps = sorted(map(int, a.steps.split(",")))
    run = Run(a.target) if Path(a.target, "config.toml").is_file() else None
    flags = {"run.steps": str(steps[-1])} | {key[2:]: value for key, value in zip(rest[::2], rest[1::2], strict=True)}
    config = run.config if run else resolve(a.target, list(flags.items()))[0]
    _, loader, _ = open_loaders(config.data, config.T, config.run.seed, config.model.V)
    device = pick_device(config.run.device)
    config = config.concrete(loader.samples_per_epoch * config.T)
    set_precision(config.override({"precision.tf32": False}), device)
    engines = (run.load_engine(s)[0] for s in steps) if run else trained(config, loader, device, steps)
    make = partial(engine_spec, config, device, B=a.B, recompute=0, fp8=("h.*",), fp8_steps=None)
    variants = {v: rungs for v, rungs in VARIANTS.items() if v != "slow" or device.type == "cuda"}
    rows: list[Sequence[Any]] = [("step", "variant", "tensor", "relative error", "cosine")]
    for step, engine in zip(steps, engines, strict=True):
        weights = {name: engine.param(name).to(torch.bfloat16, copy=True) for name in engine.names()}
        given = device, weights, batches(config, loader, step, a.B, WARM + a.micro)  # data not yet seen
        exact = {name: g.clone() for name, g in gradients(make(compute="fp32"), *given)}
        for variant, rungs in variants.items():
            spec = make(compute="bf16" if variant == "bf16" else "fp8")
            found = compared(gradients(spec, *given, rungs), exact)
            print(f"{step:6} {line(variant, found)}", flush=True)
            rows += [(step, variant, name, f"{error:.6f}", f"{cosine:.8f}") for name, (error, cosine) in found.items()]
        if a.out:  # after each step: a long run may be cut off
            a.out.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
