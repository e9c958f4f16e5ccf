"""Bring your own: a Hugging Face tokenizer.json, through the `tokenizers` library (extra `data`)."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daybreak.data.formats import extra
from daybreak.data.tokenizer import TOKENIZER_FILE, Tokenizer
from daybreak.errors import ConfigError, DataError

# What starts a document, the first of these that the vocabulary has.
EOT_NAMES = ("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|bos|>", "<s>", "<bos>", "</s>", "<eos>")


def _byte_letters() -> dict[str, int]:
    """The letter -> byte table of byte-level BPE (GPT-2's bytes_to_unicode)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}


class HFTokenizer(Tokenizer):
    """A tokenizer.json. `V` is its largest id + 1; `eot` its first token of EOT_NAMES (not V - 1 as elsewhere)."""

    def __init__(self, source: str, where: str) -> None:
        library = extra("tokenizers", "data", where)
        try:
            self._hf = library.Tokenizer.from_str(source)
        except Exception as error:
            raise DataError(f"{where} is not a Hugging Face tokenizer ({error}).") from None
        self._hf.no_truncation()
        self._hf.no_padding()
        vocabulary: dict[str, int] = self._hf.get_vocab(with_added_tokens=True)
        eot = next((vocabulary[name] for name in EOT_NAMES if name in vocabulary), None)
        if eot is None:
            raise ConfigError(f"{where} has no token that could start a document ({', '.join(EOT_NAMES)}); add one.")
        self.source, self.fingerprint = source, hashlib.sha256(source.encode()).hexdigest()
        self.name, self.eot, self.V = f"hf-{self.fingerprint[:12]}", eot, max(vocabulary.values()) + 1
        spec = json.loads(source)
        added = {t["content"] for t in spec.get("added_tokens") or []}
        letters = _byte_letters() if '"ByteLevel"' in source else {}
        if (most := 4 * len(vocabulary) + (1 << 16)) < self.V:  # gaps exist, but each id takes memory everywhere
            raise DataError(f"{where} has ids up to {self.V - 1} for {len(vocabulary)} tokens; the most is {most}.")
        self._bytes = [b""] * self.V
        for token, i in vocabulary.items():
            if token in added or (letters and not set(token) <= letters.keys()):
                self._bytes[i] = token.encode()
            elif letters:
                self._bytes[i] = bytes(letters[c] for c in token)
            elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):  # SentencePiece's byte fallback
                self._bytes[i] = bytes([int(match[1], 16)])
            else:
                self._bytes[i] = token.replace("\u2581", " ").encode()
        # Text is ordinary text: its "<|endoftext|>" must not become the token.
        self._hf.encode_special_tokens = True

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids of `text`, shape (n,), without what the file's post-processor would add around it."""
        ids = self._hf.encode(
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), None, False, False
        ).ids
        return np.array(ids, self.dtype)


def load_hf_tokenizer(name: str, folder: Path | None) -> HFTokenizer:
    """The tokenizer of a .json file, or the one called hf-... in `folder`. ConfigError, DataError."""
    path = Path(name) if name.endswith(".json") else (folder or Path()) / TOKENIZER_FILE
    try:
        tokenizer = HFTokenizer(path.read_text("utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name!r}: cannot read {path} ({error}).") from None
    if name not in (str(path), name if name.endswith(".json") else tokenizer.name):
        raise DataError(f"{path} is tokenizer {tokenizer.name}, not {name}; bring the old file back.")
    return tokenizer
