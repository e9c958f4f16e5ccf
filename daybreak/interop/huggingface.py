"""Hugging Face's folders, both ways: config, generation config, tokenizer files, safetensors shards.

The names and layouts of a family are in families.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.data.formats import extra
from daybreak.data.tokenizer import EOT_TEXT, Tokenizer, byte_letters
from daybreak.errors import CheckpointError, Error
from daybreak.interop.families import FAMILIES, Family, family_of
from daybreak.interop.source import (
    DTYPES,
    Export,
    Source,
    appearing,
    checked_shape,
    default_tokenizer,
    identify_tokenizer,
    layout,
)
from daybreak.shapes import Shape
from daybreak.state.safetensors_io import Entry, SafetensorsFile, write_safetensors

MAX_SHARD = 5_000_000_000  # bytes
FINGERPRINT = "daybreak_tokenizer_fingerprint"  # a key of config.json that others ignore
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "vocab.json"]


# ---- in


def download(repository: str) -> Path:
    """Fetch a model from the hub into its cache and return its folder. Raises Error when that fails."""
    hub = extra("huggingface_hub", "hf", "downloading")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=FILES))
    except Exception as error:  # its own classes, and those of two HTTP libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Error(
            f"{repository} could not be downloaded ({reason}); check name and network, or give a folder."
        ) from None


def open_folder(path: Path, tokenizer: str = "") -> Source:
    """The model in a folder of Hugging Face's format; tensors are read when asked for.

    Raises CheckpointError naming the file and what of it daybreak cannot use.
    """
    cfg, family = _shape(path / "config.json")
    files = _tensor_files(path)
    if len(files) < cfg.L:
        raise CheckpointError(f"{path / 'config.json'}: {cfg.L} layers, but there are {len(files)} tensors in all.")
    prefix = family.prefix if any(key.startswith(family.prefix) for key in files) else ""
    shapes = {name: shape for name, _, shape in layout(cfg)}
    parts = {name: family.parts(cfg, name, shape[0]) for name, shape in shapes.items()}
    wanted = {prefix + part.name: (shapes[name], part) for name in shapes for part in parts[name]}
    for key in files:
        if key not in wanted and key not in family.copies and not key.endswith(family.ignored):
            raise CheckpointError(f"{path} is no plain {family.architecture}: daybreak has no place for {key!r}.")
    for key, (shape, part) in wanted.items():
        if key not in files:
            raise CheckpointError(f"{path} lacks the tensor {key!r}; copy the model again.")
        theirs = tuple(part.theirs(torch.empty(shape, device="meta")).shape)
        if files[key][1].shape != theirs:
            raise CheckpointError(f"{path}: {key!r} has shape {files[key][1].shape}, its config.json says {theirs}.")

    def raw(key: str) -> Tensor:
        file, entry = files[key]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        file.read(key, out)
        return out

    def read(name: str) -> Tensor:
        values = [raw(prefix + part.name) for part in parts[name]]
        out = values[0].new_zeros(shapes[name])
        for part, value in zip(parts[name], values, strict=True):
            part.put(out, value)
        return out

    for key, name in family.copies.items():
        if key in files and not torch.equal(raw(key), raw(prefix + parts[name][0].name)):
            raise CheckpointError(f"{path}: {key} differs from {name}; an untied head is not supported.")
    source = Source(path, cfg, tokenizer or _tokenizer(path) or default_tokenizer(cfg, "", path), read)
    made = _json(path / "config.json").get(FINGERPRINT)
    if made not in (None, source.manifest["tokenizer"]["fingerprint"]):
        raise CheckpointError(
            f"{path} was exported with another tokenizer than {source.tokenizer!r} ({FINGERPRINT} differs)."
        )
    return source


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); give a folder with it.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy the model again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy the model again.")
    return value


def _shape(path: Path) -> tuple[Shape, Family]:
    config = _json(path)
    if (kind := str(config.get("model_type"))) not in FAMILIES:
        known = " or ".join(map(repr, FAMILIES))
        raise CheckpointError(f"{path}: model_type = {kind!r} is not supported; daybreak computes {known}.")
    return checked_shape(path, FAMILIES[kind].shape(path, config)), FAMILIES[kind]


def _tensor_files(path: Path) -> dict[str, tuple[SafetensorsFile, Entry]]:
    """Tensor name -> its file and entry, of one model.safetensors or of the shards that an index names."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        table = _json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(f, str) and "/" not in f for f in table.values()):
            raise CheckpointError(f"{index} has no weight_map of file names; copy the model again.")
        shards = {file: SafetensorsFile(path / file) for file in sorted(set(table.values()))}
        missing = next((key for key, file in table.items() if key not in shards[file].entries), None)
        if missing is not None:
            raise CheckpointError(f"{path / table[missing]} lacks {missing!r}, which {index.name} places there.")
        return {key: (shards[file], shards[file].entries[key]) for key, file in table.items()}
    if not single.is_file():
        pickled = " pytorch_model.bin is not read, since loading it can run code: save with safe_serialization."
        raise CheckpointError(f"{path} has no model.safetensors.{pickled if list(path.glob('pytorch*')) else ''}")
    file = SafetensorsFile(single)
    return {key: (file, entry) for key, entry in file.entries.items()}


