"""The program that the tests of several ranks run in each of them."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ranks
import torch

from daybreak import parallel
from daybreak.config_keys import GuardConfig, OptimConfig
from daybreak.data.loader import Loader
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.collectives import Collectives
from daybreak.errors import DataError, Error
from daybreak.kernels.guard import WINDOW
from daybreak.parallel import Group, connect
from daybreak.shapes import GPT2Config, NanochatConfig

SAMPLES, T, V = 12, 8, 61
SHAPE = GPT2Config(L=2, C=24, NH=2, max_T=12, V=V)  # rows that are no multiples of 128


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, V, (SAMPLES, T + 1), generator=torch.Generator().manual_seed(step))


def gradients(engine: Engine) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Of each tensor, the parts whose sum over all ranks is here: (first element, values)."""
    plan = engine.comm.sharding
    if not plan.zero:
        return {name: [(0, engine.grad(name).flatten().clone())] for name in engine.table.rows}
    return {
        name: [(where.start, engine.state["shard"][at].clone()) for where, at in plan.within(name, plan.shards())]
        for name in engine.table.rows
    }


def noted(comm: Collectives) -> list[tuple[str, int, float]]:
    """(what, bucket, bytes that each rank sends for it) of the exchanges that are started from now on, in order."""
    found: list[tuple[str, int, float]] = []
    reduce, gather, share = comm.reduce, comm.gather, (comm.sharding.world - 1) / comm.sharding.world

    def noting_reduce(k: int, grads: torch.Tensor, out: torch.Tensor | None) -> None:
        what, times = ("all_reduce", 2) if out is None else ("reduce_scatter", 1)
        found.append((what, k, times * grads.nbytes * share))
        reduce(k, grads, out)

    def noting_gather(weights: torch.Tensor) -> None:
        gather(weights)
        spans = {k: comm.sharding.buckets[k].stop - comm.sharding.buckets[k].start for k in comm.gathering}
        found.extend(("all_gather", k, n * weights.itemsize * share) for k, n in spans.items())

    comm.reduce, comm.gather = noting_reduce, noting_gather  # type: ignore[method-assign]
    return found


