"""How other programs name and lay out each family's parameters: one table a family, used in both directions.

A table gives Hugging Face's names, and those of config.json's keys. The `gguf` package derives GGUF's names from them.
Everything else in this folder is the same for all families.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

from torch import Tensor

from daybreak.errors import CheckpointError, ConfigError
from daybreak.shapes import Shape, model_config


@dataclass(frozen=True)
class Part:
    """A tensor of Hugging Face's: it holds `rows` of one of our parameters, (out, in), or `transposed`, (in, out)."""

    name: str
    rows: slice | Tensor
    transposed: bool = False

    def theirs(self, x: Tensor) -> Tensor:
        """The tensor's values, from those of our parameter."""
        return (x[self.rows].T if self.transposed else x[self.rows]).contiguous()

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write the tensor's values into our parameter x."""
        x[self.rows] = value.T if self.transposed else value


@dataclass(frozen=True)
class Family:
    """The table of one family. One that differs in more than names overrides methods."""

    arch: str  # ours
    model_type: str  # theirs
    architecture: str  # transformers' class
    prefix: str  # of tensor names; some files leave it out
    layer: str  # before the names of layer {}
    names: Mapping[str, tuple[str, ...]]  # our last word -> their tensors, inside `layer` or the whole model
    sizes: Mapping[str, tuple[str, int]]  # our key -> config.json's and its default there
    arithmetic: Mapping[str, tuple[Any, ...]]  # key of config.json -> values that we compute, the default first
    written: Mapping[str, Any]  # further keys of a config.json of ours
    aliases: Mapping[str, str] = field(default_factory=dict)  # transformers' other names of keys -> the key
    padded: Collection[str] = ("wte",)  # parameters with a row for every id, which theirs do not pad
    transposed: Collection[str] = ()
    copies: Mapping[str, str] = field(default_factory=dict)  # tensors that some files have -> what they repeat, ours
    ignored: tuple[str, ...] = ()  # endings of tensors without learned values
    gguf: str = ""  # llama.cpp's architecture, if it has this family
    gguf_plain: Collection[str] = ()  # matrices that stay fp32 in GGUF
    gguf_copies: Mapping[str, str] = field(default_factory=dict)  # further tensors of GGUF -> what they repeat, ours

    def shape(self, path: Path, config: Mapping[str, Any]) -> Shape:
        """The shape that config.json, read from `path`, describes. CheckpointError for another arithmetic than ours."""
        if config.get("quantization_config"):
            raise CheckpointError(f"{path}: quantization_config is not supported; give weights in fp32, bf16 or fp16.")
        config = dict(config)
        for alias, key in self.aliases.items():
            if alias in config and config.setdefault(key, config[alias]) != config[alias]:
                both = f"{alias} = {config[alias]!r} and {key} = {config[key]!r}"
                raise CheckpointError(f"{path}: {both} are two names of one value; remove the wrong one.")
        for key, values in self.arithmetic.items():
            if (value := config.get(key, values[0])) not in values:
                known = " or ".join(map(repr, values))
                raise CheckpointError(f"{path}: {key} = {short(value)} is not supported; daybreak computes {known}.")
        found = {ours: (key, config.get(key, default)) for ours, (key, default) in self.sizes.items()}
        for key, value in found.values():
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{path}: {key} = {short(value)} must be a whole number above 0.")
        return model_config({"arch": self.arch, **{ours: value for ours, (_, value) in found.items()}})

    def config(self, shape: Shape) -> dict[str, Any]:
        """What config.json says of a shape."""
        kept = {key: values[0] for key, values in self.arithmetic.items()}
        sizes = {key: getattr(shape, ours) for ours, (key, _) in self.sizes.items()}
        names = {"architectures": [self.architecture], "model_type": self.model_type}
        return {**names, **kept, **sizes, **self.written}

    def parts(self, shape: Shape, name: str, rows: int) -> list[Part]:
        """The tensors of one of our parameters, which has so many rows, without their prefix."""
        head, _, leaf = name.rpartition(".")
        before, each = self.layer.format(head.rpartition(".")[2]) if head else "", self.rows_of_each(shape, leaf, rows)
        return [Part(before + n, r, leaf in self.transposed) for n, r in zip(self.names[leaf], each, strict=True)]

    def rows_of_each(self, shape: Shape, leaf: str, rows: int) -> Sequence[slice | Tensor]:
        """Which of a parameter's rows each of its tensors holds, in their order. A family overrides it where one of our
        parameters is several tensors of theirs, or has its rows in another order."""
        return [slice(min(rows, shape.V) if leaf in self.padded else rows)]

    def gguf_keys(self, shape: Shape) -> dict[str, Any]:
        """What GGUF says of a shape: names of GGUFWriter's methods, without add_."""
        return {
            "name": f"daybreak {shape.arch} L{shape.L} C{shape.C}",
            "context_length": shape.max_T, "embedding_length": shape.C, "block_count": shape.L, "head_count": shape.NH,
        }  # fmt: skip


