"""Between an engine in memory and a checkpoint on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from daybreak.config import Config
from daybreak.config_keys import LoraConfig, toml_value
from daybreak.engine import Engine
from daybreak.engine.arena import FROZEN, Arena, zeros
from daybreak.engine.device import available_bytes
from daybreak.errors import CheckpointError, OutOfMemory
from daybreak.files import free_bytes
from daybreak.formatting import disk
from daybreak.kernels import acc_dtype
from daybreak.kernels.held import SUFFIXES, turn
from daybreak.kernels.optimizer import FLAT_CHUNK, exact, exact_dtype
from daybreak.models.adapters import is_adapter
from daybreak.shapes import Shape
from daybreak.state.checkpoint import Checkpoint, Snapshot

log = logging.getLogger("daybreak")


def snapshot(engine: Engine, step: int, manifest: dict[str, Any], staging: Staging | None = None) -> Snapshot:
    """Everything of `engine` that the next step depends on. Without `staging` parts are views: save it before the next
    step; with it (one process) all is copied there, and stays until the next snapshot. Of several ranks each has its
    shards, whatever the ZeRO stage."""
    plan, table, state = engine.comm.sharding, engine.table, engine.state
    parts: Callable[[str], Iterable[tuple[int, Tensor]]] = engine.exact_parts
    if staging is not None:
        state, parts = staging.take(), staging.parts
    saved = _saved(engine.arena)
    ranges = [(a, slice(at, at + b - a)) for a, b, at in plan.by_element(plan.shards())]
    optimizer = {key: [(a, state[key][part]) for a, part in ranges] for key in saved["ranges"]}
    for name in saved["whole"]:
        if any(plan.within(name.partition(".")[2], plan.shards())):
            optimizer[name] = [(0, state[name].view(-1))]
    trained = exact_weights(engine.arena)
    kinds = {e.name.removeprefix(FROZEN): (e.shape, e.dtype) for e in engine.arena.entries if e.buffer == "frozen"}
    kinds |= {name: (table.rows[name].shape, trained) for name in table.offsets}
    suffixes = ("", *chain(*SUFFIXES.values()))
    names = [name + suffix for name in table.rows for suffix in suffixes if name + suffix in kinds]
    model = {name: torch.empty(kinds[name][0], dtype=kinds[name][1], device="meta") for name in names}
    once = {name: state[name] for name in saved["once"]}
    frozen = [name for name in names if name not in table.offsets]
    return Snapshot(step, model, optimizer, table.numel, table.layout(), once, manifest, parts, frozen)


def _saved(arena: Arena) -> dict[str, list[str]]:
    """Names of what a checkpoint holds beside the weights, by the way it does (arena.Entry)."""
    return {how: [e.name for e in arena.entries if e.saved == how] for how in ("ranges", "whole", "once")}


def exact_weights(arena: Arena) -> torch.dtype:
    """The dtype of weights as exactly as training has them."""
    kept = {e.name: e.dtype for e in arena.entries}
    return exact_dtype(kept["weights"], kept.get("masters"))


def staged_bytes(arena: Arena) -> int:
    """Host memory of a `Staging`: the weights as exactly as training has them, and all else that is saved."""
    weights = sum(e.shape[0] * exact_weights(arena).itemsize for e in arena.entries if e.name == "weights")
    return weights + sum(e.nbytes for e in arena.entries if e.saved)


def checkpoint_bytes(arena: Arena, number: int = 1) -> int:
    """Bytes of a number of checkpoints: weights in fp32 (bf16 where no masters are kept) and the optimizers' state.
    They share what is frozen (checkpoint.py)."""
    table, kept = arena.sharding.table, exact_weights(arena)
    moments = sum(e.dtype.itemsize for e in arena.entries if e.saved == "ranges")  # of an element that is updated alone
    whole = [(span.group.optimizer, table.rows[name]) for span in table.spans for name, _, _ in span.parts if name]
    state = sum(math.prod(o.shape(key, row)) for o, row in whole for key in o.state) * acc_dtype(kept).itemsize
    trained = sum(row.numel for row in table.rows.values() if row.trainable)
    each = trained * (kept.itemsize + moments) - moments * sum(row.numel for _, row in whole) + state
    return number * each + sum(e.nbytes for e in arena.entries if e.buffer == "frozen")


def checkpoints_kept(config: Config) -> int:
    """Checkpoints on the disk at the most: those that are kept, and the one being written."""
    k, steps = config.checkpoint, config.run.steps
    made = steps // k.every + 1 if k.every else 1
    return (min(made, k.keep) if k.keep else made) + (steps // k.major if k.major and k.keep else 0) + 1


def warn_of_disk(folder: Path, config: Config, arena: Arena) -> None:
    """A warning if the disk of the run's `folder` has no room for all its checkpoints. Quotas are not seen."""
    held = {(s := path.stat()).st_ino: s.st_size for path in folder.glob("checkpoints/step-*/*")}
    needed = checkpoint_bytes(arena, checkpoints_kept(config)) - sum(held.values())
    if (free := free_bytes(folder)) is not None and free < needed:
        said = f"the checkpoints of {folder} need {disk(needed)}, which is {disk(needed - free)} more"
        log.warning("%s than its disk has free; free space, lower checkpoint.keep, or give another --run.dir.", said)


