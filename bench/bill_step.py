"""Times steps of nanochat's published recipes on 1, 2 and 4 GPUs of one host, for bench/bill.py.

    torchrun --standalone --nproc-per-node 4 bench/bill_step.py rows.csv [--recipes d24,d22] [--precisions fp8,bf16]
        [--ranks 1,4,2] [--B 16] [--recompute 0] [--until SECONDS]

Each GPU has the tokens that it has on 8: 131,072 a step, 4 micro-steps of B = 16. One process a GPU goes through all
settings, so that imports and compiling take their time once. Smaller groups share the GPUs: 1 means that each GPU
trains alone, and all do at once. A row is of the slowest card, or group. Tokens are random, the same on every rank and
in every setting of a recipe, so the losses of 1, 2 and 4 ranks must agree. `first`, `middle` and `last` are the
micro-steps of a step: between ranks the first waits for gathered weights, and the last reduces gradients under its
backward. Rows are appended as they come. A setting that fails leaves a line on stderr, and ends the script.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bill import GPUS, RECIPES
from timing import append_row

from daybreak.config import Config
from daybreak.engine import Engine, plan_engine
from daybreak.engine.collectives import Sharding
from daybreak.engine.device import engine_spec, pick_device, set_precision, used_mib
from daybreak.engine.fit import plan_memory
from daybreak.engine.step import draw
from daybreak.optimizers.muon import STEPS, units_of
from daybreak.parallel import Group, connect
from daybreak.report.bench import batches
from daybreak.state.run_folder import package_commit

WARM, TIMED = 3, 10  # steps
SEED = 42
COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single", "all_gather_into_tensor",
               "all_gather_single", "all_gather_object")  # fmt: skip
ROOT = Path(__file__).parents[1]


class Among:
    """torch.distributed, whose collectives are of one group of ranks."""

    def __init__(self, dist: Any, ranks: Any) -> None:
        self._dist, self._ranks = dist, ranks

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._dist, name)
        return partial(found, group=self._ranks) if name in COLLECTIVES else found


class Part(Group):
    """Some of the ranks. The launcher ends a wait that is too long."""

    def wait_for(self, ready: Callable[[], bool]) -> None:
        while not ready():
            time.sleep(0.0002)


def parts(whole: Group, world: int) -> Part:
    """This rank's group of `world` ranks, of those that lie one after the other."""
    part = Part(whole.rank % world, world, whole.local_rank)
    part.capturable = whole.capturable
    for first in range(0, whole.world, world):
        if world > 1:
            ranks = whole.dist.new_group(list(range(first, first + world)))  # collective over all
            if first <= whole.rank < first + world:
                part.dist = Among(whole.dist, ranks)
    return part


def recipe_config(name: str, precision: str, B: int, recompute: int) -> Config:
    """A recipe of bill.py as a configuration: nanochat-d24 with another depth and vocabulary."""
    r = RECIPES[name]
    flags: dict[str, object] = {
        "model.L": r.L, "model.C": 64 * r.L, "model.NH": r.L // 2, "model.V": r.V, "batch.B": B, "run.steps": r.steps,
        "batch.recompute": recompute, "batch.total_tokens": r.step_tokens, "parallel.zero": 1,
        "precision.compute": precision, "optim.muon_weight_decay": r.weight_decay, "optim.horizon": r.steps,
    }  # fmt: skip
    if name == "toy":
        flags |= {"batch.T": 64, "model.max_T": 64, "model.window": 17, "batch.B": 2, "batch.total_tokens": 4096}
    return Config.from_target("nanochat-d24").override(flags)


def busiest(sharding: Sharding) -> float:
    """The largest part of Muon's matmuls that one rank has."""

    def work(rank: int) -> int:
        mine, found = copy.copy(sharding), 0
        mine.rank = rank
        for launch in mine.launches():
            for r, c in units_of(sharding.table.rows[launch.name]) if launch.name else ():
                small = min(r, c)
                found += len(STEPS) * (4 * small * r * c + 2 * small**3)
        return found

    each = [work(rank) for rank in range(sharding.world)]
    return max(each) / sum(each) if sharding.zero else 1.0


class Clock:
    """Marks in the device's own order of work."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.marks = cuda, list[Any]()

    def mark(self) -> None:
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def spans(self) -> list[float]:
        """Milliseconds between neighbours."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairwise(self.marks)]
        return [1e3 * (b - a) for a, b in pairwise(self.marks)]


def timed_steps(engine: Engine, config: Config, world: int, warm: int, timed: int) -> dict[str, Any]:
    """Medians of `timed` steps, in ms: the whole step by the host's clock, its micro-steps and update by the GPU's."""
    micro = config.batch.total_tokens // (engine.B * engine.T * GPUS)
    tokens, clock, began, pending = batches(engine, 8), Clock(engine.device.type == "cuda"), [], None
    for step in range(warm + timed):
        began.append(time.perf_counter())
        clock.mark()
        lr = config.optim.lr * min(1.0, (step + 1) / config.schedule.warmup)
        engine.begin_step(lr=lr, step=step, valid=micro * engine.B * engine.T * world)
        for i in range(micro):
            part = tokens[(step * micro + i) % len(tokens)]
            engine.micro_step(part[:, :-1], part[:, 1:], first=i == 0, last=i == micro - 1)
            clock.mark()
        previous, pending = pending, engine.update()
        if previous is not None:
            previous.values()
    clock.mark()
    loss = engine.stats()["loss"]
    whole = [1e3 * (b - a) for a, b in pairwise(began)][warm:]
    spans = clock.spans()[(warm * (micro + 1)) :]
    each = [statistics.median(spans[i :: micro + 1]) for i in range(micro + 1)]  # the update's ends at the next mark
    middle = statistics.mean(each[1 : micro - 1]) if micro > 2 else each[0]
    return {
        "micro_steps": micro, "ms": statistics.median(whole), "first_ms": each[0], "middle_ms": middle,
        "last_ms": each[micro - 1], "update_ms": each[micro], "loss": loss,
        "times": " ".join(f"{x:.1f}" for x in whole),
    }  # fmt: skip


