"""Tokenizers of each kind that models in use have, built by the `tokenizers` library itself; and hard texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from interop_runs import MAX_T
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from daybreak.data.tokenizer import TOKENIZER_FILE, get_tokenizer

PROSE = [
    "the quick brown fox jumps over the lazy dog. It's 2024, don't worry; naïve café! Hello world, hello again. " * 3,
    "def f(x):\n    return x + 1\n\n\tindent  two spaces   three. " * 3 + "漢字かな 中文 한국어 Привет ελληνικά 🙂🙃",
]
TEXTS = [
    "Hello world, don't", "the  quick   brown\n\n\tfox ", "naïve café 漢字 🙂🏽 ελληνικά İ ß",
    "[PAD] and <tool> inside",
    "<s>a[SEP] [CLS]", "a<|endoftext|>b", "12345 67", "\u200bzero\xa0nb\u2028x", "THE QUICK", "", "\n", "x" * 40,
    "def f(x):\n    return x\n",
]  # fmt: skip


def _library(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def added() -> tokenizers.Tokenizer:
    """Ours with a special token and a plain one behind it, as who finetunes GPT-2 often has."""
    made = tokenizers.Tokenizer.from_str(get_tokenizer("gpt2-1024").to_json())
    made.add_special_tokens(["[PAD]"])
    made.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return made


def split_by(pattern: str, **how: Any) -> tokenizers.Tokenizer:
    """Byte-level merges after a splitting of one's own."""
    made = tokenizers.Tokenizer(models.BPE(**how))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    made.train_from_iterator(
        PROSE,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    return made


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip


def sentencepiece(complete: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 has it: any two tokens that make a token merge, and unknown letters fall back to bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        PROSE[:1], trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    )
    spec = json.loads(made.to_str())
    vocab, model = spec["model"]["vocab"], spec["model"]
    more = [token for token in ("ov", "ve", "ove", "▁the▁", "e▁") if token not in vocab]  # "ove": in two ways
    model["vocab"] = vocab = vocab | {token: len(vocab) + i for i, token in enumerate(more)}
    words = sorted(vocab, key=vocab.__getitem__)[259:]
    pairs = [[(w[:i], w[i:]) for i in range(1, len(w)) if w[:i] in vocab and w[i:] in vocab] for w in words]
    model["merges"] = [pair for ways in pairs for pair in (ways if complete else ways[-1:])]
    spec |= {"added_tokens": spec["added_tokens"][:3], "pre_tokenizer": None}
    made = _library(spec)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        PROSE, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return made


def wordpiece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        PROSE, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    around = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return made


# Kind -> how to make one, its tokens that start and end a document.
KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str, str]] = {
    "added": (added, "<|endoftext|>", "<|endoftext|>"),
    "llama3": (lambda: split_by(LLAMA3, ignore_merges=True), "<|begin_of_text|>", "<|end_of_text|>"),
    "sentencepiece": (sentencepiece, "<s>", "</s>"),
    "unigram": (unigram, "</s>", "</s>"),
    "wordpiece": (wordpiece, "[CLS]", "[SEP]"),
}


def their_model(folder: Path, made: Any) -> None:
    """A tiny model of transformers with this tokenizer, and two ids that the tokenizer does not have."""
    transformers = pytest.importorskip("transformers", reason="the extra `eval` installs transformers")
    torch.manual_seed(0)
    keys = {
        "vocab_size": made.get_vocab_size() + 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.2,
    }
    shape = transformers.GPT2Config(n_positions=MAX_T, n_embd=16, n_layer=1, n_head=2, **keys)
    transformers.GPT2LMHeadModel(shape).save_pretrained(folder)
    made.save(str(folder / TOKENIZER_FILE))
