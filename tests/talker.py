"""A small model that has learned a few answers by heart, so that a test can talk with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chats import CHATML, make_model, write_lines
from interop_runs import inside

KNOWN = {
    "Who are you?": "A small model.",
    "What is two and two?": "Four.",
    "Say it twice.": "It, and it again.",
    "Name a colour.": "Blue, like the naïve sea.",
    "Where is the cat?": "On the mat\nby the door.",
    "Do you sleep?": "Never.",
}
T = 96


def make_talker(home: Path, template: str = CHATML) -> Path:
    """The run `home/runs/talk`, a small decoder that was finetuned in full on KNOWN. `home/model` is it before that."""
    transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
    make_model(home / "model", template)
    V = len(json.loads((home / "model/tokenizer.json").read_text())["model"]["vocab"]) + 40
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": T, "initializer_range": 0.1,
             "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **sizes))
    model.save_pretrained(home / "model")
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in KNOWN.items()]
    write_lines(home / "talk.jsonl", [{"messages": chat} for chat in chats * 10])
    told = ["--tokenizer", "model/tokenizer.json", "--row-tokens", str(T), "--val-fraction", "0.2"]
    inside(home, "prepare", "talk.jsonl", *told)
    how = ["--run.device", "cpu", "--batch.B", "4", "--batch.total_tokens", str(4 * T), "--steps", "60",
           "--optim.lr", "1e-2", "--eval.tokens", "512", "--eval.sample_tokens", "0", "--quiet"]  # fmt: skip
    inside(home, "finetune", "model", "--data", "talk", "--method", "full", *how, "--name", "talk")
    return home / "runs/talk"
