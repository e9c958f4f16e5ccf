"""Optimizers: how parameters are updated, and the state that this takes. One file each.

A group of parameters has an optimizer, a scale of the learning rate, and a weight decay. Patterns of names choose its
members. Weights, gradients and state lie in flat buffers, and ranks that share them update a part each:

    optimizer         a rank updates       its state                           so a checkpoint holds
    by element        any elements         flat buffers, one value an element  ranges of those buffers
    `whole`           whole parameters     tensors of any shape for each       tensors named KEY.PARAMETER

AdamW is of the first kind. Muon needs whole matrices, so it is of the second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from daybreak.models.frame import Frame
from daybreak.models.rows import Row

SCALARS = ("lr", "t", "inv_valid")  # device scalars of every optimizer: see `Part.hyper`


@dataclass(frozen=True)
class Part:
    """The elements of one launch: n neighbours of one group, or one whole parameter.

    masters: the fp32 master weights, as kernels/optimizer.py keeps them. Weights in fp32 or fp64 are their own, and
    bf16 may have none. stats: the guard's decision (kernels.guard.STATS). hyper: the learning rate times the group's
    scale, the update's number from 1, 1 / the number of targets, and the optimizer's `scalars`. seed, offset: for
    stochastic rounding. offset is the place of the first element among all.
    """

    weights: Tensor  # (n), in compute dtype
    masters: Tensor | None
    grads: Tensor  # (n)
    state: Mapping[str, Tensor]
    stats: Tensor
    hyper: Tensor
    weight_decay: float
    seed: int
    offset: int
    row: Row | None  # the whole parameter's


class Optimizer(ABC):
    """How parameters are updated. Subclasses are frozen dataclasses: two that are equal share their device scalars."""

    whole: ClassVar[bool] = False
    state: ClassVar[tuple[str, ...]] = ()  # names of the tensors that stay from step to step

    def takes(self, row: Row) -> bool:
        """Whether it can update this parameter. Groups that come later get the others that fit a pattern."""
        return True

    def shape(self, key: str, row: Row) -> tuple[int, ...]:
        """The shape of the state `key` of a whole parameter."""
        return row.shape

    def scalars(self, t: int) -> tuple[float, ...]:
        """Numbers for the t-th update, from 1."""
        return ()

    @abstractmethod
    def update(self, f: Frame, parts: Sequence[Part]) -> None:
        """Update weights, master weights and state of all parts of a group that this rank has, by kernels or `f.k.do`,
        unless the guard refuses."""


@dataclass(frozen=True)
class ParamGroup:
    """The parameters that share an optimizer: those whose names fit this pattern, and no earlier group's.

    The optimizer must be able to take them."""

    names: str
    optimizer: Optimizer
    lr_scale: float = 1.0
    weight_decay: float = 0.0  # of matrices; a model's other parameters never decay
