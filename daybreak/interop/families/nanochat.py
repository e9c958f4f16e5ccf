"""nanochat's family in Hugging Face's folders. transformers has no such model, so the folder has its code.

Tensors have the names and layouts of nanochat's own checkpoints. There the scalars of all layers are one tensor, and
the rotation of queries and keys goes the other way: rows that make the second half of a head have the opposite sign.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from daybreak.errors import CheckpointError
from daybreak.interop.families.table import Family, number
from daybreak.interop.part import Part
from daybreak.shapes import Shape
from daybreak.shapes.nanochat import NanochatConfig

SCALARS = {"resid": "resid_lambdas", "x0": "x0_lambdas"}  # one number of each layer
NUMBERS = {"theta": "rope_theta", "eps": "rms_norm_eps", "softcap": "final_logit_softcapping"}


@dataclass(frozen=True)
class _Turned(Part):
    """Rows of queries or keys, in heads of HS."""

    HS: int = 0

    def theirs(self, x: Tensor) -> Tensor:
        return self._other(super().theirs(x))

    def put(self, x: Tensor, value: Tensor) -> None:
        super().put(x, self._other(value))

    def _other(self, x: Tensor) -> Tensor:
        halves = x.view(-1, 2, self.HS // 2 * x.shape[1])
        return torch.stack([halves[:, 0], -halves[:, 1]], 1).view_as(x)


@dataclass(frozen=True)
class _Scalar(Part):
    """One number of a layer, of a tensor (L)."""

    layer: int = 0
    L: int = 1

    def theirs(self, x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(self.layer), x, x.new_zeros(self.L - 1 - self.layer)])

    def put(self, x: Tensor, value: Tensor) -> None:
        x.copy_(value[self.layer : self.layer + 1])


class _Nanochat(Family):
    def shape(self, path: Path, config: Mapping[str, Any]) -> Shape:
        c = {"window_pattern": "SSSL", **self._numbers(NanochatConfig()), **config}
        if not isinstance(kinds := c["window_pattern"], str) or not re.fullmatch("[SL]+", kinds):
            raise CheckpointError(f"{path}: window_pattern = {short(kinds)} must be letters S and L.")
        values: dict[str, Any] = {key: number(path, c, theirs) for key, theirs in NUMBERS.items()}
        values["layers"] = kinds.replace("S", "w").replace("L", "f")
        return replace(super().shape(path, config), **values)

    def config(self, shape: Any) -> dict[str, Any]:
        pattern = shape.layers.replace("w", "S").replace("f", "L")
        return {**super().config(shape), **self._numbers(shape), "window_pattern": pattern}

    def _numbers(self, shape: Any) -> dict[str, float]:
        return {theirs: getattr(shape, key) for key, theirs in NUMBERS.items()}

    def parts(self, shape: Any, name: str, rows: int) -> list[Part]:
        l, _, leaf = name.removeprefix("h.").rpartition(".")
        if leaf in SCALARS:
            return [_Scalar(SCALARS[leaf], slice(rows), layer=int(l), L=shape.L)]
        if leaf == "ve":
            return [Part(f"value_embeds.{l}.weight", slice(shape.V))]
        parts = super().parts(shape, name, rows)
        if leaf == "qkvw":
            parts[:2] = [_Turned(part.name, part.rows, HS=shape.HS) for part in parts[:2]]
        return parts

    def rows_of_each(self, shape: Any, leaf: str, rows: int) -> Sequence[slice | Tensor]:
        if leaf == "qkvw":
            return [slice(i * shape.C, (i + 1) * shape.C) for i in range(3)]
        return [torch.arange(rows)[None]] if leaf == "smearw" else super().rows_of_each(shape, leaf, rows)


# transformers' own model type `nanochat` is an older model, without smear and value embeddings.
NANOCHAT = _Nanochat(
    arch="nanochat", model_type="daybreak_nanochat", architecture="NanochatForCausalLM", prefix="",
    layer="transformer.h.{}.",
    names={
        "wte": ("transformer.wte.weight",), "smear": ("smear_lambda",), "smearw": ("smear_gate.weight",),
        "backout": ("backout_lambda",), "headw": ("lm_head.weight",), "gatew": ("attn.ve_gate.weight",),
        "qkvw": ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight"), "attprojw": ("attn.c_proj.weight",),
        "fcw": ("mlp.c_fc.weight",), "fcprojw": ("mlp.c_proj.weight",),
    },
    sizes={"L": ("num_hidden_layers", 12), "C": ("hidden_size", 768), "NH": ("num_attention_heads", 6),
           "max_T": ("max_position_embeddings", 2048), "V": ("vocab_size", 32768), "window": ("window", 513)},
    arithmetic={"tie_word_embeddings": (False,)},
    written={"use_cache": False, "auto_map": {"AutoConfig": "modeling_nanochat.NanochatConfig",
                                              "AutoModelForCausalLM": "modeling_nanochat.NanochatForCausalLM"}},
    padded=("wte", "headw"), fp32=("resid", "x0", "smear", "backout"), code="modeling_nanochat.py",
)  # fmt: skip
