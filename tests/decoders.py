"""Tiny models of transformers for each model type of the decoder family: each with flags that could be mistaken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from daybreak.data.tokenizer import get_tokenizer
from daybreak.interop import huggingface

V, MAX_T = 264, 64  # seven rows of V have no token of the tokenizer `bytes`
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
GEMMA3 = {"sliding_window": 5, "head_dim": 24, "query_pre_attn_scalar": 24, "pad_token_id": None,
          "num_hidden_layers": 7, "rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 5e3},
                                                      "sliding_attention": {"rope_type": "default"}}}  # fmt: skip
OWN = {"layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True, "query_pre_attn_scalar": 20,
       "num_hidden_layers": 4, "rope_parameters": {"full_attention": YARN, "sliding_attention": {
           "rope_type": "default", "rope_theta": 1e2}}}  # fmt: skip
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Name -> transformers' configuration, its keys beside SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "smollm3": ("SmolLM3", NO_IDS),
    "gemma-3": ("Gemma3Text", GEMMA3),
    "gemma-3-own": ("Gemma3Text", GEMMA3 | OWN),
}
SIZES = {"vocab_size": V, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": MAX_T}  # fmt: skip


def their_decoder(case: str, folder: Path, tokenizer: str = "bytes", **how: Any) -> Any:
    """The model of a case, saved in `folder` with one of our tokenizers: no norm is 1, and no bias 0."""
    transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
    name, keys = CASES[case]
    torch.manual_seed(len(case))
    sizes = SIZES | {"vocab_size": get_tokenizer(tokenizer).V + V - 257}
    config = getattr(transformers, f"{name}Config")(**(sizes | keys))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_((1 if "norm" in key else 0) + 0.2 * torch.randn_like(p))
    model.save_pretrained(folder, **how)
    huggingface.write_tokenizer(get_tokenizer(tokenizer), MAX_T, folder)
    (folder / "generation_config.json").unlink()
    return model


def tokens_of(count: int = MAX_T) -> torch.Tensor:
    return torch.randint(257, (1, count), generator=torch.Generator().manual_seed(3))


def edit(path: Path, **keys: Any) -> None:
    """Change keys of a JSON file; ... removes one."""
    value = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: x for key, x in value.items() if x is not ...}))
