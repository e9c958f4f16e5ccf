"""The common part of all families' shapes: the keys that the generic code reads, and how they are checked.

Letters as everywhere in daybreak: L layers, C channels, NH heads, HS head size, max_T longest sequence, V vocabulary,
Vp vocabulary padded to a multiple of 128. Matmuls like such sizes; the rows of the padding are zero and stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from daybreak.config_keys import at_least, check_rules, key, within
from daybreak.errors import ConfigError

VOCAB_PAD = 128


@dataclass(frozen=True)
class Shape:
    """The keys that every family has. A family adds its own, and may redefine one with another default or rule."""

    arch: str = key("", "family of models")
    L: int = key(12, "layers", within(1, 1000))
    C: int = key(768, "channels", within(1, 1 << 20))
    NH: int = key(12, "attention heads", at_least(1))
    max_T: int = key(1024, "longest sequence in tokens", within(1, 1 << 20))
    V: int = key(50257, "vocabulary in tokens", within(1, 1 << 24))

    @property
    def HS(self) -> int:
        return self.C // self.NH

    @property
    def Vp(self) -> int:
        return -(-self.V // VOCAB_PAD) * VOCAB_PAD

    def text(self) -> str:
        """The family, the keys that all have, and those of its own that differ from their defaults, on one line."""
        common = [f.name for f in fields(Shape)]
        own = [f.name for f in fields(self) if f.name not in common and getattr(self, f.name) != f.default]
        return " ".join([self.arch, *(f"{key}={getattr(self, key)}" for key in [*common[1:], *own])])

    def check(self) -> None:
        """Raise ConfigError unless the shape can exist. A family adds the rules that join several keys."""
        check_rules("model", self)

    def check_multiple(self, name: str, of: str | int) -> None:
        """Raise ConfigError unless key `name` is a multiple of a number, or of another key."""
        value, unit = getattr(self, name), getattr(self, of) if isinstance(of, str) else of
        if value % unit:
            said = f"model.{of} = {unit}" if isinstance(of, str) else unit
            raise ConfigError(f"model.{name} = {value} must be a multiple of {said}.")