class _GPT2(Family):
    """Its MLP has four times its channels."""

    def shape(self, path: Path, config: Mapping[str, Any]) -> Shape:
        shape = super().shape(path, config)
        if config.get("n_inner") not in (None, 4 * shape.C):
            raise CheckpointError(f"{path}: n_inner = {short(config['n_inner'])} is not supported; use 4 * n_embd.")
        return shape

    def gguf_keys(self, shape: Shape) -> dict[str, Any]:
        return {**super().gguf_keys(shape), "feed_forward_length": 4 * shape.C, "layer_norm_eps": 1e-5}


# Its linear layers are Conv1D, and its head is the embedding. In GGUF that is written once more, because not every
# reader falls back to the embedding. The ignored tensors are causal masks of old versions.
GPT2 = _GPT2(
    arch="gpt2", model_type="gpt2", architecture="GPT2LMHeadModel", prefix="transformer.", layer="h.{}.",
    names={
        "wte": ("wte.weight",), "wpe": ("wpe.weight",), "lnfw": ("ln_f.weight",), "lnfb": ("ln_f.bias",),
        "ln1w": ("ln_1.weight",), "ln1b": ("ln_1.bias",), "ln2w": ("ln_2.weight",), "ln2b": ("ln_2.bias",),
        "qkvw": ("attn.c_attn.weight",), "qkvb": ("attn.c_attn.bias",),
        "attprojw": ("attn.c_proj.weight",), "attprojb": ("attn.c_proj.bias",),
        "fcw": ("mlp.c_fc.weight",), "fcb": ("mlp.c_fc.bias",),
        "fcprojw": ("mlp.c_proj.weight",), "fcprojb": ("mlp.c_proj.bias",),
    },
    sizes={"L": ("n_layer", 12), "C": ("n_embd", 768), "NH": ("n_head", 12), "max_T": ("n_positions", 1024),
           "V": ("vocab_size", 50257)},
    arithmetic={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    aliases={"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
             "max_position_embeddings": "n_positions"},
    written={"n_inner": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    transposed=("qkvw", "attprojw", "fcw", "fcprojw"), copies={"lm_head.weight": "wte"},
    ignored=("attn.bias", "attn.masked_bias"), gguf="gpt2", gguf_plain=("wpe",), gguf_copies={"output.weight": "wte"},
)  # fmt: skip

FAMILIES: dict[str, Family] = {"gpt2": GPT2}  # by model_type


def family_of(shape: Shape, to: str) -> Family:
    """The table of a shape's family. ConfigError if there is none, for who exports `to` a format."""
    able = [family for family in FAMILIES.values() if family.gguf or to != "GGUF"]
    found = [family for family in able if family.arch == shape.arch]
    if not found:
        known = ", ".join(family.arch for family in able)
        raise ConfigError(f"model.arch = {shape.arch!r} has no form in {to}; those that have one: {known}.")
    return found[0]
