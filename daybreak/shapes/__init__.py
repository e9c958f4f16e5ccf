"""Model shapes: one dataclass a family, with its keys, their meaning and their rules; and the names of published ones.

A family is a file here, registered in ARCHS. Configuration, command line, `--print-config` and documentation read
its keys from the dataclass. No torch here: `--help`, configuration and `plan` start fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from daybreak.errors import ConfigError
from daybreak.formatting import meant
from daybreak.shapes import gpt2, llama, nanochat
from daybreak.shapes.gpt2 import ALIASES, GPT2Config
from daybreak.shapes.llama import LlamaConfig
from daybreak.shapes.nanochat import NanochatConfig
from daybreak.shapes.shape import Shape

__all__ = [
    "ARCHS", "SHAPES", "GPT2Config", "LlamaConfig", "NanochatConfig", "Shape", "family", "is_shape", "model_config",
    "parse_shape",
]  # fmt: skip

ARCHS: dict[str, type[Shape]] = {  # the first is the default
    "gpt2": GPT2Config,
    "llama": LlamaConfig,
    "nanochat": NanochatConfig,
}
SHAPES: dict[str, Shape] = {**gpt2.SHAPES, **llama.SHAPES, **nanochat.SHAPES}


def is_shape(text: str) -> bool:
    """Whether `text` names a published shape (d12, gpt2:d12, gpt3:c768, gpt2-124M, llama3.2-1b)."""
    return text in SHAPES or text in ALIASES


def parse_shape(text: str) -> Shape:
    """The published shape of this name. Raises ConfigError, with the nearest match, for an unknown one."""
    if not is_shape(text):
        hint = meant(text, SHAPES, "none has this name.")
        raise ConfigError(f"unknown shape {text!r}; {hint} Known: {', '.join(SHAPES)}.")
    return SHAPES[text] if text in SHAPES else ALIASES[text]


def family(arch: str) -> type[Shape]:
    """The dataclass of a family. Raises ConfigError for an unknown one."""
    if arch not in ARCHS:
        raise ConfigError(f"model.arch = {arch!r} is not known; use one of {', '.join(ARCHS)}.")
    return ARCHS[arch]


def model_config(values: Mapping[str, Any], base: Shape | None = None) -> Shape:
    """The shape of the family that `values["arch"]` names, else of base's, from plain values (TOML, JSON, flags).

    A key that is not given is base's where the family has it too, else the family's default."""
    kept = {} if base is None else {f.name: getattr(base, f.name) for f in fields(base)}
    cls = family(values.get("arch", kept.get("arch", next(iter(ARCHS)))))
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key model.{key}; {meant(key, known, 'leave it out.', 'model.{}')}")
    return cls(**{name: value for name, value in {**kept, **values}.items() if name in known})
