"""GPT-2 in other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from torch import Tensor

from daybreak.errors import CheckpointError
from daybreak.interop.families.table import Family
from daybreak.shapes import Shape


class _GPT2(Family):
    """Its MLP has four times its channels."""

    def shape(self, path: Path, config: Mapping[str, Any]) -> Shape:
        shape = super().shape(path, config)
        if config.get("n_inner") not in (None, 4 * shape.C):
            raise CheckpointError(f"{path}: n_inner = {short(config['n_inner'])} is not supported; use 4 * n_embd.")
        return shape

    def gguf_config(self, shape: Shape) -> dict[str, Any]:
        return {**super().gguf_config(shape), "feed_forward_length": 4 * shape.C}

    def from_gguf(self, path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**super().from_gguf(path, keys, tensors), "n_inner": keys.get("feed_forward_length")}


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
    ignored=(".attn.bias", ".attn.masked_bias"), gguf="gpt2",
    gguf_keys={"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
               "attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon"},
    gguf_plain=("wpe",), gguf_copies={"output.weight": "wte"},
)  # fmt: skip
