"""The scales of fp8 matrices: a slot of a few flat tensors for each, and the calls that choose them once a step.

    slots            weights    outputs of norms      other activations            gradients
    format           e4m3       e4m3                  e4m3                         e5m2
    scale from       values     a bound (see below)   amax of the last 16 steps    amax of the last 16 steps

Each scale is a power of two, and constant within a step. So micro-steps add up in any order, and a layer that backward
computes again has the same bytes. Weights are rounded when a step begins, so their own largest magnitude is known. A
norm's output is never above sqrt(C) max|w| + max|b|. (Without weights, w is 1 and b is 0.) All other scales are late:
the kernel that makes such a tensor needs its scale before anyone has seen its values. So the scale comes from `amax`,
the largest magnitude of a tensor in a step: the largest one of the last steps, with room above it.

    step begins   `begin`    late scales from `history`, and those of norms; amax = 0
    micro-steps              kernels round with these scales, and take the largest magnitude into `amax`
    update        `end`      amax = the largest of all ranks
    guard                    decides
                  `keep`     amax becomes the step's row of `history`, unless the guard refused the step

The frame calls these three as `convert_weights`, `note_amax` and `keep_amax` (formats.py). The loss is a mean over the
step's targets, so fewer targets give larger gradients. `history` therefore holds the amax of gradients times the number
of targets, and `begin` divides by that of the new step. A magnitude that is not finite makes the gradient norm NaN, so
that the guard refuses the step. Nothing of a refused step enters the history: one large magnitude would make scales too
coarse for 16 steps. `saturated` counts, for each slot, the steps in which a value was larger than its format could
hold. The last of the step's stats is the number of slots in which it happened in this step.

The first step of a run has no history. The engine then makes its first micro-step twice. The first time, kernels choose
scales from the values themselves, and only `amax` is kept. If one of these is not finite, the next step measures again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from daybreak.engine.arena import Entry, StepFrame
from daybreak.kernels.fp8 import power_of_two
from daybreak.kernels.guard import STATS
from daybreak.kernels.operand import Format

WINDOW = 16  # steps
APART = 4  # numbers from one scale to the next: cuBLASLt refuses addresses that are no multiples of 16 bytes
# Room above the largest magnitude of these steps, before a step saturates. e5m2 has exponents to spare.
ROOM, GRADIENT_ROOM = 2.0, 8.0
SCALE, AMAX, HISTORY, SATURATED = "fp8.scale", "fp8.amax", "fp8.history", "fp8.saturated"


@dataclass(frozen=True)
class Slots:
    """at: name -> slot of every matrix that has one: weights, outputs of norms, other activations, gradients.

    `late` and `gradients` are the slots where the last two begin. norms: the outputs whose scales are bounds. Those of
    norms without weights have slots among the other activations."""

    at: Mapping[str, int]
    norms: tuple[str, ...]
    late: int
    gradients: int
    formats: tuple[Format, ...]


def slots_of(formats: Mapping[str, Format], parameters: Collection[str], weightless: Collection[str] = ()) -> Slots:
    """The slots of these matrices: names of weights, activations and gradients -> formats. weightless: what models call
    the outputs of norms without weights."""
    kept = {name: format for name, format in formats.items() if format.slots}
    weights = [name for name in kept if name in parameters]
    norms = tuple(name for name in kept if name + "w" in parameters)
    gradients = [name for name in kept if name.rpartition(".")[2].startswith("d_")]
    late = [name for name in kept if name not in {*weights, *norms, *gradients}]
    names = [*weights, *norms, *late, *gradients]
    at = {name: i for i, name in enumerate(names)}
    late_from, formats_ = len(weights) + len(norms), tuple(kept[name] for name in names)
    ones = tuple(name for name in late if name.rpartition(".")[2] in weightless)
    return Slots(at, norms + ones, late_from, len(names) - len(gradients), formats_)


def scale_entries(slots: Slots) -> list[Entry]:
    """The memory of the slots. A checkpoint holds what the next step's scales come from."""
    n, f32 = len(slots.at), torch.float32
    if not n:
        return []
    return [
        Entry(SCALE, "state", (n, APART), f32), Entry(AMAX, "state", (n,), f32),
        Entry(HISTORY, "state", (WINDOW, n), f32, saved="once"),
        Entry(SATURATED, "state", (n,), torch.int64, saved="once"),
    ]  # fmt: skip


