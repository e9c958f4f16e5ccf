"""One training step of GPT-2 124M on the CPU: daybreak against eager PyTorch, and against its matmuls alone.

    python bench/cpu_step.py

Every contender is a process of its own with the same thread count, weights and batch. They take turns: while one steps
the others are blocked on their pipes. Prints medians, quartiles and ratios, and writes them to bench/results,
cpu_step_CPU.csv. It refuses to print a figure unless daybreak's losses equal the eager module's.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from contenders import RESULTS, Contender, commit, cpu_name, interleaved, quartiles, write
from eager_gpt2 import BETAS, CLIP, EPS, GPT2, LR, SHAPES, WEIGHT_DECAY, problem, serve, training_step
from torch import Tensor

from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.shapes import GPT2Config

CONTENDERS = {
    "fp32": {"daybreak": "engine fp32", "eager": "eager fp32", "matrix products alone": "gemm fp32"},
    "bf16": {
        "daybreak": "engine bf16",
        "eager, autocast": "eager bf16-autocast",
        "eager, cast to bf16": "eager bf16-cast",
        "matrix products alone": "gemm bf16",
    },
}
# Largest relative difference of the warm-up losses from the eager module's (in bf16: from the one with fp32 weights).
AGREEMENT = {"fp32": 1e-4, "bf16": 1e-2}
WARMUP = 2


def engine_step(model: str, module: GPT2, tokens: Tensor, targets: Tensor, compute: str) -> Callable[[], float]:
    """daybreak's step from the eager module's weights, with the same optimizer settings."""
    optim = OptimConfig(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY, clip=CLIP)
    B, T = tokens.shape
    engine = Engine(
        EngineSpec(GPT2Config(**SHAPES[model]._asdict()), B=B, T=T, compute=compute, optim=optim), init=False
    )
    ours = {"weight": "w", "bias": "b"}
    params = {}
    for name, p in module.named_parameters():  # h.0.fc.weight -> h.0.fcw, wte.weight -> wte
        layer, _, kind = name.rpartition(".")
        params[layer if layer in ("wte", "wpe") else layer + ours[kind]] = p.detach()
    engine.load_params(params)
    step = itertools.count()

    def run() -> float:
        engine.train_step(tokens[None], targets[None], lr=LR, step=next(step))
        return engine.stats()["loss"]

    return run


def gemm_step(module: GPT2, tokens: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """Every matmul of the step's linear layers, forward and backward, on random data; nothing else."""
    n = tokens.numel()
    products = []
    for p in module.parameters():
        if p.dim() == 2 and p is not module.wpe.weight:
            w = p.detach().to(dtype)
            x, dy = torch.randn(n, w.shape[1], dtype=dtype), torch.randn(n, w.shape[0], dtype=dtype)
            products += [(x, w.t()), (dy, w), (dy.t(), x)]
    outputs = [torch.empty(a.shape[0], b.shape[1], dtype=dtype) for a, b in products]

    def run() -> float:
        for (a, b), out in zip(products, outputs, strict=True):
            torch.mm(a, b, out=out)
        return 0.0

    return run


def work(contender: str, model: str, B: int, T: int) -> None:
    """The child process: build one contender and serve steps."""
    kind, dtype = contender.split()
    module, tokens, targets = problem(model, B, T)
    if kind == "engine":
        step = engine_step(model, module, tokens, targets, dtype)
    elif kind == "gemm":
        step = gemm_step(module, tokens, torch.float32 if dtype == "fp32" else torch.bfloat16)
    else:
        step = training_step(module, tokens, targets, dtype)
    serve(step)


def measure(dtype: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of every contender, `args.rounds` of each, interleaved; exits if the losses disagree."""
    flags = ["--model", args.model, "--B", str(args.B), "--T", str(args.T), "--threads", str(args.threads)]
    contenders = {name: Contender(__file__, "--work", work, *flags) for name, work in CONTENDERS[dtype].items()}
    for i in range(WARMUP):
        a, b = [c.ask("step")["loss"] for c in contenders.values()][:2]
        if not abs(a - b) <= AGREEMENT[dtype] * abs(b):
            sys.exit(f"{dtype}: no figures, because the losses of step {i} disagree: daybreak {a:.6f}, eager {b:.6f}")
    seconds = interleaved(contenders, "step", args.rounds)
    for c in contenders.values():
        c.close()
    return seconds


def report(dtype: str, seconds: dict[str, list[float]]) -> None:
    """Print seconds per step, and how many times longer each contender takes than daybreak, pair by pair."""
    ours = seconds["daybreak"]
    print(f"\n{dtype:<24}{'seconds per step':<28}times daybreak's")
    for name, values in seconds.items():
        ratios = [v / o for v, o in zip(values, ours, strict=True)]
        print(f"{name:<24}{quartiles(values):<28}{quartiles(ratios) if name != 'daybreak' else ''}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="124M")
    parser.add_argument("--B", type=int, default=4)
    parser.add_argument("--T", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: every core")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each contender, at least 7")
    parser.add_argument("--out", type=Path, help="default: bench/results/cpu_step_CPU.csv, for the 124M model only")
    parser.add_argument("--work", metavar="CONTENDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 7:
        parser.error(f"--rounds {args.rounds} is too few for quartiles; use at least 7")
    torch.set_num_threads(args.threads)
    if args.work:
        work(args.work, args.model, args.B, args.T)
        return

    setting = {
        "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "cpu": cpu_name(), "threads": args.threads,
        "torch": torch.__version__, "model": args.model, "B": args.B, "T": args.T,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in setting.items()) + f", {args.rounds} interleaved rounds")
    print("median (quartiles)")
    results = {"fp32": measure("fp32", args)}
    report("fp32", results["fp32"])
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        results["bf16"] = measure("bf16", args)
        report("bf16", results["bf16"])
    else:
        print("\nbf16: n/a, this CPU has no bf16 instructions that torch can use (AVX-512 BF16 or AMX)")
    cpu = re.sub(r"\(\w+\)|processor", "", cpu_name().lower()).split()
    out = args.out or (RESULTS / f"cpu_step_{'_'.join(cpu)}.csv" if args.model == "124M" else None)
    if out:
        write(out, setting, results)


if __name__ == "__main__":
    main()
