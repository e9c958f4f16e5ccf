"""`daybreak plan`: the memory, time, cost and disk of a run, before it starts. It needs no GPU and no data.

The memory is the arena's that training would allocate. Every figure is counted from the shapes, or its basis is named
beside it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import product

import torch

from daybreak.config import RECIPES, Config, recipe_names
from daybreak.data.mixing import open_loaders, open_sets, packed_rows
from daybreak.engine import DTYPES
from daybreak.engine.arena import Arena
from daybreak.engine.device import available_bytes, check_fp8, missing_on, pick_compute, pick_device
from daybreak.engine.fit import Fit, plan_memory
from daybreak.errors import DataError
from daybreak.formatting import counted, disk, format_duration, several
from daybreak.interop.source import LONGEST
from daybreak.models.registry import build_model
from daybreak.report.gpus import find_gpu, token_rate
from daybreak.state.restore import checkpoint_bytes, checkpoints_kept, staged_bytes

BUFFERS = {
    "weights": "weights in compute dtype",
    "frozen": "weights that do not learn, beside adapters",
    "masters": "master weights, which the optimizer updates",
    "grads": "gradients, added up over micro-steps",
    "operands": "weights in fp8, and their transposed copies",
    "kv": "keys and values of the text that is sampled",
    "momentum": "Muon's momentum",
    "second": "Muon's second moment, a value for each row or column",
    "m": "AdamW first moment",
    "v": "AdamW second moment",
    "state": "input batch, losses, device scalars",
    "scratch": "temporaries of one kernel call",
    "activations": "forward and backward, sharing bytes by lifetime",
}


ENOUGH_TOKENS = 16_384  # of a micro-step: with fewer the GPU idles, and more of them gain little
USABLE = 0.98  # of a GPU's memory: the driver keeps some, and allocations have a granularity
MIB = 1 << 20
CPU_PROCESS = 280 * MIB  # Python and torch, resident: `tiny` on an EPYC, torch 2.13.0+cpu, 28 Nov 2026
TRIED = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")  # GPUs that daybreak has run on


@dataclass(frozen=True, repr=False)
class Plan:
    """The memory and arithmetic of a configuration, on `gpus` devices of one kind. Its text is what the verb prints."""

    config: Config
    device: str  # cpu or cuda
    gpu: str  # its name, "" for a CPU
    gpus: int
    compute: str
    parameters: int
    flops_per_token: int
    arena: Arena
    outside: int  # bytes that a process has on the device beside its arena
    budget: int | None  # bytes that the device has for a run; None: the system does not say
    fit: Fit

    def __repr__(self) -> str:
        return "\n".join(f"{name:<18} {value}{basis and f'  [{basis}]'}" for name, value, basis in figures(self))

    @property
    def nbytes(self) -> int:
        """Bytes of GPU or CPU memory that training allocates, all of them at the start."""
        return self.arena.nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory for saving while training continues, allocated once. Several ranks save otherwise."""
        return staged_bytes(self.arena) if self.config.checkpoint.background and self.gpus == 1 else 0

    @property
    def micro_steps(self) -> int:
        """Micro-steps of the first step on one process."""
        return self.config.tokens_at(0, self.gpus) // (self.config.batch.B * self.config.T * self.gpus)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run; 0 if the run is one epoch of data that is not here."""
        return self.config.tokens_between(0, self.config.run.steps, self.gpus)

    @property
    def tok_s(self) -> tuple[float, str] | None:
        """Tokens a second, and the basis of this figure; None if nothing is known."""
        return self.rate(self.gpus)

    def rate(self, gpus: int) -> tuple[float, str] | None:
        """The same of `gpus` GPUs that each have this plan's B."""
        c, usual = self.config, Config()
        fp8 = self.compute == "fp8" and c.precision.fp8 == usual.precision.fp8
        if self.device != "cuda" or not (fp8 or self.compute == "bf16") or c.lora.rank or c.kernels != usual.kernels:
            return None
        other = (self.fit.missing, c.data.packed, c.batch.ramp, c.optim.name != "adamw", c.precision.moments != "fp32")
        alike = c.precision.masters in ("auto", "split") and not any(other)
        shape, part = (c.model, c.T, c.batch.B, c.batch.recompute), c.precision.fp8_until if fp8 else 0.0
        return token_rate(*shape, self.flops_per_token, self.gpu, gpus, c.tokens_at(0) if alike else 0, part)

    @property
    def hours(self) -> float | None:
        """Hours of training, validation and saving not counted."""
        return self.tokens / self.tok_s[0] / 3600 if self.tok_s and self.tokens else None