def _late(slots: Slots) -> list[tuple[slice, float, float, bool]]:
    """The late slots, activations and gradients: (slots, largest value of their format, room, whether gradients)."""
    parts = ((slice(slots.late, slots.gradients), ROOM, False), (slice(slots.gradients, None), GRADIENT_ROOM, True))
    return [(p, slots.formats[p][0].largest, room, grad) for p, room, grad in parts if slots.formats[p]]


def begin(f: StepFrame, slots: Slots, offset: float, weightless: Mapping[str, str]) -> None:
    """Choose a step's scales, but for those of weights. offset: what a norm adds to its weight. weightless: the norms
    that have none, and the constant that is in its place."""
    s = f.state
    scale, amax, history, hyper = s[SCALE][:, 0], s[AMAX], s[HISTORY], s["hyper"]
    f.k.do("scales", partial(_begin, slots, scale, amax, history, hyper), [scale, amax], [history, hyper])
    for name in slots.norms:
        constant = weightless.get(name.rpartition(".")[2])
        w = f.constant(constant) if constant else f.w(name + "w")
        b = f.w(name + "b") if name + "b" in f.table.rows else None
        one = scale[slots.at[name]]
        read = [w] if b is None else [w, b]
        f.k.do("scale_of_norm", partial(_bound, one, slots.formats[slots.at[name]].largest, offset, *read), [one], read)


def _begin(slots: Slots, scale: Tensor, amax: Tensor, history: Tensor, hyper: Tensor) -> None:
    amax.zero_()
    for part, largest, room, gradient in _late(slots):
        bound = torch.amax(history[:, part], 0).mul_(room / largest)
        scale[part].copy_(power_of_two(bound.mul_(hyper[2]) if gradient else bound))


def _bound(scale: Tensor, largest: float, offset: float, w: Tensor, b: Tensor | None = None) -> None:
    bound = math.sqrt(w.numel()) * ((w.float() + offset) if offset else w.float()).abs().amax()
    if b is not None:
        bound = bound + b.float().abs().amax()
    scale.copy_(power_of_two(bound.div_(largest)))


def end(f: StepFrame, slots: Slots, count: bool) -> None:
    """amax = the largest of all ranks. Collective. Before the guard decides. count: whether saturation is counted."""
    s, c = f.state, f.comm
    if c.active:
        f.k.do("largest", partial(c.largest, s[AMAX]), [s[AMAX]], [s[AMAX]])
    tensors: dict[str, Any] = {k: s[k] for k in (SCALE, AMAX, SATURATED, "norm", "stats")}
    writes = [s[SATURATED], s["norm"], s["stats"]]
    f.k.do("note_amax", partial(_end, slots, tensors, count), writes, list(tensors.values()))


def _end(slots: Slots, s: Mapping[str, Tensor], count: bool) -> None:
    amax, now = s[AMAX], s["stats"][-1].zero_()
    for part, largest, *_ in _late(slots) if count else []:
        above = amax[part] > largest * s[SCALE][part, 0]
        s[SATURATED][part].add_(above)
        now.add_(above.sum())
    s["norm"].add_((amax * 0.0).sum())  # NaN, if one is not finite


def keep(f: StepFrame, slots: Slots, guarded: bool) -> None:
    """Take a step's amax into the history, after the guard decided. guarded: whether there was a guard."""
    s = {name: f.state[name] for name in (AMAX, HISTORY, "hyper", "stats")}
    f.k.do("keep_amax", partial(_keep, slots, s, guarded), [s[HISTORY]], list(s.values()))


def _keep(slots: Slots, s: Mapping[str, Tensor], guarded: bool) -> None:
    amax, hyper = s[AMAX], s["hyper"]
    found, accepted = amax.clone(), s["stats"][STATS.index("skip")] == 0 if guarded else torch.isfinite(amax).all()
    for part, _, _, gradient in _late(slots):
        if gradient:
            found[part].div_(hyper[2])
    row = torch.arange(WINDOW, device=amax.device)[:, None] == torch.remainder(hyper[1], WINDOW)
    s[HISTORY].copy_(torch.where(row & accepted, found, s[HISTORY]))
