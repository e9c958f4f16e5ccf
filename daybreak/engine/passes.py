"""The passes over a model as calls, and the memory that they need: micro-steps, update, evaluation, decode.

An engine runs these functions, and `plan_engine` records the same ones to find the memory that they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from daybreak.engine.arena import FROZEN, Arena, Entry, StepFrame, constant_entries, plan_arena
from daybreak.engine.collectives import Collectives, Launch, Sharding
from daybreak.engine.formats import formats_of, in_formats, weight_entries
from daybreak.engine.moments import final_moments
from daybreak.engine.params import ParamTable
from daybreak.engine.spec import DTYPES, EngineSpec
from daybreak.engine.wide import update_wide, wide_tensors
from daybreak.errors import ConfigError
from daybreak.kernels import acc_dtype, choose
from daybreak.kernels.guard import STATS, WINDOW
from daybreak.kernels.held import SUFFIXES, TURNED, parts_of
from daybreak.kernels.operand import Format
from daybreak.models.frame import Documents
from daybreak.models.registry import Model, build_model
from daybreak.models.rows import Row
from daybreak.optimizers import Part
from daybreak.optimizers.adamw import adamw_group
from daybreak.optimizers.muon import muon_groups
from daybreak.optimizers.nanochat import family_groups
from daybreak.parallel import ALONE, Group

State = dict[str, Tensor]
PARTS = 8  # the head of packed rows computes 1/8 to 8/8 of the rows, with a CUDA graph for each number of eighths


def documents_of(s: State) -> dict[str, Any]:
    """The arguments that describe packed rows to a model; none for other rows."""
    return {"documents": Documents(s["positions"].view(-1), s["lo"])} if "lo" in s else {}


def rows_of(part: int, n: int) -> int:
    """The rows that the head computes of n, if it computes this many eighths of them."""
    return -(-part * n // PARTS)


def learned_part(targets: NDArray[np.int64], at: NDArray[np.int32]) -> int:
    """How many eighths of the rows the head has to compute for these targets (n), at least one.

    Sets at (n), the new place of every row (kernels/pick.py). Learned rows come first, then the others, each in order.
    Some of the others may fill up the last eighth. Their losses and gradients are 0."""
    n, learned, others = len(targets), np.flatnonzero(targets >= 0), np.flatnonzero(targets < 0)
    at[learned], at[others] = np.arange(len(learned)), np.arange(len(learned), n)
    return max(1, -(-PARTS * len(learned) // n))


def micro_step(model: Model, f: StepFrame, s: State, *, first: bool, last: bool = True, part: int = PARTS) -> None:
    """Forward and backward of the batch in s["tokens"], s["targets"]: gradients, and the step's loss so far.

    f is the frame that training uses (engine/formats.py). With several ranks the first micro-step gathers the weights
    that others updated, and the last one reduces gradients during its backward. part: the result of `learned_part`.
    """
    forward_pass(model, f, s, first=first)
    head_pass(model, f, s, first=first, part=part)
    backward_pass(model, f, s, first=first, last=last)


def forward_pass(model: Model, f: StepFrame, s: State, *, first: bool) -> None:
    """The first part of `micro_step`, which makes `lnf`."""
    if first and f.comm.stale:
        f.comm.gather(s["weights"])
    if first:
        f.convert_weights()
    model.forward(f, s["tokens"], **documents_of(s))
    f.comm.finish()


def _fresh(f: StepFrame, first: bool) -> bool:
    """Whether gradients start anew. At stage 2 the shard adds up the micro-steps."""
    return first or f.comm.sharding.zero == 2


def head_pass(model: Model, f: StepFrame, s: State, *, first: bool, part: int) -> None:
    """The middle of `micro_step`: the loss, and `d_lnf`. It calls no collective, so ranks may differ in `part`."""
    n, targets, scale, fresh = s["targets"].numel(), s["targets"].view(-1), s["hyper"][2], _fresh(f, first)
    hidden, losses = f.a("lnf", n, model.cfg.C), s["losses"][: rows_of(part, n)]
    if part == PARTS:
        model.head_loss(f, hidden, targets, losses, scale, backward=True, first=fresh)
    else:
        model.head_learned(f, hidden, targets, s["learned"], losses, scale, first=fresh)
    f.k.loss_sum(s["loss"], losses, scale, accumulate=not first)


def backward_pass(model: Model, f: StepFrame, s: State, *, first: bool, last: bool) -> None:
    """The last part of `micro_step`."""
    f.comm.first, f.comm.last, f.comm.moment = first, last, 0
    model.backward(f, s["tokens"], first=_fresh(f, first), **documents_of(s))


def update(f: StepFrame, s: State, spec: EngineSpec, seed: int) -> None:
    """Gradient norm, the guard's decision, and the optimizers, group by group of what this rank updates.

    f is the frame that training uses."""
    c, grads = f.comm, s["shard" if f.comm.sharding.zero else "grads"]
    f.k.global_norm(s["norm"], grads)
    if c.active:
        scalars = [s["loss"], s["norm"]]
        f.k.do("sum_scalars", lambda: c.sum_scalars(s), scalars, scalars)
    f.note_amax()
    f.k.step_guard(
        s["stats"], s["windows"], s["counts"], s["loss"], s["norm"],
        clip=spec.optim.clip, max_loss_z=spec.guard.loss_z, max_norm_z=spec.guard.norm_z,
    )  # fmt: skip
    f.keep_amax()
    for group, launches in groupby(c.sharding.launches(), lambda launch: launch.span.group):
        group.optimizer.update(f, [_part(f, s, launch, seed) for launch in launches])
    update_wide(f)


def _part(f: StepFrame, s: State, launch: Launch, seed: int) -> Part:
    """The tensors and numbers that an optimizer needs for the elements of a launch."""
    sharding = f.comm.sharding
    group, n = launch.span.group, launch.stop - launch.start
    held, at = slice(launch.at, launch.at + n), launch.at - sharding.whole
    weights, grads = s["weights"][launch.start : launch.stop], s["shard" if sharding.zero else "grads"]
    exact = weights if weights.dtype == f.acc else None  # fp32 and fp64 weights are exact, bf16 alone is not
    whole = group.optimizer.whole
    state = {key: s[f"{key}.{launch.name}"] if whole else s[key][at : at + n] for key in group.optimizer.state}
    return Part(
        weights, s["masters"][held] if "masters" in s else exact, grads[held], state, s["stats"],
        s["hyper"][sharding.table.hyper[group.optimizer, group.lr_scale]],
        group.weight_decay if launch.span.decay else 0.0, seed, launch.start, sharding.table.rows.get(launch.name),
    )  # fmt: skip


def evaluate(model: Model, f: StepFrame, s: State, B: int, T: int) -> None:
    """Per-token losses of the first B rows and T columns of the input buffers, without gradients."""
    hidden = model.forward(f, s["tokens"][:B, :T], **documents_of(s))
    n = B * T
    targets, losses = s["targets"].view(-1)[:n], s["losses"][:n]
    model.head_loss(f, hidden, targets, losses, s["hyper"][2], backward=False, first=True)


def next_token(model: Model, f: StepFrame, s: State, b: int) -> None:
    """`logits` that follow one more token, s["next"][0], at position s["next"][1], of each of the first b rows."""
    tokens, positions = s["next"][:, :b]
    model.decode(f, tokens, positions, s["kv"][:, :, :b], s["last_hidden"][:b])


def frozen_entries(row: Row, train: bool) -> list[Entry]:
    """The memory of a frozen parameter: one tensor, or the parts of one in NF4 or fp8. ConfigError."""
    if row.held not in SUFFIXES:
        return [Entry(FROZEN + row.name, "frozen", row.shape, DTYPES[row.held])]
    parts = parts_of(row.held, row.name, row.shape, row.stacked or row.shape[:1])
    found = [Entry(FROZEN + row.name + s, "frozen", *part) for s, part in zip(SUFFIXES[row.held], parts, strict=True)]
    turned = [Entry(FROZEN + row.name + TURNED, "operands", row.shape[::-1], torch.uint8)]
    return found + (turned if row.held == "fp8" and train else [])


def state_entries(spec: EngineSpec, sharding: Sharding, kv: tuple[int, ...]) -> list[Entry]:
    """Everything that is not an activation: weights and optimizer state, inputs, outputs, device scalars, and the cache
    of keys and values, of shape `kv`."""
    B, T, V, C, N, dtype = spec.B, spec.T, spec.cfg.V, spec.cfg.C, sharding.numel, spec.dtype
    acc, f64, i64 = acc_dtype(dtype), torch.float64, torch.int64
    held = sharding.shard if sharding.zero else N
    entries = [Entry("weights", "weights", (N,), dtype)]
    entries += [entry for row in sharding.table.frozen for entry in frozen_entries(row, spec.train)]
    if spec.train:
        if spec.kept != "none":
            entries += [Entry("masters", "masters", (held,), acc if spec.kept == "fp32" else torch.int16)]
        if sharding.zero < 2:
            entries += [Entry("grads", "grads", (N,), dtype)]
        if sharding.zero:
            entries += [Entry("shard", "grads", (held,), dtype if sharding.zero == 1 else acc)]
        entries += optimizer_entries(sharding, acc, torch.bfloat16 if spec.moments == "bf16" else acc)
    stats = len(STATS) + spec.eight  # of matrices that saturate (engine/scales.py)
    small = [
        ("batch", (4 if spec.documents else 2, B, T), i64), ("losses", (B * T,), acc),
        ("hyper", (max(part.stop for part in sharding.table.hyper.values()),), f64),
        ("loss", (), f64), ("norm", (), f64), ("stats", (stats,), f64), ("windows", (2, WINDOW), f64),
        ("counts", (2,), i64), ("next", (2, kv[2]), i64), ("next_logits", (kv[2], V), torch.float32),
        ("last_hidden", (kv[2], C), dtype),
    ]  # fmt: skip
    entries += [Entry("kv", "kv", kv, dtype)]
    if sharding.world > 1:
        small += [("sums", (2,), f64)]
    small += [(n, *kind) for n, kind in wide_tensors(sharding.table, dtype, spec.train).items()]
    once = ("windows", "counts")
    return entries + [Entry(n, "state", shape, kind, saved="once" if n in once else "") for n, shape, kind in small]


def optimizer_entries(sharding: Sharding, acc: torch.dtype, moments: torch.dtype) -> list[Entry]:
    """The optimizer state of the parameters that this rank updates; `moments` is the dtype of AdamW's."""
    by_element = (sharding.shard if sharding.zero else sharding.numel) - sharding.whole
    entries = dict[str, Entry]()
    for launch in sharding.launches():
        optimizer = launch.span.group.optimizer
        for key in optimizer.state if optimizer.whole else ():
            shape = optimizer.shape(key, sharding.table.rows[launch.name])
            entries[f"{key}.{launch.name}"] = Entry(f"{key}.{launch.name}", key, shape, acc, saved="whole")
        for key in () if optimizer.whole else optimizer.state:
            entries[key] = Entry(key, key, (by_element,), moments, saved="ranges")
    return list(entries.values())


