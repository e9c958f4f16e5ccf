"""Llama, Mistral, Qwen 2 and 3, SmolLM3, Gemma 3 in other programs: names, kinds of layers, rotary positions.

config.json has two spellings of rotary positions. Files of the Hub have rope_theta and rope_scaling at their top;
transformers 5 writes rope_parameters. We read both and write both. GGUF stores divisors of the angles. The defaults
are those of transformers' classes: a key that config.json lacks has that value, while null may mean more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from daybreak.errors import CheckpointError, ConfigError
from daybreak.interop.families.table import Family, number, plain, whole
from daybreak.interop.part import Part
from daybreak.interop.source import checked_shape
from daybreak.models.rotary import rotary
from daybreak.shapes import LlamaConfig, Shape, model_config
from daybreak.shapes.llama import ROPES

log = logging.getLogger("daybreak")
WINDOW, FULL = "sliding_attention", "full_attention"
SCALED = ("llama3", "yarn", "longrope")  # they know the longest sequence before they were scaled
BOUNDS = {"llama3": {"rope_low": "low_freq_factor", "rope_high": "high_freq_factor"},
          "yarn": {"rope_low": "beta_slow", "rope_high": "beta_fast"}}  # fmt: skip
LAYERS_27B = 62  # of Gemma 3 27B, by which llama.cpp knows that scores are divided by the root of C / NH
HIGH = {"llama3": 4.0, "yarn": 32.0}  # model.rope_high, where it is 0


@dataclass(frozen=True)
class Decoder(Family):
    """A table of this family. `flags`: our keys -> config.json's, or the value that the model type always has."""

    flags: Mapping[str, str | bool] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False  # llama.cpp turns neighbours (2j, 2j + 1) of a head, where others turn (j, HS / 2 + j)

    # ------------------------------------------------------------------------------------------ config.json

    def shape(self, path: Path, config: Mapping[str, Any]) -> Any:
        c = {**dict(self.sizes.values()), **self.defaults, **self.checked(path, config)}
        if c["num_key_value_heads"] is None:
            c["num_key_value_heads"] = c["num_attention_heads"]
        if c["head_dim"] is None:
            c["head_dim"] = whole(path, c, "hidden_size") // whole(path, c, "num_attention_heads")
        if dropout := c.get("attention_dropout"):
            log.warning("%s: attention_dropout = %s is left out: daybreak has no dropout.", path, short(dropout))
        sizes = checked_shape(path, model_config({"arch": self.arch, **self.sizes_of(path, c)}))
        kinds = self.kinds(path, c, sizes.L)
        values: dict[str, Any] = {ours: key if isinstance(key, bool) else c[key] for ours, key in self.flags.items()}
        if odd := next((ours for ours, value in values.items() if type(value) is not bool), None):
            raise CheckpointError(f"{path}: {self.flags[odd]} = {short(values[odd])} must be true or false.")
        window = whole(path, c, "sliding_window") if "w" in kinds else 0
        values |= {"eps": number(path, c, "rms_norm_eps"), "layers": kinds, "window": window}
        return _canonical(replace(sizes, **values, **self.rope(path, c, sizes.max_T)))

    def config(self, shape: Any) -> dict[str, Any]:
        said = {key: getattr(shape, ours) for ours, key in self.flags.items() if isinstance(key, str)}
        said |= {"rms_norm_eps": shape.eps, **_said_rope(shape), **self.kinds_said(shape)}
        return {**super().config(shape), **said}

    def rope(self, path: Path, c: Mapping[str, Any], max_T: int) -> dict[str, Any]:
        """Our keys of rotary positions, and of what only this type has, from config.json's. CheckpointError."""
        return _read_rope(path, c, max_T)

    def kinds(self, path: Path, c: Mapping[str, Any], L: int) -> str:
        """The letter of each of L layers (see LlamaConfig.layers), from config.json's keys. CheckpointError."""
        return "f" * L

    def kinds_said(self, shape: LlamaConfig) -> dict[str, Any]:
        """config.json's keys for the kinds of layers."""
        return {}

    def holds(self, shape: Shape) -> bool:
        """Whether reading what is written gives the shape again."""
        return shape.arch == self.arch and self.shape(Path(), self.config(shape)) == _canonical(shape)

    def rows_of_each(self, shape: Any, leaf: str, rows: int) -> Sequence[slice | Tensor]:
        if leaf.startswith("gateup"):
            return [slice(shape.F), slice(shape.F, None)]
        if leaf.startswith("qkv"):
            q, k = shape.NH * shape.HS, shape.NKV * shape.HS
            return [slice(q), slice(q, q + k), slice(q + k, None)]
        return super().rows_of_each(shape, leaf, rows)

    # ------------------------------------------------------------------------------------------------- GGUF

    def gguf_parts(self, shape: Shape, name: str, rows: int) -> list[Part]:
        parts = super().gguf_parts(shape, name, rows)
        if self.interleaved and name.rpartition(".")[2].startswith("qkv"):
            pairs = torch.arange(rows).view(-1, 2, shape.HS // 2).mT.flatten()  # HS rows after HS rows
            parts[:2] = [replace(part, rows=pairs[part.rows]) for part in parts[:2]]
        return parts

    def gguf_config(self, shape: Any) -> dict[str, Any]:
        if why := self.unlike(shape):
            raise ConfigError(f"GGUF cannot hold this model: llama.cpp's {self.gguf} has no {why}; use --to hf.")
        made = {**super().gguf_config(shape), "attention.value_length": shape.HS, "rope.dimension_count": shape.HS}
        if shape.rope in ("linear", "yarn"):
            made |= {"rope.scaling.type": shape.rope, "rope.scaling.factor": shape.rope_factor}
        if shape.rope == "yarn":
            made["rope.scaling.original_context_length"] = shape.rope_original or shape.max_T
        return made

    def unlike(self, c: LlamaConfig) -> str:
        """The parts of a shape that llama.cpp does not compute for this architecture."""
        yarn = (c.rope_attention, c.rope_low, c.rope_high or HIGH["yarn"]) == (0, 1, HIGH["yarn"])
        own = self.gguf == "llama"  # the one with divisors of angles, and with all biases
        rope = {"yarn": yarn, "llama3": own, "longrope": own and c.rope_attention == 1}
        if c.window:
            return f"window (model.window = {c.window})"
        if not rope.get(c.rope, True):
            return f'such rotary positions (model.rope = "{c.rope}")'
        biases = c.attproj_bias or c.mlp_bias or (c.qkv_bias and self.gguf != "qwen2")
        return "such biases" if biases and not own else ""

    def gguf_tensors(self, shape: Any) -> dict[str, Tensor]:
        return {"rope_freqs.weight": _divisors(shape)} if shape.rope in ("llama3", "longrope") else {}

    def from_gguf(self, path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        if keys.get("expert_count"):
            raise CheckpointError(f"{path} mixes {keys['expert_count']} experts, which daybreak does not compute.")
        c: dict[str, Any] = {"head_dim": None, "num_key_value_heads": None, **super().from_gguf(path, keys, tensors)}
        c["tie_word_embeddings"] = "output.weight" not in tensors
        c |= {"attention_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_down.bias" in tensors}
        kind, before = keys.get("rope.scaling.type", "none"), "rope.scaling."
        c["rope_parameters"] = rope = {"rope_type": kind} if kind != "none" else {}
        both = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
        rope |= {key: plain(keys[before + theirs]) for theirs, key in both.items() if rope and before + theirs in keys}
        if "rope_freqs.weight" in tensors:
            rope |= _of_divisors(c.get("rope_theta", 1e4), tensors["rope_freqs.weight"])
        return c


def _canonical(shape: Any) -> Any:
    """The same model with one spelling of each key, for comparison."""
    kinds = [shape.kind(l) for l in range(shape.L)]
    least = next(n for n in range(1, shape.L + 1) if all(kind == kinds[l % n] for l, kind in enumerate(kinds)))
    same = shape.rope == "default" and shape.window_theta == shape.theta
    return replace(
        shape, layers="".join(kinds[:least]), window=shape.window if "w" in kinds else 0,
        window_theta=shape.window_theta if "w" in kinds and not same else 0.0,
        query_scalar=shape.query_scalar if shape.query_scalar != shape.HS else 0,
        rope_original=(shape.rope_original or shape.max_T) if shape.rope in SCALED else 0,
        rope_high=shape.rope_high or HIGH.get(shape.rope, 0.0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- rotary positions


def _divisors(c: LlamaConfig) -> Tensor:
    """By what the scaling divides the angle of each pair (HS / 2), as GGUF stores it."""
    return rotary(replace(c, rope="default"))[0] / rotary(c)[0]


def _of_divisors(theta: float, each: Tensor) -> dict[str, Any]:
    """rope_parameters for these divisors: Llama 3's, as all of them have been published, else longrope's."""
    factor = plain(float(each.max()))
    c = LlamaConfig(HS=2 * len(each), theta=theta, rope="llama3", rope_factor=factor, rope_original=8192)
    if _divisors(c).allclose(each, rtol=1e-5):
        return {key: value for key, value in _parameters(c).items() if key != "rope_theta"}
    own = [plain(x) for x in each.tolist()]
    return {"rope_type": "longrope", "short_factor": own, "long_factor": own, "factor": 1.0, "attention_factor": 1.0}


def _read_rope(path: Path, c: Mapping[str, Any], max_T: int) -> dict[str, Any]:
    """Our keys of rotary positions, from either spelling: transformers takes rope_scaling before rope_parameters."""
    said = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(said, dict) or FULL in said or WINDOW in said:
        raise CheckpointError(f"{path}: rope_parameters = {short(said)} must be one object for all layers.")
    p = {"rope_theta": c["rope_theta"], "partial_rotary_factor": c.get("partial_rotary_factor"), **said}
    if (kind := p.get("rope_type", p.get("type", "default"))) not in ROPES:
        known = ", ".join(ROPES)
        raise CheckpointError(f"{path}: rope_type = {short(kind)} is not supported; daybreak computes {known}.")
    for key, usual in (("partial_rotary_factor", (1, None)), ("truncate", (True, None)), ("mscale_all_dim", (0, None))):
        if p.get(key) not in usual:
            raise CheckpointError(f"{path}: {key} = {short(p[key])} is not supported; daybreak computes {usual[0]}.")
    made: dict[str, Any] = {"rope": kind, "theta": number(path, p, "rope_theta")}
    if kind == "default":
        return made
    if kind in SCALED:
        key = "original_max_position_embeddings"
        p[key] = c.get(key) or p.get(key) or max_T
        made["rope_original"] = whole(path, p, key)
        p["factor"] = max_T / p[key] if p.get("factor") is None else p["factor"]
    made["rope_factor"] = number(path, p, "factor")
    if kind == "yarn":
        p |= {"beta_slow": p.get("beta_slow") or 1.0, "beta_fast": p.get("beta_fast") or HIGH[kind]}
    made |= {ours: number(path, p, key) for ours, key in BOUNDS.get(kind, {}).items()}
    if kind != "llama3" and p.get("attention_factor") is not None:
        made["rope_attention"] = number(path, p, "attention_factor")
    if kind == "longrope":
        short_, long = p.get("short_factor"), p.get("long_factor")
        if not isinstance(short_, list) or (short_ != long and max_T > made["rope_original"]):
            raise CheckpointError(f"{path}: longrope's short_factor and long_factor must be equal lists.")
        made["rope_factors"] = ",".join(str(number(path, {"short_factor": x}, "short_factor")) for x in short_)
    return made


def _said_rope(c: LlamaConfig) -> dict[str, Any]:
    """config.json's keys, in both spellings."""
    new = _parameters(c)
    old = None if c.rope == "default" else {key: value for key, value in new.items() if key != "rope_theta"}
    return {"rope_parameters": new, "rope_theta": c.theta, "rope_scaling": old}


def _parameters(c: LlamaConfig) -> dict[str, Any]:
    """transformers' rope_parameters of a shape."""
    made: dict[str, Any] = {"rope_type": c.rope, "rope_theta": c.theta}
    if c.rope != "default":
        made["factor"] = c.rope_factor
    if c.rope in SCALED:
        made["original_max_position_embeddings"] = c.rope_original or c.max_T
    bounds = {"rope_low": c.rope_low, "rope_high": c.rope_high or HIGH.get(c.rope, 0.0)}
    made |= {key: bounds[ours] for ours, key in BOUNDS.get(c.rope, {}).items()}
    if c.rope == "longrope":
        made |= {"short_factor": c.divisors, "long_factor": c.divisors}
    return made | ({"attention_factor": c.rope_attention} if c.rope_attention else {})


# --------------------------------------------------------------------------------------------------- kinds of layers


class _Mistral(Decoder):
    """All layers see the same window, or none does."""

    def kinds(self, path: Path, c: Mapping[str, Any], L: int) -> str:
        return "f" * L if c["sliding_window"] is None else "w" * L

    def kinds_said(self, shape: LlamaConfig) -> dict[str, Any]:
        return {"sliding_window": shape.window or None}


class _Qwen(Decoder):
    """Windows by layer_types; without it in the layers from max_window_layers on, if use_sliding_window says so."""

    def kinds(self, path: Path, c: Mapping[str, Any], L: int) -> str:
        on, first = c["use_sliding_window"] and c["sliding_window"] is not None, whole(path, c, "max_window_layers", 0)
        if (said := c.get("layer_types")) is None:
            said = [WINDOW if on and l >= first else FULL for l in range(L)]
        if not isinstance(said, list) or len(said) != L or (WINDOW in said and not on):
            rule = f"must name the kind of each of {L} layers, with use_sliding_window and sliding_window for windows"
            raise CheckpointError(f"{path}: layer_types = {short(said)} {rule}.")
        return "".join("w" if kind == WINDOW else "f" for kind in said)

    def kinds_said(self, shape: LlamaConfig) -> dict[str, Any]:
        kinds = [shape.kind(l) for l in range(shape.L)]
        windows = {"use_sliding_window": "w" in kinds, "sliding_window": shape.window or None}
        first = kinds.index("w") if "w" in kinds else shape.L
        return {**windows, "max_window_layers": first, "layer_types": [WINDOW if k == "w" else FULL for k in kinds]}


class _SmolLM3(_Qwen):
    """Layers without positions where no_rope_layers has 0, by default every fourth. Without layer_types these are those
    with a window, if any, which is not computed."""

    def kinds(self, path: Path, c: Mapping[str, Any], L: int) -> str:
        every = whole(path, c, "no_rope_layer_interval")
        turned = c.get("no_rope_layers") or [(l + 1) % every != 0 for l in range(L)]
        if not isinstance(turned, list) or len(turned) < L:
            raise CheckpointError(f"{path}: no_rope_layers = {short(turned)} must have a 0 or 1 for each layer of {L}.")
        kinds, alone = super().kinds(path, c, L), c.get("layer_types") is None
        places = zip(kinds, turned, strict=False)
        if any(not turn and (kind == "w" or (alone and c["use_sliding_window"])) for kind, turn in places):
            raise CheckpointError(f"{path}: a layer with a window and without positions is not supported.")
        return "".join(kind if turn else "n" for kind, turn in zip(kinds, turned, strict=False))

    def kinds_said(self, shape: LlamaConfig) -> dict[str, Any]:
        turned = [int(shape.kind(l) != "n") for l in range(shape.L)]
        return {**super().kinds_said(shape), "no_rope_layers": turned, "no_rope_layer_interval": 4}

    def unlike(self, c: LlamaConfig) -> str:
        usual = all((c.kind(l) == "n") == (l % 4 == 3) for l in range(c.L))
        return super().unlike(c) or ("" if usual else "other layers without positions than every fourth")


class _Gemma3(_Qwen):
    """Windows by layer_types, without it in all layers but every sixth. They have angles of their own."""

    def config(self, shape: Any) -> dict[str, Any]:
        said, local = super().config(shape), shape.window_theta or shape.theta
        near = {"rope_type": "default", "rope_theta": local}
        said |= {"rope_parameters": {FULL: said["rope_parameters"], WINDOW: near}, "rope_local_base_freq": local}
        return {**said, "query_pre_attn_scalar": shape.query_scalar or shape.HS}

    def rope(self, path: Path, c: Mapping[str, Any], max_T: int) -> dict[str, Any]:
        said, plain = c.get("rope_parameters") or {}, {**c, "rope_scaling": None}
        each = said if isinstance(said, dict) else {"": said}
        far, near, scaled = (x or {} for x in (each.get(FULL), each.get(WINDOW), c.get("rope_scaling")))
        if set(each) - {FULL, WINDOW} or not all(isinstance(x, dict) for x in (far, near, scaled)):
            rule = f"must have an object for {FULL} and one for {WINDOW}, and rope_scaling be one"
            raise CheckpointError(f"{path}: rope_parameters = {short(said)} {rule}.")
        made = _read_rope(path, {**plain, "rope_parameters": far | scaled}, max_T)
        local = {**plain, "rope_theta": c["rope_local_base_freq"], "rope_parameters": near}
        if (near := _read_rope(path, local, max_T))["rope"] != "default":
            raise CheckpointError(f"{path}: {WINDOW} has angles of type {near['rope']}; daybreak computes default.")
        scalar = whole(path, c, "query_pre_attn_scalar")
        return {**made, "window_theta": near["theta"], "act": "gelu", "query_scalar": scalar}

    def kinds(self, path: Path, c: Mapping[str, Any], L: int) -> str:
        every, said = whole(path, c, "sliding_window_pattern"), c.get("layer_types")
        usual = [WINDOW if (l + 1) % every else FULL for l in range(L)]
        return super().kinds(path, {**c, "use_sliding_window": True, "layer_types": usual if said is None else said}, L)

    def kinds_said(self, shape: LlamaConfig) -> dict[str, Any]:
        said, full = super().kinds_said(shape), [l + 1 for l in range(shape.L) if shape.kind(l) != "w"]
        old = {"sliding_window_pattern": full[0] if full else shape.L + 1}  # for transformers before layer_types
        return {**old, "sliding_window": said["sliding_window"], "layer_types": said["layer_types"]}

    def gguf_plus(self, name: str) -> float:
        return 1.0 if "norm" in self.names[name.rpartition(".")[2]][0] else 0.0

    def gguf_config(self, shape: Any) -> dict[str, Any]:
        return super().gguf_config(shape) | ({"attention.sliding_window": shape.window} if shape.window else {})

    def unlike(self, c: LlamaConfig) -> str:
        if c.window and (c.window_theta != 1e4 or any((c.kind(l) == "w") != (l % 6 < 5) for l in range(c.L))):
            return "windows other than those of five layers in six, with model.window_theta = 10000"
        if (c.query_scalar or c.HS) != (c.C // c.NH if c.L == LAYERS_27B else c.HS):
            return f"such scores (model.query_scalar = {c.query_scalar})"
        return super().unlike(replace(c, window=0))

    def from_gguf(self, path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        c, window = super().from_gguf(path, keys, tensors), keys.get("attention.sliding_window")
        C, NH, HS = (whole(path, c, key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
        every = keys.get("attention.sliding_window_pattern", 6) if window else 1
        c |= {"rope_parameters": {FULL: c["rope_parameters"]}, "sliding_window": window}
        c |= {"sliding_window_pattern": every, "rope_local_base_freq": plain(keys.get("rope.freq_base_swa", 1e4))}
        return {**c, "query_pre_attn_scalar": C // NH if c["num_hidden_layers"] == LAYERS_27B else HS}


_NAMES = {
    "wte": ("model.embed_tokens.weight",), "lnfw": ("model.norm.weight",), "headw": ("lm_head.weight",),
    "ln1w": ("input_layernorm.weight",), "ln2w": ("post_attention_layernorm.weight",),
    "qkvw": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "qkvb": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "qnormw": ("self_attn.q_norm.weight",), "knormw": ("self_attn.k_norm.weight",),
    "attprojw": ("self_attn.o_proj.weight",), "attprojb": ("self_attn.o_proj.bias",),
    "gateupw": ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gateupb": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "fcprojw": ("mlp.down_proj.weight",), "fcprojb": ("mlp.down_proj.bias",),
}  # fmt: skip
_BIAS = {"tied": "tie_word_embeddings", "qkv_bias": "attention_bias", "attproj_bias": "attention_bias"}
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0, "attention_bias": False,
             "mlp_bias": False, "use_sliding_window": False, "sliding_window": 4096,
             "max_window_layers": 28, "sliding_window_pattern": 6}  # fmt: skip
_SIZES = {
    "max_T": "max_position_embeddings", "V": "vocab_size", "C": "hidden_size", "F": "intermediate_size",
    "L": "num_hidden_layers", "NH": "num_attention_heads", "NKV": "num_key_value_heads", "HS": "head_dim",
}  # fmt: skip
_GGUF = {
    "context_length": "max_T", "embedding_length": "C", "feed_forward_length": "F", "block_count": "L",
    "attention.head_count": "NH", "attention.head_count_kv": "NKV", "attention.key_length": "HS",
}  # fmt: skip


def _table(
    cls: type[Decoder], name: str, sizes: tuple[int | None, ...], flags: Any, gguf: str, **other: Any
) -> Decoder:
    return cls(
        arch="llama", model_type=name.lower(), architecture=f"{name}ForCausalLM", prefix="", layer="model.layers.{}.",
        names=_NAMES, sizes={ours: (key, n) for (ours, key), n in zip(_SIZES.items(), sizes, strict=True)},
        arithmetic={"hidden_act": ("silu", "swish")}, written={"attention_dropout": 0.0, "pad_token_id": None},
        padded=("wte", "headw"), copies={"lm_head.weight": "wte"}, ignored=("rotary_emb.inv_freq",),
        gguf_keys={key: _SIZES[ours] for key, ours in _GGUF.items()}
        | {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"},
        flags=flags, defaults={**_DEFAULTS, **other}, gguf=gguf, interleaved=gguf in ("llama", "smollm3"),
    )  # fmt: skip


TABLES = [
    _table(Decoder, "Llama", (2048, 32000, 4096, 11008, 32, 32, None, None), {**_BIAS, "mlp_bias": "mlp_bias"},
           "llama"),
    _table(_Mistral, "Mistral", (131072, 32000, 4096, 14336, 32, 32, 8, None), {"tied": _BIAS["tied"]}, "llama"),
    _table(_Qwen, "Qwen2", (32768, 151936, 4096, 22016, 32, 32, 32, None), {"tied": _BIAS["tied"], "qkv_bias": True},
           "qwen2"),
    _table(_Qwen, "Qwen3", (32768, 151936, 4096, 22016, 32, 32, 32, 128), {**_BIAS, "qk_norm": True}, "qwen3"),
    _table(_SmolLM3, "SmolLM3", (32768, 128256, 2048, 11008, 36, 16, 4, None), {**_BIAS, "mlp_bias": "mlp_bias"},
           "smollm3", tie_word_embeddings=True, rope_theta=2e6, sliding_window=None, no_rope_layer_interval=4,
           max_window_layers=1 << 20),
    replace(
        _table(_Gemma3, "Gemma3", (131072, 262208, 2304, 9216, 26, 8, 4, 256),
               _BIAS | dict.fromkeys(("qk_norm", "post_norms", "norm_plus_one", "embed_scale"), True), "gemma3",
               tie_word_embeddings=True, rope_theta=1e6, rope_local_base_freq=1e4, query_pre_attn_scalar=256),
        model_type="gemma3_text",
        names=_NAMES | {"ln1pw": ("post_attention_layernorm.weight",), "ln2w": ("pre_feedforward_layernorm.weight",),
                        "ln2pw": ("post_feedforward_layernorm.weight",)},
        arithmetic={"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False, None),
                    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    ),
]  # fmt: skip