def plan(config: Config, *, gpu: str | None = None, gpus: int = 1) -> Plan:
    """The plan of a configuration, for this machine's device, or for `gpus` GPUs of the kind `gpu` (see GPUS).

    Raises ConfigError for a shape, GPU or device that cannot exist, or a step that takes more than all of the data, and
    DataError if the run's length is in epochs of data that is not there.
    """
    config.check(ranks=gpus)
    with suppress(DataError):  # data that is not here yet
        config = config.override({"data.packed": packed_rows(config.data) > 0})
    if not config.run.steps or config.run.tokens or config.run.epochs:
        # Tokens count for themselves, epochs in the data; one epoch is the default, of data that may not be here yet.
        data = (config.data, config.T, config.run.seed, config.model.V)
        with nullcontext() if config.run.epochs else suppress(DataError):
            epoch = 1 << 62 if config.run.tokens else open_loaders(*data)[1].samples_per_epoch * config.T
            steps = config.concrete(epoch, ranks=gpus).run.steps
            config = config.override({"run.steps": steps, "run.tokens": 0, "run.epochs": 0})
    if gpu is None:
        device = pick_device(config.run.device)
        name, missing, budget = "", set(missing_on(device)), available_bytes(device)
        if device.type == "cuda":
            name, budget = torch.cuda.get_device_name(device), int(USABLE * torch.cuda.mem_get_info(device)[1])
    else:
        found, device = find_gpu(gpu), torch.device("cuda")
        name, missing, budget = found.name, found.missing, int(USABLE * found.mib) * MIB
        for key in ("precision.compute", "lora.base"):
            if dict(config.items())[key] == "fp8":
                check_fp8(found.capability, f"an {found.name}", key, missing)
        if config.precision.compute == "auto":
            config = config.override({"precision.compute": "bf16" if found.peak else "fp32"})
    process = CPU_PROCESS if device.type == "cpu" else 0
    fit = Fit(device, missing, (budget or 1 << 62) - process, gpus)
    arena, outside = plan_memory(config, device, missing, fit.group(config))
    model = build_model(config.model, config.batch.recompute, device.type)
    parameters, frozen = arena.sharding.table.num_parameters, sum(row.numel for row in arena.sharding.table.frozen)
    flops = model.flops_per_token(config.T, parameters) - 2 * frozen  # as Engine counts them
    compute = pick_compute(config.precision.compute, device)
    return Plan(config, device.type, name, gpus, compute, parameters, flops, arena, outside + process, budget, fit)


def grouped(arena: Arena) -> list[tuple[str, str, int, int]]:
    """Activations as (name, shape and dtype of one, number, bytes of all). All layers of one are together."""
    groups: dict[str, tuple[str, int, int]] = {}
    for e in arena.entries:
        if e.buffer == "activations":
            name = re.sub(r"^h\.\d+\.", "h.*.", e.name)
            shape = f"{tuple(e.shape)} {str(e.dtype).removeprefix('torch.')}"
            _, count, size = groups.get(name, (shape, 0, 0))
            groups[name] = (shape, count + 1, size + e.nbytes)
    return sorted(((n, s, c, b) for n, (s, c, b) in groups.items()), key=lambda g: -g[3])


