"""Which linear layers have adapters, and the parameters of these: see kernels/lora.py for what they compute.

The linear layer `h.0.attproj` has the frozen weight `h.0.attprojw` (O, I). Its adapter of rank r is two parameters:

    h.0.attproj_A (r, I)    starts at random: U(-1/sqrt(I), 1/sqrt(I)), as PEFT does
    h.0.attproj_B (O, r)    starts at 0, so that the model first computes what it did without adapters

A packed layer has an adapter for each part that is a target. With all of `q`, `k` and `v`, `h.0.qkv_A` is (3 r, I) and
`h.0.qkv_B` has as many rows as the weight. Patterns name layers and parts as `h.0.attproj` and `h.0.q`, or without the
layer's number as `attproj` and `q`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from daybreak.config_keys import LoraConfig
from daybreak.errors import ConfigError
from daybreak.models.rows import Row


@dataclass(frozen=True)
class Adapter:
    """Of one linear layer: what kernels/lora.py calls scale and columns; parts: names of the parts that have it."""

    scale: float
    columns: tuple[tuple[int, int], ...]
    parts: tuple[str, ...]


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith(("_A", "_B"))


def layer_parts(row: Row, parts: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, int]]:
    """The parts of the linear layer whose weight is `row`, such as "h.0.q", and the rows of each: [first, stop)."""
    head, _, leaf = row.name.removesuffix("w").rpartition(".")
    names, at, found = parts.get(leaf, (leaf,)), 0, {}
    for name, size in zip(names, row.stacked if len(names) > 1 else row.shape[:1], strict=True):
        found[f"{head}.{name}"] = at, at + size
        at += size
    return found


def adapters_of(rows: Iterable[Row], parts: Mapping[str, tuple[str, ...]], lora: LoraConfig) -> dict[str, Adapter]:
    """The adapter of each linear layer that has one, by its name, such as "h.0.qkv". parts: of packed layers (see
    registry.Model). Empty for rank 0. Raises ConfigError if the patterns fit no layer."""
    if not lora.rank:
        return {}
    found, known = dict[str, Adapter](), dict[str, None]()
    patterns = [pattern.strip() for pattern in lora.targets.split(",")]
    for row in rows:
        if "." not in row.name or len(row.shape) != 2:
            continue  # embeddings and a head have none
        each = layer_parts(row, parts)
        chosen = {n: c for n, c in each.items() if any(_fits(n, pattern) for pattern in patterns)}
        if chosen:
            found[row.name[:-1]] = Adapter(lora.scale, tuple(chosen.values()), tuple(chosen))
        known |= dict.fromkeys(name.rpartition(".")[2] for name in each)
    if not found:
        said = f"lora.targets = {lora.targets!r} fits no linear layer of the model"
        raise ConfigError(f"{said}; use * for all, or some of {', '.join(known)}.")
    return found


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def adapter_rows(rows: list[Row], adapters: Mapping[str, Adapter], rank: int) -> list[Row]:
    """The same rows, each weight followed by its adapter's two."""
    made = []
    for row in rows:
        made.append(row)
        if len(row.shape) == 2 and (adapter := adapters.get(row.name[:-1])):
            name, inputs, sizes = row.name[:-1], row.shape[1], tuple(b - a for a, b in adapter.columns)
            shape, stacked = (rank * len(sizes), inputs), (rank,) * len(sizes)
            made.append(Row(name + "_A", shape, True, bound=1 / math.sqrt(inputs), stacked=stacked))
            made.append(Row(name + "_B", (sum(sizes), rank), True, stacked=sizes))
    return made
