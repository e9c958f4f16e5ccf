"""The shapes of nanochat's family, and its names for them.

A name says the depth: a model of L layers has 64 L channels in heads of 128.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from daybreak.checked import Rule
from daybreak.config_keys import POSITIVE, at_least, key
from daybreak.errors import ConfigError
from daybreak.shapes.shape import Shape

SMEAR_CHANNELS = 24  # of an embedding, which smear's gate reads
GATE_CHANNELS = 12  # of a norm's output, which the gates of value embeddings read


@dataclass(frozen=True)
class NanochatConfig(Shape):
    """nanochat: RMSNorm without weights, QK-norm, squared ReLU, value embeddings, and a mixed residual stream."""

    arch: str = key("nanochat", "family of models")
    layers: str = key(
        "wwwf", "kinds of layers, repeated: f sees all keys, w a window; the last layer always sees all",
        Rule("must be one or more of the letters f and w", lambda s: bool(re.fullmatch("[fw]+", s))),
    )  # fmt: skip
    window: int = key(513, "keys that a query sees in layers of kind w, its own among them", at_least(1))
    theta: float = key(100000.0, "base of the rotary angles", Rule("must be greater than 1", lambda x: bool(x > 1)))
    softcap: float = key(15.0, "logits z become softcap * tanh(z / softcap)", POSITIVE)
    eps: float = key(2.0**-23, "what RMSNorm adds to the mean square", POSITIVE)

    def kind(self, layer: int) -> str:
        """The letter of a layer: f or w."""
        return "f" if layer == self.L - 1 else self.layers[layer % len(self.layers)]

    def valued(self, layer: int) -> bool:
        """Whether a layer has value embeddings: every other one, counted from the last."""
        return (self.L - 1 - layer) % 2 == 0

    def check(self) -> None:
        super().check()
        self.check_multiple("C", "NH")
        self.check_multiple("C", 8)
        if self.HS % 2 or self.C < SMEAR_CHANNELS:
            raise ConfigError(f"model.C = {self.C} must be {SMEAR_CHANNELS} at least, in heads of an even size.")


def _of_depth(L: int) -> NanochatConfig:
    return NanochatConfig(L=L, C=64 * L, NH=L // 2, max_T=2048, V=32768)


SHAPES = {f"nanochat:d{L}": _of_depth(L) for L in (4, 12, 24)}
