"""Weights that kernels read in fp32 where the model computes in bf16: a few learned scalars (Row.wide).

A step of a scalar is often smaller than half the distance of two bf16 numbers, which is 0.004 near 1.15. Read in bf16,
the scalar stays where it is for many steps. So the tensor `wide` has the exact value of each of them. Setting a weight
sets its value there too, and after each update `update_wide` joins all values again from weights and master weights:

    weights   | ... h.1.resid + padding ... | ... h.1.x0 + padding ... |   bf16
    masters   | ... what bf16 lacks ...     | ...                      |
    wide      | h.1.resid + 3 of padding | h.1.x0 + 3 of padding | ...     fp32: GRAIN elements, 16 bytes, a scalar
    places    | where each of these elements is in weights and in masters |

At ZeRO stages 1 and 2, only one rank has a scalar's master weight. So every rank writes the values that it has, and
zeros for the others. The bits are then added up as integers, and all ranks have the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daybreak.kernels import acc_dtype

if TYPE_CHECKING:
    from daybreak.engine.arena import StepFrame
    from daybreak.engine.collectives import Sharding
    from daybreak.engine.params import ParamTable

GRAIN = 4  # elements that a scalar takes: so all are aligned alike, and kernels are compiled once
WIDE, PLACES, LOW = "wide", "wide.places", "wide.low"


def wide_names(table: ParamTable) -> list[str]:
    """The trainable rows that are wide, in the order of their places in `wide`. Frozen ones are held in fp32."""
    return [name for name in table.offsets if table.rows[name].wide]


def wide_tensors(table: ParamTable, dtype: torch.dtype, train: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors for this. None where a model has no such scalar, or all weights are as wide."""
    acc, n = acc_dtype(dtype), len(wide_names(table)) * GRAIN
    if not n or dtype == acc:
        return {}
    work = {PLACES: ((3, n), torch.int64), LOW: ((n,), torch.int16)} if train else {}
    return {WIDE: ((n,), acc), **work}


def wide_views(state: Mapping[str, Tensor], table: ParamTable) -> dict[str, Tensor]:
    """The wide value (1) of each such row, by name."""
    if WIDE not in state:
        return {}
    return {name: state[WIDE][GRAIN * i : GRAIN * i + 1] for i, name in enumerate(wide_names(table))}


def set_places(places: Tensor, sharding: Sharding) -> None:
    """places (3, n), for each element of `wide`: where it is in the weights, where in this rank's master weights, and 1
    if this rank has these, else 0. Ranks' ranges are cut at multiples of params.ALIGN, so never in a scalar."""
    found = torch.zeros(places.shape, dtype=torch.int64)
    ranges = list(sharding.held())
    for i, name in enumerate(wide_names(sharding.table)):
        offset = sharding.table.offsets[name]
        for start, stop, at in ranges:
            if start <= offset < stop:
                first = torch.tensor([offset, at + offset - start, 0])[:, None]
                found[:, GRAIN * i : GRAIN * (i + 1)] = first + torch.arange(GRAIN)
                found[2, GRAIN * i : GRAIN * (i + 1)] = 1
    places.copy_(found)


def update_wide(f: StepFrame) -> None:
    """Write all wide values from weights and master weights, which the optimizers have just updated. Collective."""
    if WIDE in f.state:
        reads = [f.state[name] for name in ("weights", "masters", PLACES) if name in f.state]
        f.k.do("update_wide", partial(_update, f), [f.state[WIDE], f.state[LOW]], reads)


def _update(f: StepFrame) -> None:
    wide, (at, held, mine), low = f.state[WIDE], f.state[PLACES], f.state[LOW]
    weights, masters, bits = f.state["weights"], f.state.get("masters"), f.state[WIDE].view(torch.int32)
    if masters is not None and masters.dtype == wide.dtype:
        torch.index_select(masters, 0, held, out=wide)
    else:  # bf16 is the upper half of fp32 (see kernels/optimizer.py)
        bits.copy_(torch.index_select(weights.view(torch.int16), 0, at, out=low)).bitwise_left_shift_(16)
        if masters is not None:
            bits.add_(torch.index_select(masters, 0, held, out=low))
    if f.comm.sharding.zero:
        f.comm.unite(bits.mul_(mine))
