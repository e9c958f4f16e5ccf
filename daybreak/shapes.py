"""Model shapes: the config dataclass of each architecture, and the names people use for the published ones.

Letters as everywhere in daybreak: L layers, C channels, NH heads, HS = C / NH head size, max_T longest sequence,
V vocabulary, Vp vocabulary padded to a multiple of 128 (GEMM-friendly; padding rows are zero and stay zero).
No torch here: `--help`, configuration and `plan` start fast.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from daybreak.errors import ConfigError

VOCAB_PAD = 128


@dataclass(frozen=True)
class GPT2Config:
    """A GPT-2 / GPT-3 (dense attention) shape. Stored in every checkpoint, tagged by `arch`."""

    L: int = 12
    C: int = 768
    NH: int = 12
    max_T: int = 1024
    V: int = 50257
    arch: str = "gpt2"

    @property
    def HS(self) -> int:
        return self.C // self.NH

    @property
    def Vp(self) -> int:
        return -(-self.V // VOCAB_PAD) * VOCAB_PAD

    def check(self) -> None:
        """Raise ConfigError unless the shape can exist."""
        for f in ("L", "C", "NH", "max_T", "V"):
            if getattr(self, f) < 1:
                raise ConfigError(f"model.{f} = {getattr(self, f)} must be at least 1.")
        if self.C % self.NH:
            raise ConfigError(f"model.C = {self.C} must be a multiple of model.NH = {self.NH}.")
        if self.C % 8:
            raise ConfigError(f"model.C = {self.C} must be a multiple of 8.")


ARCHS: dict[str, type[GPT2Config]] = {"gpt2": GPT2Config}

# The published GPT-2 family by depth (llm.c's `-e dN`): depth -> (C, NH).
GPT2_DEPTHS = {6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20), 48: (1600, 25), 60: (1920, 30),
               72: (2880, 30), 84: (3456, 36)}  # fmt: skip
# The GPT-3 paper's table 2.1 by width (llm.c's `-e gpt3:cN`): C -> (L, NH). 5140 there is a typing error for 5120.
GPT3_WIDTHS = {384: (6, 6), 768: (12, 12), 1024: (24, 16), 1536: (24, 16), 2048: (24, 16), 2560: (32, 32),
               4096: (32, 32), 5120: (40, 40), 12288: (96, 96)}  # fmt: skip
GPT2_NAMES = {"gpt2-124M": "d12", "gpt2-350M": "d24", "gpt2-774M": "d36", "gpt2-1558M": "d48"}


def shape_names() -> list[str]:
    """Every descriptor `parse_shape` knows, canonical spelling."""
    return [f"d{n}" for n in GPT2_DEPTHS] + [f"gpt3:c{c}" for c in GPT3_WIDTHS] + list(GPT2_NAMES)


def is_shape(text: str) -> bool:
    """Whether `text` is a shape descriptor (d12, gpt2:d12, gpt3:c768, gpt2-124M)."""
    return text.removeprefix("gpt2:") in shape_names() or text == "gpt3:c5140"


def parse_shape(text: str) -> GPT2Config:
    """The shape a descriptor names. Raises ConfigError, with the nearest match, for an unknown one."""
    if not is_shape(text):
        near = difflib.get_close_matches(text, shape_names(), 1, 0.0)
        raise ConfigError(f"unknown shape {text!r}; did you mean {near[0]!r}? Known: {', '.join(shape_names())}.")
    name = GPT2_NAMES.get(text, text).removeprefix("gpt2:")
    if name.startswith("gpt3:c"):
        C = int(name[6:])
        C = 5120 if C == 5140 else C
        L, NH = GPT3_WIDTHS[C]
        return GPT2Config(L=L, C=C, NH=NH, max_T=2048)
    C, NH = GPT2_DEPTHS[int(name[1:])]
    return GPT2Config(L=int(name[1:]), C=C, NH=NH, max_T=1024)


def model_config(values: dict[str, Any], base: GPT2Config | None = None) -> GPT2Config:
    """Build the config dataclass that `values['arch']` names from plain values (TOML, JSON, flags)."""
    arch = values.get("arch", base.arch if base else "gpt2")
    if arch not in ARCHS:
        raise ConfigError(f"model.arch = {arch!r} is not known; use one of {', '.join(ARCHS)}.")
    cls = ARCHS[arch]
    known = {f.name for f in fields(cls)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)
            raise ConfigError(f"unknown key model.{key}; did you mean model.{near[0]}?")
    return replace(base, **values) if base is not None and type(base) is cls else cls(**values)
