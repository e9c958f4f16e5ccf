"""AdamW (Loshchilov & Hutter 2019): the formulas are in kernels/optimizer.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from daybreak.config_keys import OptimConfig
from daybreak.models.frame import Frame
from daybreak.optimizers import Optimizer, ParamGroup, Part


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Each element has two running averages: m of gradients, and v of their squares."""

    beta1: float
    beta2: float
    eps: float
    state = ("m", "v")

    def scalars(self, t: int) -> tuple[float, ...]:
        """1 - beta1^t and 1 - beta2^t: the sum of the factors that gradients have in m and in v after update t."""
        return 1.0 - self.beta1**t, 1.0 - self.beta2**t

    def update(self, f: Frame, parts: Sequence[Part]) -> None:
        """Update each part by one kernel launch."""
        for part in parts:
            f.k.adamw_update(
                part.weights, part.masters, part.state["m"], part.state["v"], part.grads, part.stats, part.hyper,
                beta1=self.beta1, beta2=self.beta2, eps=self.eps, weight_decay=part.weight_decay, seed=part.seed,
                offset=part.offset,
            )  # fmt: skip


def adamw_group(optim: OptimConfig) -> ParamGroup:
    """Every parameter that no other group takes, with the options of a configuration."""
    return ParamGroup("*", AdamW(optim.beta1, optim.beta2, optim.eps), weight_decay=optim.weight_decay)