def check_host_memory(arena: Arena, device: torch.device) -> None:
    """Raise OutOfMemory if a `Staging` does not fit the memory of the machine (beside the arena, where it is there)."""
    need, free = staged_bytes(arena), available_bytes(torch.device("cpu"))
    taken = arena.nbytes if device.type == "cpu" else 0
    if free is not None and need > free - taken:
        left = f"of the machine's memory, which has {(free - taken) >> 20} MiB left for it"
        fix = "use --checkpoint.background false, and training will wait for each save"
        raise OutOfMemory(f"saving beside training takes {-(-need >> 20)} MiB {left}; {fix}.")


class Staging:
    """Host memory for one snapshot, allocated once; on CUDA page-locked, so that it fills at the bus's speed."""

    def __init__(self, engine: Engine) -> None:
        self._pinned: list[int] = []
        self._engine, cuda = engine, engine.device.type == "cuda"

        def host(numel: int, dtype: torch.dtype) -> Tensor:
            flat = zeros(numel * dtype.itemsize, torch.device("cpu")).view(dtype)
            # Not torch's pinned allocator: it rounds up to a power of two.
            if cuda:
                runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                if int(runtime.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)) == 0:
                    self._pinned.append(flat.data_ptr())
            return flat

        kept = [e for e in engine.arena.entries if e.saved]
        self._weights = host(engine.table.numel, exact_weights(engine.arena))
        self._state = {e.name: host(math.prod(e.shape), e.dtype).view(e.shape) for e in kept}

    def take(self) -> dict[str, Tensor]:
        """Copy the engine's state; back when it is all here. Returns what it is now, by name."""
        engine = self._engine
        weights, masters = engine.state["weights"], engine.state.get("masters")
        for at in range(0, weights.numel(), FLAT_CHUNK):
            part = slice(at, at + FLAT_CHUNK)
            value = exact(weights[part], None if masters is None else masters[part])
            self._weights[part].copy_(value, non_blocking=True)
        for name, here in self._state.items():
            here.copy_(engine.state[name], non_blocking=True)
        if engine.device.type == "cuda":
            torch.cuda.current_stream(engine.device).synchronize()
        return self._state

    def parts(self, name: str) -> list[tuple[int, Tensor]]:
        """The only part of a weight: all of it. A frozen one is the engine's, as no step changes it."""
        table = self._engine.table
        weight = table.view(self._weights, name) if name in table.offsets else self._engine.state[FROZEN + name]
        return [(0, weight.view(-1))]

    def close(self) -> None:
        """Give the pages back to the system's care; the memory goes with the last reference to it."""
        for pointer in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(pointer)  # type: ignore[no-untyped-call]
        self._pinned = []


class Weights(Protocol):
    """Where weights come from: a checkpoint, or another program's files."""

    @property
    def path(self) -> Path: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...
    @property
    def model(self) -> Shape: ...
    @property
    def kept(self) -> Mapping[str, str]: ...
    @property
    def lora(self) -> LoraConfig: ...
    def names(self) -> list[str]: ...
    def read_model(self, name: str, out: Tensor) -> None: ...


