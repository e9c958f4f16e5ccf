"""What a run needs, from the same arena that training allocates: no GPU, no data.

`plan` works on any machine. Every figure is exact (counted from the shapes) or says on what it rests.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from daybreak.config import Config
from daybreak.engine import plan_engine
from daybreak.engine.arena import Arena
from daybreak.engine.device import engine_options, missing_on, pick_device
from daybreak.state.restore import staged_bytes

BUFFERS = {
    "weights": "weights in compute dtype",
    "masters": "exact weights the optimizer updates",
    "grads": "gradients, accumulated over micro-steps",
    "m": "AdamW first moment",
    "v": "AdamW second moment",
    "state": "input batch, losses, device scalars",
    "scratch": "temporaries of one kernel call",
    "activations": "forward and backward, sharing bytes by lifetime",
}


@dataclass(frozen=True)
class Plan:
    """The memory and arithmetic of a configuration on one device."""

    config: Config
    device: str
    compute: str
    parameters: int
    flops_per_token: int
    arena: Arena

    @property
    def nbytes(self) -> int:
        """Bytes that training allocates, all at start."""
        return self.arena.nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of the machine's memory that saving beside training takes, allocated once."""
        return staged_bytes(self.arena) if self.config.checkpoint.background else 0

    @property
    def micro_steps(self) -> int:
        """Micro-steps of the first step on one process."""
        return self.config.tokens_at(0) // (self.config.batch.B * self.config.T)


def plan(config: Config) -> Plan:
    """The plan of a checked configuration. Raises ConfigError for a shape or device that cannot be."""
    config.check()
    device = pick_device(config.run.device)
    options = engine_options(config, device)
    model, table, arena = plan_engine(
        config.model, B=config.batch.B, device_type=device.type, missing=missing_on(device), **options
    )
    flops = model.flops_per_token(config.T, table.num_parameters)
    return Plan(config, device.type, options["compute"], table.num_parameters, flops, arena)


def grouped(arena: Arena) -> list[tuple[str, str, int, int]]:
    """(name, one tensor's shape and dtype, how many, bytes of all) with the layers of an activation on one line."""
    groups: dict[str, tuple[str, int, int]] = {}
    for e in arena.entries:
        if e.buffer == "activations":
            name = re.sub(r"^h\.\d+\.", "h.*.", e.name)
            shape = f"{tuple(e.shape)} {str(e.dtype).removeprefix('torch.')}"
            _, count, size = groups.get(name, (shape, 0, 0))
            groups[name] = (shape, count + 1, size + e.nbytes)
    return sorted(((n, s, c, b) for n, (s, c, b) in groups.items()), key=lambda g: -g[3])


def print_plan(p: Plan) -> None:
    """The plan as tables, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    c, mib = p.config, 1 << 20
    console.print(
        f"{p.parameters:,} parameters: L {c.model.L}, C {c.model.C}, NH {c.model.NH}, vocabulary {c.model.V} "
        f"(padded to {c.model.Vp})\n"
        f"{p.flops_per_token:,} FLOPs a token, {p.flops_per_token * c.tokens_at(0):.3g} a step of "
        f"{c.tokens_at(0):,} tokens: {p.micro_steps} micro-steps of B {c.batch.B} x T {c.T}\n"
        f"{p.compute} on {p.device}, recompute level {c.batch.recompute}"
    )
    table = Table("buffer", "holds", "MiB", title="Memory, allocated once at start (exact)", title_justify="left")
    table.columns[2].justify = "right"
    for name, size in p.arena.sizes().items():
        table.add_row(name, BUFFERS[name], f"{size / mib:,.1f}")
    table.add_section()
    table.add_row("total", "", f"{p.nbytes / mib:,.1f}")
    console.print(table)
    if p.host_nbytes:
        console.print(
            f"Host memory, for saving beside training: {p.host_nbytes / mib:,.1f} MiB (checkpoint.background)"
        )
    table = Table("activation", "shape", "tensors", "MiB", title="Activations before sharing", title_justify="left")
    table.columns[2].justify = table.columns[3].justify = "right"
    for name, shape, count, size in grouped(p.arena):
        if size >= mib // 10 or len(table.rows) < 10:
            table.add_row(name, shape, str(count), f"{size / mib:,.1f}")
    console.print(table)
    if p.device == "cuda":
        console.print("CUDA context, modules and library handles come on top: n/a here.")
