"""How other programs name and lay out each family's parameters: one table a family, used in both directions.

A table gives Hugging Face's names, and those of config.json's keys. The `gguf` package derives GGUF's names from them.
Everything else in interop/ is the same for all families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from daybreak.errors import CheckpointError, ConfigError
from daybreak.interop.families import gpt2, llama, nanochat
from daybreak.interop.families.table import Family
from daybreak.shapes import Shape

__all__ = ["FAMILIES", "HF", "Family", "family_named", "family_of", "why_not"]

HF = "Hugging Face's format"
FAMILIES: dict[str, Family] = {table.model_type: table for table in (gpt2.GPT2, *llama.TABLES, nanochat.NANOCHAT)}

# Pattern of a model type, or of keys that have a value -> the reason to refuse the model. The first that fits is told.
REASONS = {
    "text_config|vision_config|audio_config": "also has parts that read images or sound",
    "expert|moe|dbrx|dots1": "mixes experts", "gemma3n|per_layer_input": "embeds its tokens anew in each layer",
    "mamba|ssm|conv|lru_|rwkv|xlstm": "has layers that are no attention", "softcap": "caps its scores or logits",
    "multiplier|logit_scale|^granite": "scales its embeddings, scores or logits", "^gemma ": "lacks Gemma 3's norms",
    "istral3": "scales its queries by their positions", "olmo|exaone4": "has other norms than these",
    "^phi3": "joins its matrices, as qkv_proj and gate_up_proj",
}  # fmt: skip


def why_not(kind: object, config: Mapping[str, Any]) -> str:
    """The reason to refuse a model, by its type and keys, as the end of a sentence; "" if they do not say."""
    said = " ".join([str(kind), *(key for key, value in config.items() if value not in (None, False, 0)), ""])
    return next((f", and this one {why}" for fits, why in REASONS.items() if re.search(fits, said)), "")


def family_named(path: Path, config: Mapping[str, Any]) -> Family:
    """The table that config.json, read from `path`, asks for. CheckpointError with the reason if there is none."""
    kind, layers = config.get("model_type"), config.get("layer_types")
    usual = ("full_attention", "sliding_attention")
    odd = [layer for layer in layers if layer not in usual] if isinstance(layers, list) else []
    if isinstance(kind, str) and kind in FAMILIES and not odd:
        return FAMILIES[kind]
    why = why_not(kind, config) or (f", and this one has layers of kind {short(odd[0])}" if odd else "")
    known = ", ".join(map(repr, FAMILIES))
    raise CheckpointError(f"{path}: model_type = {kind!r} is not supported; daybreak computes {known}{why}.")


def family_of(shape: Shape, to: str) -> Family:
    """The table of a shape's family. ConfigError if there is none, for who exports `to` a format."""
    able = [family for family in FAMILIES.values() if (family.gguf or to != "GGUF") and (not family.code or to == HF)]
    if found := next((family for family in able if family.holds(shape)), None):
        return found
    if like := [family.model_type for family in able if family.arch == shape.arch]:
        raise ConfigError(f"{to} cannot hold this shape: none of {', '.join(like)} has all of it ({shape.text()}).")
    known = ", ".join(dict.fromkeys(family.arch for family in able))
    raise ConfigError(f"model.arch = {shape.arch!r} has no form in {to}; those that have one: {known}.")