def suggest(p: Plan) -> tuple[str, str]:
    """Flags that suit this GPU or make the run fit, and the reason. A recipe's B is kept where it is enough: it may
    have been measured, and the model of speed knows no faster one."""
    c, fit = p.config, p.fit
    total = c.batch.total_tokens  # without it another B is another step: for who has not chosen one
    if total or (p.gpu and c.batch.B == Config().batch.B):
        share = c.tokens_at(0) // p.gpus if total else ENOUGH_TOKENS
        stages = [c.parallel.zero] if p.gpus == 1 or c.parallel.zero else [0, 1]
        for level, zero in product(range(4), stages):
            other, enough = c.override({"batch.recompute": level, "parallel.zero": zero}), min(ENOUGH_TOKENS, share)
            kept = total and enough <= c.batch.B * c.T and fit.need(other) <= fit.budget  # a larger B is not faster
            if kept and other == c:
                return "as it is", "modelled: it keeps the GPU busy with the least recomputation"
            B = c.batch.B if kept else fit.best_B(other)
            if enough <= B * c.T:
                flags = f"--batch.B {B} --batch.recompute {level}" + (f" --parallel.zero {zero}" if zero else "")
                step = "" if total else f"; a step is {B * c.T * p.gpus:,} tokens then: see docs/tuning.md for optim.lr"
                return flags, "modelled: the least recomputation that keeps the GPU busy" + step
    if p.budget and p.nbytes + p.outside > p.budget:
        return fit.advice(c), "makes it fit: planned"
    return "as it is", "planned"


def figures(p: Plan) -> list[tuple[str, str, str]]:
    """Rows of (name, value, basis), the answer first. The memory's details are in `_print_memory`."""
    c, na, cpu = p.config, "n/a", p.device == "cpu"
    steps, step = c.run.steps, c.tokens_at(0, p.gpus)
    total = p.nbytes + p.outside
    beside = f"; outside it {p.outside // MIB:,} MiB, measured {'for Python and torch' if cpu else 'on H200s'}"
    usable = f"; a run can use {USABLE:.0%} of the GPU" if p.gpu else ""
    basis = f"arena {p.nbytes // MIB:,} MiB, exact{beside}{usable}"
    rows = []
    if p.budget is None:
        rows.append(("fits", f"not known: {total // MIB:,} MiB, and the system does not say what is free", basis))
    else:
        fits = total <= p.budget
        need, there = f"{total // MIB:,} MiB", f"{p.budget // MIB:,} MiB"
        rows.append(("fits", f"yes: {need} of {there}" if fits else f"NO: it needs {need}, there are {there}", basis))
        flags, why = suggest(p)
        rows.append(("use" if fits else "to make it fit", flags, why))
        found = [p.fit.largest_B(c.override({"batch.recompute": r})) for r in range(4)]
        most = ", ".join(f"{b if b <= 1000 else 'over 1,000'} (recompute {r})" for r, b in enumerate(found))
        rows.append(("largest B", most if min(found) <= 1000 else "over 1,000", "planned"))
    if not c.batch.T and c.T > LONGEST:
        said = f"T is {c.T:,}, the longest that the model allows: a shorter --batch.T, such as 2048, needs less memory"
        rows.insert(2, ("sequences", said, "counted"))
    no_rate = (
        "no figure for this family, head size, GPU, precision, kernels or adapters; daybreak bench measures it there"
    )
    no_rate = "CPU speed is not predicted; daybreak bench measures it" if cpu else no_rate
    rows.append(("speed", f"{p.tok_s[0]:,.0f} tok/s", p.tok_s[1]) if p.tok_s else ("speed", na, no_rate))
    no_time = "no speed" if steps else "one epoch of its data, which is not here; give --steps"
    time = (format_duration(3600 * p.hours), "as the speed; validation and saving not counted") if p.hours else None
    rows.append(("time", *(time or (na, no_time))))
    if c.cost.price and p.hours:
        rate = f"${c.cost.price:,.2f} an hour for all GPUs together"
        rows.append(("cost", f"${p.hours * c.cost.price:,.2f}", f"as the time; {rate}"))
    elif c.cost.price:
        rows.append(("cost", na, "no time"))
    n, (first, two) = checkpoints_kept(c), (checkpoint_bytes(p.arena, i) for i in (1, 2))
    each = f"{n} x {disk(two - first)}" + (f" and the base, {disk(2 * first - two)}" if two < 2 * first else "")
    saved = (disk(first + (n - 1) * (two - first)), f"counted: {each}, one of them being written")
    rows += [("disk: data", *(_data_on_disk(p) or (na, no_time))), ("disk: checkpoints", *saved)]
    rows += [
        ("step", f"{step:,} tokens: {several(p.micro_steps, 'micro-step')} of B {c.batch.B} x T {c.T} on {p.gpus} x "
         f"{p.gpu or p.device}, {p.flops_per_token * step:.3g} FLOPs", "counted"),
        ("run", f"{several(steps, 'step')}, {counted(p.tokens, 'tokens')}, {p.flops_per_token * p.tokens:.3g} FLOPs"
         if steps else na, "counted" if steps else no_time),
    ]  # fmt: skip
    if p.gpus > 1:
        sent = p.arena.sharding.volume(DTYPES[p.compute], p.micro_steps)
        rows.append(("exchange", f"{disk(sent)} sent a step by each", f"counted, ZeRO stage {c.parallel.zero}"))
    frozen = sum(row.numel for row in p.arena.sharding.table.frozen)
    trained = f", {p.parameters - frozen:,} of them trained" if frozen else ""
    model = f"{p.parameters:,} parameters{trained}: {c.model.text()}"
    rows.append(("model", f"{model}, padded to {c.model.Vp}; {p.flops_per_token:,} FLOPs a token", "counted"))
    return [*rows, ("computes", f"in {p.compute} on {p.gpu or p.device}, recompute {c.batch.recompute}", "")]


