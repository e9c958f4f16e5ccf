"""nanochat's family in Hugging Face's folders. transformers has no such model, so the folder has its code.

Tensors have the names and layouts of nanochat's own checkpoints. There the scalars of all layers are one tensor, and
the rotation of queries and keys goes the other way: rows that make the second half of a head have the opposite sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from daybreak.errors import CheckpointError
from daybreak.interop.families.table import Family, number, whole
from daybreak.interop.part import Part
from daybreak.shapes import Shape

LETTERS = {"w": "S", "f": "L"}  # of kinds of layers: ours, theirs
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


@dataclass(frozen=True)
class _Row(Part):
    """A vector, which is a matrix of one row there."""

    def theirs(self, x: Tensor) -> Tensor:
        return x[None]

    def put(self, x: Tensor, value: Tensor) -> None:
        x.copy_(value[0])


class _Nanochat(Family):
    def shape(self, path: Path, config: Mapping[str, Any]) -> Shape:
        said = {"window_pattern": "SSSL", "window": 513, "rope_theta": 1e5, "rms_norm_eps": 2.0**-23}
        c = said | {"final_logit_softcapping": 15.0} | dict(config)
        ours = {theirs: letter for letter, theirs in LETTERS.items()}
        if not isinstance(kinds := c["window_pattern"], str) or not kinds or set(kinds) - set(ours):
            raise CheckpointError(f"{path}: window_pattern = {short(kinds)} must be letters S and L.")
        values: dict[str, Any] = {key: number(path, c, theirs) for key, theirs in NUMBERS.items()}
        values |= {"window": whole(path, c, "window"), "layers": "".join(ours[kind] for kind in kinds)}
        return replace(super().shape(path, config), **values)

    def config(self, shape: Any) -> dict[str, Any]:
        said = {theirs: getattr(shape, key) for key, theirs in NUMBERS.items()}
        pattern = "".join(LETTERS[kind] for kind in shape.layers)
        return {**super().config(shape), **said, "window_pattern": pattern, "window": shape.window}

    def parts(self, shape: Any, name: str, rows: int) -> list[Part]:
        l, _, leaf = name.removeprefix("h.").rpartition(".")
        if leaf in SCALARS:
            return [_Scalar(SCALARS[leaf], slice(rows), layer=int(l), L=shape.L)]
        if leaf == "smearw":
            return [_Row("smear_gate.weight", slice(rows))]
        if leaf == "ve":
            return [Part(f"value_embeds.{l}.weight", slice(shape.V))]
        parts = super().parts(shape, name, rows)
        if leaf == "qkvw":
            parts[:2] = [_Turned(part.name, part.rows, HS=shape.HS) for part in parts[:2]]
        return parts

    def rows_of_each(self, shape: Any, leaf: str, rows: int) -> list[slice]:
        if leaf == "qkvw":
            return [slice(i * shape.C, (i + 1) * shape.C) for i in range(3)]
        return [slice(min(rows, shape.V) if leaf in self.padded else rows)]


# transformers' own model type `nanochat` is an older model, without smear and value embeddings.
NANOCHAT = _Nanochat(
    arch="nanochat", model_type="daybreak_nanochat", architecture="NanochatForCausalLM", prefix="",
    layer="transformer.h.{}.",
    names={
        "wte": ("transformer.wte.weight",), "smear": ("smear_lambda",), "backout": ("backout_lambda",),
        "headw": ("lm_head.weight",), "gatew": ("attn.ve_gate.weight",),
        "qkvw": ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight"), "attprojw": ("attn.c_proj.weight",),
        "fcw": ("mlp.c_fc.weight",), "fcprojw": ("mlp.c_proj.weight",),
    },
    sizes={"L": ("num_hidden_layers", 12), "C": ("hidden_size", 768), "NH": ("num_attention_heads", 6),
           "max_T": ("max_position_embeddings", 2048), "V": ("vocab_size", 32768)},
    arithmetic={"tie_word_embeddings": (False,)},
    written={"use_cache": False, "auto_map": {"AutoConfig": "modeling_nanochat.NanochatConfig",
                                              "AutoModelForCausalLM": "modeling_nanochat.NanochatForCausalLM"}},
    padded=("wte", "headw"), fp32=("resid", "x0", "smear", "backout"), code="modeling_nanochat.py",
)  # fmt: skip