def check_model(weights: Weights, shape: Shape, grows: bool = False) -> None:
    """Raise CheckpointError unless the weights are of a model of this shape. V may differ within the padding, and be
    larger here if the vocabulary `grows`."""
    theirs = weights.model
    differs = [key for key, ours in vars(shape).items() if key != "V" and vars(theirs).get(key) != ours]
    if differs or (theirs.Vp != shape.Vp and not (grows and theirs.V < shape.V)):
        there, here = ({key: vars(x).get(key) for key in differs or ["V"]} for x in (theirs, shape))
        said = ", ".join(f"model.{key} is {there[key]} there and {here[key]} here" for key in there)
        known = {**vars(type(theirs)()), **vars(shape)}  # a key of their family alone has its default here
        flags = " ".join(f"--model.{key} {toml_value(v)}" for key, v in vars(theirs).items() if v != known[key])
        raise CheckpointError(f"{weights.path} is of another model: {said}; use the shape of these weights ({flags}).")


def restore_weights(engine: Engine, checkpoint: Weights, adapters: bool = True, grows: bool = False) -> None:
    """Load the model's weights; without `adapters` those of the engine stay as they were drawn.

    If the vocabulary `grows`, a new id begins at the mean of the known rows, added to what was drawn for it. So its
    logit is near the mean of theirs, and takes little of their probability (Hewitt 2021). Drawn rows have logits near
    0, and most ids of a trained model are below: of the demo's probability 81 new ids took 5 %. Raises CheckpointError
    if the checkpoint is of another model."""
    check_model(checkpoint, engine.cfg, grows)
    known = checkpoint.model.V if grows and checkpoint.model.V < engine.cfg.V else 0
    if known:
        log.info("the vocabulary of %s grows from %d to %d ids", checkpoint.path, known, engine.cfg.V)
    wanted = [name for name in engine.names() if adapters or not is_adapter(name)]
    if other := sorted(set(checkpoint.names()) ^ set(wanted)):
        raise CheckpointError(f"{checkpoint.path} is of another model: tensors differ, {other[0]!r} first.")
    for name in wanted:
        stored = engine.frame.weights[name]
        if not isinstance(stored, Tensor) and isinstance(checkpoint, Checkpoint):
            how = checkpoint.held(name)
            if how and how == engine.table.rows[name].held:
                for part, tensor in zip(SUFFIXES[how], stored.tensors, strict=True):
                    checkpoint.read_model(name + part, tensor)
                turn(stored)
                continue
        value = torch.empty(stored.shape, dtype=acc_dtype(stored.dtype))
        if known and engine.table.rows[name].drawn_rows:  # a row for each id
            theirs = value.new_empty(checkpoint.model.Vp, *value.shape[1:])
            checkpoint.read_model(name, theirs)
            value.copy_(engine.param(name))
            value[:known] = theirs[:known]
            value[known : engine.cfg.V] += theirs[:known].mean(0)
        else:
            checkpoint.read_model(name, value)
        engine.set_exact(name, value)


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load weights, optimizer state and outlier windows: the engine continues as if it had never stopped."""
    restore_weights(engine, checkpoint)
    if other := sorted(engine.table.offsets.keys() ^ {name for name, _, _ in checkpoint.layout}):
        raise CheckpointError(
            f"{checkpoint.path} was trained with other trainable parameters: {other[0]!r} is trainable there or here, "
            "not in both; train the same ones, or start a new run from its weights with --init-from."
        )
    whole = {name for span in engine.table.spans for name, _, _ in span.parts if name}
    if whole != checkpoint.whole:
        if not checkpoint.step:  # an import, say: all state is zero
            return
        raise CheckpointError(
            f"{checkpoint.path} holds the optimizer state of another optimizer; keep optim.name, or start a new run "
            "from its weights with --init-from."
        )
    plan, state, saved = engine.comm.sharding, engine.state, _saved(engine.arena)
    # By name: the flat buffers may have been ordered otherwise when this was written.
    for name, offset, _ in checkpoint.layout:
        for where, at in plan.within(name, plan.by_element(plan.held())):
            for key in saved["ranges"]:
                checkpoint.read_optimizer(key, offset + where.start, state[key][at])
    for name in saved["whole"]:
        checkpoint.read_optimizer(name, 0, state[name].view(-1))
    for name in saved["once"]:
        checkpoint.read_extra(name, state[name])
