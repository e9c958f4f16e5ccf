"""A step of finetuning on one GPU: tokens a second, memory, and the time of each operation, with random weights.

    python bench/finetune_step.py llama3-8b --B 4 --recompute 1 --costs --out results.csv
    python bench/finetune_step.py llama3-8b --method qlora --B 2 --recompute 2
    python bench/finetune_step.py llama3-8b --B 4 --recompute 1 --packed
    python bench/finetune_step.py smollm2-135m --method full --B 4 --packed --learned 0.5
    python bench/finetune_step.py llama3-8b --method full --masters none --moments bf16 --recompute 3

Every row is one document of T tokens, or with --packed documents of 300 tokens on average. With --learned the other
targets are masked, in spans as chats have them: a question, then an answer of 60 tokens on average. Three first steps
give losses to the last digit and a checksum of what was trained. Then blocks of steady steps are timed. It prints the
memory that the driver says is in use, beside the plan's, and how often the first steps made torch allocate.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from gpu_step import Smi, commit, digest
from timing import append_row
from torch import Tensor

from daybreak.config_keys import LoraConfig, OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.device import used_mib
from daybreak.report.bench import batches, meter
from daybreak.shapes import parse_shape
from daybreak.state.throughput import peak_flops

AVERAGE = 300  # tokens of a document in packed rows
ANSWER = 60  # tokens of an answer, all of which are learned
SETS = 8  # batches that steps take in turn


def fill(engine: Engine) -> None:
    """Random weights, drawn where the engine is: a CPU would take minutes for 8 billion."""
    generator = torch.Generator(engine.device).manual_seed(1)
    for name, row in engine.table.rows.items():
        value = torch.full(row.shape, row.fill, dtype=engine.spec.dtype, device=engine.device)
        if row.std or row.bound:
            value.normal_(0.0, row.std or row.bound / 2, generator=generator)
        engine.set_exact(name, value)
    if engine.device.type == "cuda":
        del value
        torch.cuda.empty_cache()


def places(B: int, T: int, seed: int) -> Tensor:
    """Positions (B, T) of packed rows: documents of 60 to 540 tokens, each cut where its row ends."""
    rng, found = random.Random(seed), torch.empty(B, T, dtype=torch.int64)
    for row in found:
        at = 0
        while at < T:
            n = min(rng.randint(AVERAGE // 5, 2 * AVERAGE - AVERAGE // 5), T - at)
            row[at : at + n] = torch.arange(n)
            at += n
    return found


def answers(n: int, learned: float, seed: int) -> Tensor:
    """Which of n targets are learned (bool): questions and answers in turn, whose lengths make the share `learned`."""
    rng, found, at, owed = random.Random(seed), torch.zeros(n, dtype=torch.bool), 0, 0.0
    if learned in (0.0, 1.0):
        return found.fill_(learned)
    while at < n:
        answer = rng.randint(ANSWER // 2, ANSWER + ANSWER // 2)
        owed += answer * (1 - learned) / learned  # of questions; what is less than a token waits for the next one
        at, owed = at + int(owed), owed - int(owed)
        found[at : at + answer] = True
        at += answer
    return found


def inputs(engine: Engine, learned: float) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Tokens, targets and positions of one micro-step after the other. learned: the share of targets that is."""
    tokens = batches(engine, SETS)
    targets = tokens[:, :, 1:].clone()
    targets[~answers(targets.numel(), learned, 3).view(targets.shape)] = -1
    positions = [places(engine.B, engine.T, i) if engine.spec.documents else None for i in range(SETS)]
    while True:
        yield from zip(tokens[:, :, :-1], targets, positions, strict=True)


def one_step(engine: Engine, batch: Iterator[tuple[Tensor, Tensor, Tensor | None]], micro: int, step: int) -> None:
    parts = [next(batch) for _ in range(micro)]
    engine.begin_step(lr=1e-4, step=step, valid=sum(int((targets >= 0).sum()) for _, targets, _ in parts))
    for i, part in enumerate(parts):
        engine.micro_step(*part, first=i == 0, last=i == micro - 1)
    engine.update()


