"""Adapters of PEFT's beside one model: all requests share its weights, and the adapter's few change between calls.

The engine has one adapter in every linear layer, as wide as the widest that is served, whose scale is 1. Another one
fills a part of it: its rows of A and columns of B stand first, B is multiplied by its own scale, and the rest is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from daybreak.config_keys import LoraConfig
from daybreak.data.chat import Template
from daybreak.data.tokenizer import listed_ends
from daybreak.engine import Engine
from daybreak.errors import ConfigError
from daybreak.interop import Model, peft


def named_folders(given: Sequence[str], base: str) -> dict[str, Path]:
    """The folders of NAME=DIR by name. Raises ConfigError for other forms, and for a name that is taken."""
    found = dict[str, Path]()
    for text in given:
        name, equals, folder = text.partition("=")
        if not name or not equals or not (Path(folder) / peft.CONFIG).is_file():
            raise ConfigError(f"--adapter {text} must be NAME=DIR, where DIR holds PEFT's {peft.CONFIG}.")
        if name == base or name in found:
            raise ConfigError(f"--adapter {text}: the name {name!r} is taken; choose another one.")
        found[name] = Path(folder)
    return found


def widest(folders: Mapping[str, Path]) -> LoraConfig | None:
    """The adapter in which all of them have room; None without any. Raises CheckpointError."""
    rank = max((peft.lora_of(path).rank for path in folders.values()), default=0)
    return LoraConfig(rank, float(rank)) if rank else None


class Adapters:
    """The adapters of one engine by name, where "" is the model without any."""

    def __init__(self, engine: Engine, folders: Mapping[str, Path]) -> None:
        self.engine, self._now = engine, ""
        self._each = {name: self._read(path) for name, path in folders.items()}
        names = [name for layer in engine.table.adapters for name in (layer + "_A", layer + "_B")]
        self._each[""] = {name: torch.zeros_like(engine.param(name)) for name in names} if folders else {}
        self._set("")

    def use(self, name: str) -> None:
        """Let the engine compute with this adapter from now on."""
        if name != self._now:
            self._set(name)

    def _set(self, name: str) -> None:
        for key, value in self._each[name].items():
            self.engine.set_exact(key, value)
        self._now = name

    def _read(self, path: Path) -> dict[str, Tensor]:
        """An adapter's tensors, as the engine's have them. Raises CheckpointError for what we cannot compute."""
        lora, theirs, read = peft.read_adapters(path, self.engine.cfg)
        R, r, made = self.engine.spec.lora.rank, lora.rank, dict[str, Tensor]()
        for layer, whole in self.engine.table.adapters.items():
            down, up = (torch.zeros_like(self.engine.param(f"{layer}_{x}")) for x in "AB")
            if one := theirs.get(layer):
                A, B, at = read(layer + "_A"), read(layer + "_B"), 0
                for i, part in enumerate(one.parts):
                    j = whole.parts.index(part)
                    first, stop = whole.columns[j]
                    down[j * R : j * R + r].copy_(A[i * r : (i + 1) * r])
                    up[first:stop, :r].copy_(B[at : at + stop - first].float() * one.scale)
                    at += stop - first
            made |= {layer + "_A": down, layer + "_B": up}
        return made


def with_adapters(model: Model, base: str, folders: Mapping[str, Path]) -> dict[str, Model]:
    """The model by its name, and as each adapter's folder uses it: with its chat template and ends, if it has them."""
    found = {base: model}
    for name, path in folders.items():
        tokenizer = model.tokenizer.ending([*listed_ends(path), *model.tokenizer.ends])
        found[name] = Model(model.engine, tokenizer, Template.load(path, tokenizer) or model.template)
    return found
