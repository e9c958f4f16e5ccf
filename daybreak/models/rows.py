"""A model's description of a parameter: its name, its shape, and how it starts. engine/params.py gives it a place."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One parameter. `std` draws N(0, std) for the first `drawn_rows` rows (None: all), else every value is `fill`.

    decay: whether it has weight decay, as matrices do. stacked: the rows of each matrix, if several are packed in one.
    trainable: whether it has a gradient and optimizer state. held: the dtype of a frozen parameter, such as bf16.
    bound: draws evenly from -bound to bound instead, or from 0 to bound if `positive`. It has a generator of its own,
    as adapters do (adapters.py). wide: a scalar that kernels read in fp32 where weights are in bf16 (engine/wide.py).
    """

    name: str
    shape: tuple[int, ...]
    decay: bool
    std: float | None = None
    fill: float = 0.0
    drawn_rows: int | None = None
    stacked: tuple[int, ...] = ()
    trainable: bool = True
    held: str = ""
    bound: float = 0.0
    positive: bool = False
    wide: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def linear_rows(
    name: str, outputs: int, inputs: int, std: float, stacked: tuple[int, ...] = (), *, bias: bool = True
) -> list[Row]:
    """The weight (outputs, inputs) of a linear layer, and its bias if it has one."""
    weight = Row(name + "w", (outputs, inputs), True, std, stacked=stacked)
    return [weight, Row(name + "b", (outputs,), False)] if bias else [weight]


def norm_row(name: str, channels: int, fill: float = 1.0) -> Row:
    """The weight of a norm."""
    return Row(name + "w", (channels,), False, fill=fill)


def layernorm_rows(name: str, channels: int) -> list[Row]:
    """The weight and the bias of a layernorm."""
    return [norm_row(name, channels), Row(name + "b", (channels,), False)]
