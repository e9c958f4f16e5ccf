"""Between an engine in memory and a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from daybreak.engine import Engine
from daybreak.errors import CheckpointError
from daybreak.kernels import acc_dtype
from daybreak.state.checkpoint import Checkpoint, Snapshot

WINDOWS = ("windows", "counts")  # the guard's outlier windows


def snapshot(engine: Engine, step: int, manifest: dict[str, Any]) -> Snapshot:
    """Everything of `engine` that the next step depends on: save it before the next step, for parts are views.

    Of several ranks each has its shards, whatever the ZeRO stage."""
    plan, model, parts = engine.comm.plan, dict[str, Tensor](), dict[str, list[tuple[int, Tensor]]]()
    if plan.world > 1:
        masters = engine.state.get("masters", engine.state["weights"])
        dtype = masters.dtype if masters.dtype.is_floating_point else torch.float32
        model = {name: torch.empty(row.shape, dtype=dtype, device="meta") for name, row in engine.table.rows.items()}
        parts = {name: list(engine.master_parts(name)) for name in engine.names()}
    else:
        model = {name: engine.master(name).cpu() for name in engine.names()}
    ranges = [(a, b, at if plan.zero else a) for a, b, at in plan.shards() if a < b]
    return Snapshot(
        step=step,
        model=model,
        parts=parts,
        optimizer={key: [(a, engine.state[key][at : at + b - a]) for a, b, at in ranges] for key in ("m", "v")},
        flat_numel=engine.table.numel,
        layout=engine.table.layout(),
        extra={name: engine.state[name] for name in WINDOWS},
        manifest=manifest,
    )


class Weights(Protocol):
    """Where weights come from: a checkpoint, or another program's files."""

    @property
    def path(self) -> Path: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...
    def names(self) -> list[str]: ...
    def read_model(self, name: str, out: Tensor) -> None: ...


def restore_weights(engine: Engine, checkpoint: Weights) -> None:
    """Load the model's weights. Raises CheckpointError if the checkpoint is of another model."""
    if set(checkpoint.names()) != set(engine.names()):
        other = sorted(set(checkpoint.names()) ^ set(engine.names()))
        raise CheckpointError(f"{checkpoint.path} is of another model: tensors differ, {other[0]!r} first.")
    for name in engine.names():
        value = torch.empty(engine.param(name).shape, dtype=acc_dtype(engine.param(name).dtype))
        checkpoint.read_model(name, value)
        engine.set_master(name, value)


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load weights, optimizer state and outlier windows: the engine continues as if it had never stopped."""
    restore_weights(engine, checkpoint)
    for key in ("m", "v"):
        # By name: the flat buffers may have been ordered otherwise when this was written.
        for name, offset, _ in checkpoint.manifest["layout"]:
            for where, at in engine.comm.plan.within(name, engine.comm.plan.held()):
                checkpoint.read_optimizer(key, offset + where.start, engine.state[key][at])
    for name in WINDOWS:
        checkpoint.read_extra(name, engine.state[name])