def setting(a: argparse.Namespace, whole: Group, part: Part, config: Config, weights: Future[Any]) -> dict[str, Any]:
    """An engine of a group of ranks, its steps, and the figures of the slowest group."""
    device = pick_device("auto", whole)
    before, at = used_mib(device), time.perf_counter()
    engine = Engine(engine_spec(config, device), device=device, init=False, group=part)
    engine.init(SEED, weights)  # a CPU draws them again
    built = time.perf_counter() - at
    whole.gather(None)
    found = timed_steps(engine, config, part.world, a.warm, a.timed)
    found |= {"mib": used_mib(device), "mib_before": before, "share": busiest(engine.arena.sharding), "built_s": built}
    engine.graphs.clear()
    everyone = whole.gather(found)
    slowest = max(range(whole.world), key=lambda rank: everyone[rank]["ms"])
    first = slowest // part.world * part.world
    # A rank that waits for others does so in its update, which begins with a sum over all ranks.
    least = min(each["update_ms"] for each in everyone[first : first + part.world])
    most = max(each["mib"] for each in everyone)
    times = " ".join(f"{each['ms']:.1f}" for each in everyone)
    return everyone[slowest] | {"update_ms": least, "mib": most, "each_ms": times}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", default="d24,d22")
    parser.add_argument("--precisions", default="fp8,bf16")
    parser.add_argument("--ranks", default="1,4,2")
    parser.add_argument("--B", type=int, default=16)
    parser.add_argument("--recompute", type=int, default=0)
    parser.add_argument("--warm", type=int, default=WARM)
    parser.add_argument("--timed", type=int, default=TIMED)
    parser.add_argument("--until", type=float, default=1e9, help="no setting begins after so many seconds")
    a = parser.parse_args()
    began = time.perf_counter()
    whole = connect(os.environ, 300.0)
    device = pick_device("auto", whole)
    cuda, card = device.type == "cuda", "cpu"
    if cuda:
        torch.cuda.set_device(device)  # NCCL asks for it
        card = torch.cuda.get_device_name(device)
    commit = package_commit(ROOT) or os.environ.get("COMMIT", "")  # a copy without git is told
    drawn, groups = dict[str, Future[Any]](), dict[int, Part]()
    for name in a.recipes.split(","):
        for precision in a.precisions.split(","):
            config = recipe_config(name, precision, a.B, a.recompute)
            set_precision(config, device)
            spec = engine_spec(config, device)
            share8 = busiest(plan_engine(spec, Group(0, GPUS))[2].sharding)
            if name not in drawn:
                drawn = {name: ThreadPoolExecutor(1).submit(draw, spec, SEED)}  # while kernels are compiled
            for world in (n for n in map(int, a.ranks.split(",")) if n <= whole.world):
                if whole.gather(time.perf_counter() - began)[0] > a.until:
                    break
                if world not in groups:
                    groups[world] = parts(whole, world)
                found = setting(a, whole, groups[world], config, drawn[name])
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                if whole.rank:
                    continue
                planned = sum(plan_memory(config, device, spec.missing, Group(0, world))[0].sizes().values())
                tokens = found["micro_steps"] * config.batch.B * config.T * world
                row = {"recipe": name, "precision": precision, "ranks": world, "B": config.batch.B, "T": config.T,
                       "tokens": tokens, "recompute": a.recompute}  # fmt: skip
                keys = ("ms", "update_ms", "first_ms", "middle_ms", "last_ms")
                row |= {key: f"{found[key]:.2f}" for key in keys} | {"tok_s": f"{1e3 * tokens / found['ms']:.0f}"}
                row |= {"share": f"{found['share']:.6f}", "share8": f"{share8:.6f}", "loss": f"{found['loss']:.5f}"}
                row |= {key: found[key] for key in ("mib", "mib_before", "each_ms", "times")}
                row |= {"arena_mib": planned >> 20, "steps": a.timed - 1, "card": card, "torch": torch.__version__,
                        "date": time.strftime("%Y-%m-%d"), "commit": commit}  # fmt: skip
                append_row(a.out, row)
                said = ", ".join(f"{key} {row[key]}" for key in (*keys, "tok_s", "mib", "loss"))
                after = f"{time.perf_counter() - began:.0f} s, built in {found['built_s']:.0f}"
                print(f"{name} {precision} on {world}: {said} (after {after})", flush=True)
    whole.gather(None)
    sys.stdout.flush()
    whole.close()


if __name__ == "__main__":
    main()
