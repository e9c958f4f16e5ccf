"""How other programs name and lay out each family's parameters: one table a family, used in both directions.

A table gives Hugging Face's names, and those of config.json's keys. The `gguf` package derives GGUF's names from them.
Everything else in interop/ is the same for all families.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from daybreak.errors import CheckpointError, ConfigError
from daybreak.interop.families import gpt2, llama
from daybreak.interop.families.table import Family
from daybreak.shapes import Shape

__all__ = ["FAMILIES", "Family", "family_named", "family_of"]

FAMILIES: dict[str, Family] = {table.model_type: table for table in (gpt2.GPT2, *llama.TABLES)}


def family_named(path: Path, config: Mapping[str, Any]) -> Family:
    """The table that config.json, read from `path`, asks for. CheckpointError with the reason if there is none."""
    kind, layers = config.get("model_type"), config.get("layer_types")
    usual = ("full_attention", "sliding_attention")
    odd = [layer for layer in layers if layer not in usual] if isinstance(layers, list) else []
    if isinstance(kind, str) and kind in FAMILIES and not odd:
        return FAMILIES[kind]
    why = ""
    if any(key in config for key in ("text_config", "vision_config", "audio_config")):
        why = ", and this one also has parts that read images or sound"
    elif any("expert" in key for key in config):
        why = ", and this one mixes experts"
    elif odd:
        why = f", and this one has layers of kind {short(odd[0])}"
    known = ", ".join(map(repr, FAMILIES))
    raise CheckpointError(f"{path}: model_type = {kind!r} is not supported; daybreak computes {known}{why}.")


def family_of(shape: Shape, to: str) -> Family:
    """The table of a shape's family. ConfigError if there is none, for who exports `to` a format."""
    able = [family for family in FAMILIES.values() if family.gguf or to != "GGUF"]
    if found := next((family for family in able if family.holds(shape)), None):
        return found
    if like := [family.model_type for family in able if family.arch == shape.arch]:
        raise ConfigError(f"{to} cannot hold this shape: none of {', '.join(like)} has all of it ({shape.text()}).")
    known = ", ".join(dict.fromkeys(family.arch for family in able))
    raise ConfigError(f"model.arch = {shape.arch!r} has no form in {to}; those that have one: {known}.")