def _data_on_disk(p: Plan) -> tuple[str, str] | None:
    """The size of the run's shards if they are here, else of as many tokens as it reads; and the basis."""
    with suppress(DataError):
        held = (shard.size for d in open_sets(p.config.data) for shard in (*d.train, *d.val))
        return disk(sum(held)), "counted: the shards that are here"
    size = 2 if p.config.model.V <= 1 << 16 else 4
    more = "; best_fit drops some more" if p.config.data.best_fit else ""
    return (disk(p.tokens * size), f"counted: {size} bytes a token, if each is seen once{more}") if p.tokens else None


def recipe_notes(target: str) -> list[str]:
    """The head of a shipped recipe's file: published results, each with its source."""
    if target not in recipe_names():
        return []
    lines = (RECIPES / f"{target}.toml").read_text().splitlines()
    return [line.removeprefix("# ") for line in lines[: lines.index("schema = 1")]]


def print_plan(p: Plan, notes: Sequence[str] = (), verbose: bool = False) -> None:
    """Print the plan on stdout, the answer first; if `verbose`, also tables of what is in memory."""
    print(p)
    if p.gpu and p.gpu not in TRIED:
        print(f"daybreak has not been run on {p.gpu} yet: `daybreak doctor --check` there says how it does.")
    if notes:
        print("\nPublished, for the recipe as it is shipped:\n" + "\n".join(notes))
    if verbose:
        _print_memory(p)
    else:
        print("\nWhat the memory holds: --verbose")


def _print_memory(p: Plan) -> None:
    """Print the buffers, and the activations before they share bytes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    table = Table("buffer", "holds", "MiB", title="\nMemory, allocated once at start (exact)", title_justify="left")
    table.columns[2].justify = "right"
    for name, size in p.arena.sizes().items():
        table.add_row(name, BUFFERS[name], f"{size / MIB:,.1f}")
    table.add_section()
    table.add_row("total", "", f"{p.nbytes / MIB:,.1f}")
    holds = "Python and torch" if p.device == "cpu" else "CUDA context, modules, graphs, NCCL, FA4's own"
    table.add_row("outside", f"{holds} (measured)", f"{p.outside / MIB:,.1f}")
    console.print(table)
    if p.host_nbytes:
        staged = f"{p.host_nbytes / MIB:,.1f} MiB (checkpoint.background)"
        console.print(f"Host memory, for saving beside training: {staged}")
    table = Table("activation", "shape", "tensors", "MiB", title="Activations before sharing", title_justify="left")
    table.columns[2].justify = table.columns[3].justify = "right"
    for name, shape, count, size in grouped(p.arena):
        if size >= MIB // 10 or len(table.rows) < 10:
            table.add_row(name, shape, str(count), f"{size / MIB:,.1f}")
    console.print(table)