def allocations(engine: Engine) -> int:
    return torch.cuda.memory_stats()["allocation.all.allocated"] if engine.device.type == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a published shape, such as llama3-8b or llama3.2-1b")
    parser.add_argument("--method", default="lora", choices=("lora", "lora8", "qlora", "full"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--B", type=int, default=1)
    parser.add_argument("--T", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=1, help="micro-steps of a step")
    parser.add_argument("--recompute", type=int, default=0)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--learned", type=float, default=1.0, help="share of targets that is learned, from 0 to 1")
    parser.add_argument("--layers", type=int, help="instead of the shape's, to try this script")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--masters", default="auto")
    parser.add_argument("--moments", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--lora", default="auto", help="backend of the adapters' matmuls: triton or torch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one block")
    parser.add_argument("--costs", action="store_true", help="print the time of each operation, too")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    cfg, began = parse_shape(a.model), time.perf_counter()
    base = {"lora8": "fp8", "qlora": "nf4"}.get(a.method, "compute")
    lora = LoraConfig() if a.method == "full" else LoraConfig(a.rank, base=base)
    spec = EngineSpec(
        replace(cfg, L=a.layers or cfg.L), B=a.B, T=a.T, compute=a.precision, recompute=a.recompute, lora=lora,
        documents=a.packed, optim=OptimConfig(beta2=0.999, weight_decay=0.0), masters=a.masters,
        moments=a.moments, kernels={"lora": a.lora},
    )  # fmt: skip
    engine = Engine(spec, device=a.device, init=False)
    fill(engine)
    print(f"engine ready after {time.perf_counter() - began:.1f} s: {engine.num_parameters:,} parameters")
    sizes = {name: size >> 20 for name, size in engine.arena.sizes().items()}
    print(f"planned MiB: {sum(sizes.values())} = {sizes}")
    batch, losses, before = inputs(engine, a.learned), [], 0
    for step in range(3):
        one_step(engine, batch, a.micro, step)
        losses.append(engine.stats()["loss"])
        before = before or allocations(engine)
    new = allocations(engine) - before
    print("losses", losses, "weights and moments", digest(engine), "allocations after the first step", new)
    memory, cuda = used_mib(engine.device), engine.device.type == "cuda"
    times, clocks, step = [], [], 3
    for _ in range(a.rounds):
        with Smi() if cuda else nullcontext() as smi:
            taken: list[float] = []
            while len(taken) < 2 or sum(taken) < a.seconds:
                start = time.perf_counter()
                one_step(engine, batch, a.micro, step)
                engine.stats()  # waits
                taken.append(time.perf_counter() - start)
                step += 1
        times += taken[1:]
        clocks += [smi.medians()] if smi is not None else []
    tokens, seconds = a.micro * a.B * a.T, statistics.median(times)
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    row = {
        "model": a.model, "method": a.method, "rank": a.rank, "B": a.B, "T": a.T, "micro": a.micro,
        "recompute": a.recompute, "packed": int(a.packed), "learned": a.learned, "precision": a.precision,
        "ms": f"{1e3 * seconds:.2f}", "tok_s": f"{tokens / seconds:.0f}",
        "mfu": f"{engine.flops_per_token * tokens / seconds / peak:.4f}" if peak else "", "memory_mib": memory,
        "allocations": new, "steps": len(times), "card": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "commit": commit(),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    print("clock MHz and watts by block:", clocks)
    if a.out:
        append_row(a.out, row)
    if a.costs and not a.packed:
        for name, cost in sorted(meter(engine).items(), key=lambda item: -item[1].seconds):
            rates = f"{cost.nbytes / cost.seconds / 1e12:.2f} TB/s {cost.flops / cost.seconds / 1e12:.0f} TFLOP/s"
            print(f"{name:24} {cost.calls:5} calls {1e3 * cost.seconds:9.3f} ms  {rates}")
    print("backends:", ", ".join(f"{op} {name}" for op, name in sorted(engine.frame.k.choices.items())))


if __name__ == "__main__":
    main()
