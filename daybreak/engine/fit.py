"""Whether a run fits a device, and the flag that makes it fit. `plan` and the errors about memory use it."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from daybreak.config import Config
from daybreak.engine.arena import Arena
from daybreak.engine.device import available_bytes, engine_spec, missing_on, pick_device
from daybreak.engine.passes import plan_engine
from daybreak.errors import Error, OutOfMemory
from daybreak.parallel import ALONE, Group

# The memory of a process on a GPU beside its arena: CUDA context, modules, library handles, graphs; and with several
# ranks NCCL. Runs of `daybreak train` on 1, 2 and 4 H200, torch 2.11.0+cu130, 26 Nov 2026
# (bench/results/multi_gpu.csv): 676 and 684 MiB, and 1,442 to 1,465 with NCCL.
OUTSIDE, NCCL = 680 << 20, 773 << 20
# How torch, Triton, the CUDA driver and runtime, cuBLAS, cuDNN and the system say that an allocation failed.
NO_MEMORY = re.compile(r"out.of.memory|alloc(ation)?_failed|memoryallocation|allocate memory", re.IGNORECASE)


def plan_memory(
    config: Config, device: torch.device, missing: Collection[str], group: Group = ALONE
) -> tuple[Arena, int]:
    """The arena of a configuration on a kind of device, and the bytes that a process takes there beside it."""
    arena = plan_engine(engine_spec(config, device, missing), group)[2]
    if device.type != "cuda":
        return arena, 0
    outside, c = OUTSIDE + (NCCL if group.world > 1 else 0), config
    if arena.choices["attention_backward"] == "fa4":
        from daybreak.kernels.cuda.fa4 import workspace_bytes

        shared = getattr(c.model, "NKV", 0)
        outside += 2 * workspace_bytes(c.batch.B, c.T, c.model.NH, c.model.HS, shared)  # its own, in two graphs' pools
    return arena, outside


def worst_rank(config: Config, device: torch.device, missing: Collection[str], ranks: int) -> Group:
    """The rank that takes the most memory, to plan with: where parameters stay whole, not all have equally many."""
    table = plan_engine(engine_spec(config, device, missing), Group(world=ranks))[1]
    groups = [Group(rank, ranks) for rank in table.unlike_ranks(ranks)]
    if len(groups) == 1 or not config.parallel.zero:
        return groups[0]
    return max(groups, key=lambda group: plan_memory(config, device, missing, group)[0].nbytes)


class Fit:
    """Compares configurations with the bytes that a device has for them, on the rank that takes the most. Every size is
    planned once."""

    def __init__(self, device: torch.device, missing: Collection[str], budget: int, ranks: int = 1) -> None:
        self.device, self.missing, self.budget, self.ranks = device, missing, budget, ranks
        self._worst: Group | None = None
        self._needs: dict[Config, int] = {}

    def group(self, config: Config) -> Group:
        """The rank to plan with; nothing is connected. It is found once: B and recompute change what each rank needs,
        and which one needs the most hardly ever."""
        if self.ranks == 1 or not config.parallel.zero:
            return Group(world=self.ranks)
        self._worst = self._worst or worst_rank(config, self.device, self.missing, self.ranks)
        return self._worst

    def need(self, config: Config) -> int:
        """All bytes that a configuration takes on one device."""
        if config not in self._needs:
            arena, outside = plan_memory(config, self.device, self.missing, self.group(config))
            self._needs[config] = arena.nbytes + outside
        return self._needs[config]

    def largest_B(self, config: Config) -> int:
        """The largest B of a micro-step that fits; 0 if not even 1 does."""
        lo, hi, guess = 0, 1 << 20, config.batch.B
        seen: list[tuple[int, int]] = []
        while hi - lo > 1:
            size = self.need(config.override({"batch.B": guess}))
            lo, hi = (guess, hi) if size <= self.budget else (lo, guess)
            seen.append((guess, size))
            if len(seen) == 1:
                guess = 2 * guess if lo else 1
            else:  # bytes are almost proportional to B: follow the line through the last two
                (b0, s0), (b1, s1) = seen[-2:]
                guess = b1 + int((self.budget - s1) * (b1 - b0) // (s1 - s0)) if s1 != s0 else (lo + hi) // 2
            guess = min(max(guess, lo + 1), hi - 1)
        return lo

    def best_B(self, config: Config) -> int:
        """The largest B that fits and divides the tokens of every step; 0 if there is none."""
        totals = [tokens for _, tokens in config.batch.ramp]
        totals += [config.batch.total_tokens] if config.batch.total_tokens else []
        largest = self.largest_B(config)
        return next((b for b in range(largest, 0, -1) if all(t % (b * config.T * self.ranks) == 0 for t in totals)), 0)

    def advice(self, config: Config) -> str:
        """Flags that make it fit. It tries the least change first: a smaller B, sharded optimizer state, recomputation,
        no master weights, narrow moments, a shorter T."""
        share = {"parallel.zero": 1} if self.ranks > 1 and not config.parallel.zero else {}
        changes: list[dict[str, Any]] = [{}, share] if share else [{}]
        changes += [{**share, "batch.recompute": r} for r in (1, 2, 3) if r > config.batch.recompute]
        if self.device.type == "cuda" and config.precision.masters != "none":
            changes.append({**share, "batch.recompute": 3, "precision.masters": "none"})
        if self.device.type == "cuda" and config.precision.moments != "bf16" and not config.lora.rank:
            changes.append({**changes[-1], "precision.moments": "bf16"})
        short = [config.T >> i for i in range(1, 20) if config.T >> i >= 64 and config.T % (1 << i) == 0]
        changes += [{**changes[-1], "batch.T": T} for T in short]
        for change in changes:
            if B := self.best_B(config.override(change)):
                return " ".join(f"--{key} {value}" for key, value in [*change.items(), ("batch.B", B)])
        return "a smaller model or a device with more memory"


def check_fits(
    arena: Arena, device: torch.device, config: Config | None = None, ranks: int = 1, outside: int = 0
) -> None:
    """Raise OutOfMemory if the arena, and `outside` bytes beside it, do not fit the device's free memory. The message
    has the plan and, with a `config`, the flags that help."""
    free, need = available_bytes(device), arena.nbytes + outside
    if free is None or need <= free:
        return
    held = ", ".join(f"{name} {size >> 20} MiB" for name, size in arena.sizes().items() if size >> 20)
    fix = Fit(device, missing_on(device), free, ranks).advice(config) if config else "a device with more memory"
    raise OutOfMemory(f"the run needs {-(-need >> 20)} MiB ({held}) and {device} has {free >> 20} MiB free; try {fix}.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, in any library."""
    if isinstance(error, OSError):  # its text may have a file's name in it
        return error.errno == errno.ENOMEM
    told = not isinstance(error, Error) and NO_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(told)


@contextmanager
def explaining_memory(config: Config, group: Group = ALONE) -> Iterator[None]:
    """An allocation that fails inside becomes OutOfMemory, with the flags that help. It may fail although the arena
    fits, because other programs or libraries took the rest."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _ran_out(pick_device(config.run.device, group), config, group.world) from None


def _ran_out(device: torch.device, config: Config, ranks: int) -> OutOfMemory:
    free = 0
    with suppress(RuntimeError):  # a GPU may be so full that it does not even say so
        free = available_bytes(device) or 0
        if device.type == "cuda":
            free += torch.cuda.memory_reserved(device)  # what this process holds is its own
    fit = Fit(device, missing_on(device), 0, ranks)
    need = fit.need(config)
    fit.budget = min(free, need - 1)  # less than what has just failed, in any case
    return OutOfMemory(f"{device} ran out of memory: the run takes {need >> 20} MiB; try {fit.advice(config)}.")