def train(
    group: Group, zero: int, compute: str, steps: int, B: int, masters: str = "auto", bucket: int = 16384,
    z_loss: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    clip = 0.0 if masters == "none" else 0.5  # the norm's last bit depends on the stage, and with it the clip's scale
    spec = EngineSpec(
        SHAPE, B=B, T=T, compute=compute, optim=OptimConfig(clip=clip, z_loss=z_loss), masters=masters, zero=zero,
        bucket_bytes=bucket, moments="bf16" if masters == "none" else "fp32",
    )  # fmt: skip
    engine = Engine(spec, seed=3, group=group)
    mine, exchanges = SAMPLES // group.world, noted(engine.comm)
    losses, norms, first, record, grads = [], [], {}, [], {}
    for step in range(steps):
        rows = batch(step)[group.rank * mine : (group.rank + 1) * mine].view(-1, B, T + 1)
        engine.begin_step(lr=3e-3, step=step, valid=SAMPLES * T)
        for i, part in enumerate(rows):
            engine.micro_step(part[:, :-1], part[:, 1:], first=i == 0, last=i == len(rows) - 1)
        engine.update()
        losses.append(engine.stats()["loss"])
        norms.append(engine.stats()["norm"])
        if step == 0:
            first = {name: grad for name, _, grad in engine.norms()}
            grads = gradients(engine)
        if step == 1:
            record = list(exchanges)
        exchanges.clear()
    engine.finish()
    volume = engine.arena.sharding.volume(engine.frame.dtype, mine // B)
    plan = engine.arena.sharding
    return {
        "losses": losses, "norms": norms, "first": first, "record": record, "volume": volume, "numel": plan.numel,
        "weights": {name: engine.param(name).clone() for name in engine.names()}, "nbytes": engine.arena.nbytes,
        "buckets": [(b.start, b.stop, b.moment) for b in plan.buckets],
        "calls": [call.name for call in engine.arena.calls],
        "grads": grads,
    }  # fmt: skip


def run(args: list[str]) -> int:
    """One training after the other, each on the same 12 samples a step. args: OUT, then
    ZERO,COMPUTE,STEPS,B,MASTERS and maybe z-loss of each; the results go to OUT/WORLD-ZERO-COMPUTE-MASTERS-RANK.pt."""
    out, jobs = Path(args[0]), [job.split(",") for job in args[1:]]
    group = connect(os.environ, 60)
    for zero, compute, steps, B, masters, *z_loss in jobs:
        result = train(group, int(zero), compute, int(steps), int(B), masters, z_loss=float(*z_loss))
        torch.save(result, out / f"{group.world}-{zero}-{compute}-{masters}-{group.rank}.pt")
    group.close()
    return 0


def scalars(args: list[str]) -> int:
    """Three updates of nanochat's family in bf16. What this rank's model then reads of scalars, what it has of their
    exact values, and its losses go to OUT/WORLD-ZERO-MASTERS-RANK.pt: args is OUT."""
    group = connect(os.environ, 60)
    shape = NanochatConfig(L=4, C=48, NH=2, max_T=12, V=V)
    optim = OptimConfig(name="muon", lr=0.004, muon_lr=0.02, clip=0.0)
    for zero, masters in product(range(3 if group.world > 1 else 1), ("split", "fp32", "none")):
        spec = EngineSpec(shape, B=12 // group.world, T=T, compute="bf16", optim=optim, masters=masters, zero=zero)
        engine, losses = Engine(spec, seed=3, group=group), []
        mine = slice(group.rank * spec.B, (group.rank + 1) * spec.B)
        for step in range(3):
            rows = batch(step)[mine]
            engine.train_step(rows[None, :, :-1], rows[None, :, 1:], lr=4e-3, step=step)
            losses.append(engine.stats()["loss"])
        engine.finish()
        read = {name: engine.frame.w(name).clone() for name in engine.frame.wide}
        exact = {name: [part.float().clone() for _, part in engine.exact_parts(name)] for name in read}
        torch.save((read, exact, losses), Path(args[0]) / f"{group.world}-{zero}-{masters}-{group.rank}.pt")
    group.close()
    return 0


def outliers(args: list[str]) -> int:
    """Updates with a full window of losses, before the second and third of which rank 1 alone sees another loss. What
    every rank then has goes to OUT/ZERO-RANK.pt: args is OUT."""
    group = connect(os.environ, 60)
    for zero in range(3):
        engine = Engine(EngineSpec(SHAPE, B=4, T=T, guard=GuardConfig(loss_z=4.0), zero=zero), seed=3, group=group)
        history = torch.linspace(4.0, 4.3, WINDOW, dtype=torch.float64)
        engine.state["windows"][0].copy_(history)
        engine.state["counts"].fill_(WINDOW)
        found = []
        for step, added in enumerate((0.0, 1.0, torch.nan, 0.0)):
            rows = batch(step)[group.rank * 4 : (group.rank + 1) * 4]
            engine.begin_step(lr=3e-3, step=step, valid=SAMPLES * T)
            engine.micro_step(rows[:, :-1], rows[:, 1:], first=True)
            engine.state["loss"].add_(added if group.rank == 1 else 0.0)
            engine.update()
            engine.finish()
            kept = {name: engine.state[name].clone() for name in ("weights", "m", "v", "windows", "counts")}
            found.append((engine.stats(), kept))
        torch.save(found, Path(args[0]) / f"{zero}-{group.rank}.pt")
    group.close()
    return 0


def masked(args: list[str]) -> int:
    """The command line, where targets that 3 does not divide, and every fourth sample, are not learned."""
    plain = Loader.batch

    def batch(loader: Loader, first: int, count: int) -> Any:
        tokens, targets = plain(loader, first, count)
        learned = (targets % 3 == 0) & (np.arange(first, first + count) % 4 > 0)[:, None]
        return tokens, np.where(learned, targets.astype(np.int64), -1)

    with patch.object(Loader, "batch", batch):
        return ranks.daybreak(args)


def together(act: Callable[[Group], None], timeout: float = 60) -> int:
    """The end of a rank that does `act`; the sentence is printed."""
    group = connect(os.environ, timeout)
    try:
        with group.failing_together():
            act(group)
    except Error as error:
        print(error)
        return error.exit_code
    finally:
        group.close()
    return 0


def blame(args: list[str]) -> int:
    """Rank 0 fails and leaves at once; rank 1 waits for it; rank 2 is at work for a while, and then waits for it."""

    def act(group: Group) -> None:
        if group.rank == 0:
            raise DataError("the reason.")
        time.sleep(4.0 if group.rank == 2 else 0.0)
        group.gather(None)

    return together(act)


def disk_trouble(args: list[str]) -> int:
    """The system refuses something to rank 1, alone or in `everywhere`. Its error has an error's number and a path, or,
    as numpy's, neither."""
    how, number = args

    def refused(rank: int) -> None:
        if rank == 1:
            raise PermissionError(errno.EACCES, "Permission denied", "a/b") if number == "13" else OSError("0 written")

    def act(group: Group) -> None:
        try:
            group.everywhere(lambda: refused(group.rank)) if how == "everywhere" else refused(group.rank)
        except OSError:
            if how == "everywhere":
                return
            raise
        group.gather(None)

    try:
        return together(act)
    except OSError:
        return 0


def waits_for_a_device(args: list[str]) -> int:
    """A GPU as the host sees it when rank 1 dies, says why it goes, or does nothing: its work is never over. The
    silence of a dead rank, the reason and the timeout each end the waiting alone: the other two would take hours."""
    (how,) = args
    parallel.BEAT = 0.2
    parallel.SILENT = 1.0 if how == "dies" else 1e4

    def act(group: Group) -> None:
        group.timeout = 3.0 if how == "is late" else 1e4
        if group.rank == 1 and how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if group.rank == 1 and how == "says why":
            raise DataError("the reason.")
        if group.rank == 1:
            time.sleep(1e4)
        group.wait_for(iter([False, False, True]).__next__)
        group.wait_for(lambda: False)

    return together(act)


def learned_batches(step: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Two micro-steps (1, T) of packed rows. Of rank 0 few targets are learned, of rank 1 all or half of them."""
    found = []
    for i in range(2):
        rows = torch.randint(0, V, (1, T + 1), generator=torch.Generator().manual_seed(100 * step + 10 * rank + i))
        targets = rows[:, 1:].clone()
        targets[:, (1 + step % 2, 8 - 4 * i)[rank] :] = -1
        found.append((rows[:, :-1], targets, torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])))
    return found


def learned_engine(zero: int, B: int, group: Group = parallel.ALONE) -> Engine:
    return Engine(EngineSpec(SHAPE, B=B, T=T, compute="fp64", documents=True, zero=zero), seed=3, group=group)


def learned(args: list[str]) -> int:
    """Three steps in fp64 on packed rows. What this rank computed and exchanged goes to OUT/RANK.pt: args are OUT and
    ZERO. Then one step more, in which all targets are learned."""
    from daybreak.engine import step as engine_step

    group = connect(os.environ, 60)
    engine, parts, losses = learned_engine(int(args[1]), 1, group), list[int](), list[float]()
    exchanges, original = noted(engine.comm), engine_step.learned_part

    def noting(*given: Any) -> int:
        parts.append(original(*given))
        return parts[-1]

    with patch.object(engine_step, "learned_part", noting):
        for i in range(3):
            exchanges.clear()
            tensors = (torch.stack(x) for x in zip(*learned_batches(i, group.rank), strict=True))
            engine.train_step(*tensors, lr=1e-3, step=i)
            losses.append(engine.stats()["loss"])
        mine = list(exchanges)
    engine.finish()
    found = {"parts": parts, "losses": losses, "exchanges": mine}
    found["weights"] = {name: engine.param(name).clone() for name in engine.names()}
    engine.update()  # weights are stale again, as before a step
    exchanges.clear()
    tokens, _, positions = (torch.stack(x) for x in zip(*learned_batches(0, group.rank), strict=True))
    engine.train_step(tokens, tokens, positions, lr=1e-3, step=3)
    torch.save(found | {"of all rows": list(exchanges)}, Path(args[0]) / f"{group.rank}.pt")
    group.close()
    return 0