def plan_engine(spec: EngineSpec, group: Group = ALONE) -> tuple[Model, ParamTable, Arena]:
    """The model, its parameter table and the complete memory list of one rank; no device is touched.

    group: the ranks that train together, for which Group(rank, world) is enough. Raises ConfigError for a shape that
    cannot exist.
    """
    cfg, B, T, dtype = spec.cfg, spec.B, spec.T, spec.dtype
    cfg.check()
    if spec.device_type == "cuda" and cfg.HS > 256:
        raise ConfigError(
            f"model.NH = {cfg.NH} makes heads of {cfg.HS}, and CUDA's attention takes 256 at most; use more."
        )
    model = build_model(cfg, spec.recompute, spec.device_type)
    model.z_loss = spec.optim.z_loss
    limit, own = spec.bucket_bytes // dtype.itemsize, (*spec.groups, *family_groups(cfg, spec.optim))
    groups = (*own, *muon_groups(spec.optim, spec.schedule), adamw_group(spec.optim))
    rows, adapters = spec.parameters(model)
    table = ParamTable(rows, groups, group.world, limit, adapters)
    assert table.offsets, "no parameter is trainable"
    sharding = Sharding(table, final_moments(model, table), group, spec.zero, limit)
    formats = formats_of(spec, model)

    def micro(of: Mapping[str, Format], f: Any, first: bool = False, part: int = PARTS) -> None:
        micro_step(model, in_formats(f, of, model), f.state, first=first, part=part)

    def training(of: Mapping[str, Format], f: Any) -> None:
        micro(of, f, first=True)
        update(in_formats(f, of, model), f.state, spec, 0)

    def prefill(b: int, f: Any) -> None:
        t = min(T, B * T // b)
        model.forward(f, f.state["tokens"].view(-1)[: b * t].view(b, t), f.state["kv"][:, :, :b])

    def decoding(b: int, f: Any) -> None:
        next_token(model, f, f.state, b)

    passes: list[Callable[[Any], None]] = [lambda f: evaluate(model, f, f.state, B, T)]
    if spec.train:
        kinds = (formats,) if spec.fp8_steps is None else (formats, {})
        parts = range(PARTS - 1, 0, -1) if spec.documents else ()  # the largest first, which declares its tensors
        some = [partial(micro, of, first=first, part=p) for of in kinds for p in parts for first in (True, False)]
        passes = [*(partial(run, of) for of in kinds for run in (training, micro)), *some, *passes]
    assert spec.rows <= model.head_rows(B * T, dtype), "the logits of all rows must fit in one chunk"
    # A model may decode few rows by other calls. Many short sequences may need more scratch than one long one.
    passes += [partial(decoding, b) for b in sorted({1, min(2, spec.rows), spec.rows})]
    passes += [partial(prefill, b) for b in range(2, spec.rows + 1)]
    kv = model.cache_shape(spec.rows, T)
    asks = dict(model.asks)
    for name in ("attention_forward", "attention_backward") if spec.documents else ():
        asks[name] = {*asks.get(name, ()), "lo"}
    choices = choose(spec.device_type, dtype, spec.kernels, spec.missing, asks)
    state, comm = state_entries(spec, sharding, kv), Collectives(sharding, group)
    state += constant_entries(model.constants()) + (weight_entries(table, formats) if spec.train else [])
    return model, table, plan_arena(table, dtype, state, passes, choices, comm)