def _tokenizer(path: Path) -> str:
    """The name of the tokenizer that tokenizer.json or vocab.json hold; "" where neither is there."""
    if (path / "tokenizer.json").is_file():
        where, content = path / "tokenizer.json", _json(path / "tokenizer.json")
        model = content.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        added = {t.get("content"): t.get("id") for t in content.get("added_tokens", []) if isinstance(t, dict)}
        vocab = {**vocab, **added} if isinstance(vocab, dict) else None
    elif (path / "vocab.json").is_file():
        where = path / "vocab.json"
        vocab = _json(where)
    else:
        return ""
    if vocab is None or sorted(map(str, vocab.values())) != sorted(map(str, range(len(vocab)))):
        raise CheckpointError(f"{where} is not a byte-pair vocabulary with ids 0, 1, 2 ...; copy the model again.")
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokens = sorted(vocab, key=lambda token: int(vocab[token]))
    known = [bytes(letters.get(c, 0) for c in token) for token in tokens]
    return identify_tokenizer(known, where)


# ---- out


def export(source: Export, out: Path, dtype: str = "fp32", max_shard: int = MAX_SHARD) -> None:
    """Write the folder `out`, which transformers' Auto classes load. It appears complete or not at all.

    Memory: one shard. Raises ConfigError if `out` is not empty, or the family has no form there.
    """
    family = family_of(source.model, "Hugging Face's format")
    with appearing(out) as folder:
        folder.mkdir()
        _write_json(folder / "config.json", _config(source, family, dtype))
        eot = source.tokenizer.eot
        _write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
        write_tokenizer(source.tokenizer, source.model.max_T, folder)
        _write_shards(source, family, folder, DTYPES[dtype], max_shard)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(source: Export, family: Family, dtype: str) -> dict[str, Any]:
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return {
        **family.config(source.model),
        "initializer_range": 0.02, "bos_token_id": source.tokenizer.eot, "eos_token_id": source.tokenizer.eot,
        "use_cache": True,
        "dtype": name, "torch_dtype": name,  # the new name of the key and the old one
        FINGERPRINT: source.tokenizer.fingerprint,
    }  # fmt: skip


def _write_shards(source: Export, family: Family, folder: Path, dtype: torch.dtype, max_shard: int) -> None:
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, shape in source.shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if used + size > max_shard and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            x = source.read(name, dtype)
            for part in family.parts(source.model, name, len(x)):
                tensors[family.prefix + part.name] = part.theirs(x)
        total += sum(x.nbytes for x in tensors.values())
        write_safetensors(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


# ---- tokenizers


def vocabulary_text(tokenizer: Tokenizer) -> list[str]:
    """Every token but end of text, in order of id, spelled with `byte_letters`."""
    letters = byte_letters()
    return ["".join(letters[b] for b in tokenizer.token_bytes(i)) for i in range(tokenizer.eot)]


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The byte-pair merges that the order of the vocabulary implies: each token's last two parts, in order of id."""
    words = [tokenizer.token_bytes(i) for i in range(tokenizer.eot)]
    ranks = {word: rank for rank, word in enumerate(words)}
    text = vocabulary_text(tokenizer)
    found = []
    for rank, word in enumerate(words):
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 2:
            at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append((text[ranks[parts[0]]], text[ranks[parts[1]]]))
    return found


def write_tokenizer(tokenizer: Tokenizer, max_T: int, folder: Path) -> None:
    """tokenizer.json, vocab.json, merges.txt and their configuration. Ids equal daybreak's for every text.

    Of a tokenizer that is a tokenizer.json itself: that file as it is, and its configuration.
    """
    if tokenizer.source:
        start = dict.fromkeys(("bos_token", "eos_token"), tokenizer.token_bytes(tokenizer.eot).decode())
        (folder / "tokenizer.json").write_text(tokenizer.source, encoding="utf-8")
        own = {"tokenizer_class": "PreTrainedTokenizerFast", **start, "model_max_length": max_T}
        _write_json(folder / "tokenizer_config.json", own)
        return
    pairs = merges(tokenizer)
    vocab = {text: i for i, text in enumerate([*vocabulary_text(tokenizer), EOT_TEXT])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": pairs,
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": tokenizer.eot, "content": EOT_TEXT, **added, "special": True}],
        "normalizer": None, "pre_tokenizer": level, "post_processor": {**level, "trim_offsets": False},
        "decoder": level, "model": model,
    }  # fmt: skip
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer", **special, "add_prefix_space": False, "model_max_length": max_T}
    _write_json(folder / "tokenizer.json", content)
    _write_json(folder / "vocab.json", vocab)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
