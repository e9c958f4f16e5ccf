"""Hugging Face's folders, both ways: config, generation config, tokenizer files, safetensors shards.

The names and layouts of a family are in families.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.checked import FILE_NAME, TEXT, read_json
from daybreak.data.formats import extra
from daybreak.data.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer
from daybreak.errors import CheckpointError, DataError, Error
from daybreak.interop.families import FAMILIES, Family, family_of
from daybreak.interop.source import (
    DTYPES,
    Export,
    Source,
    appearing,
    checked_shape,
    default_tokenizer,
    finite,
    layout,
)
from daybreak.shapes import Shape
from daybreak.state.safetensors_io import Entry, SafetensorsFile, write_safetensors

MAX_SHARD = 5_000_000_000  # bytes
FINGERPRINT = "daybreak_tokenizer_fingerprint"  # a key of config.json that others ignore
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", TOKENIZER_FILE, "vocab.json"]


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
        if not files[key][1].dtype.is_floating_point:
            raise CheckpointError(f"{path}: {key!r} is {files[key][1].dtype}; give weights in fp32, bf16 or fp16.")
        theirs = tuple(part.theirs(torch.empty(shape, device="meta")).shape)
        if files[key][1].shape != theirs:
            raise CheckpointError(f"{path}: {key!r} has shape {files[key][1].shape}, its config.json says {theirs}.")

    def raw(key: str) -> Tensor:
        file, entry = files[key]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        file.read(key, out)
        return finite(out, path, key)

    def read(name: str) -> Tensor:
        values = [raw(prefix + part.name) for part in parts[name]]
        out = values[0].new_zeros(shapes[name])
        for part, value in zip(parts[name], values, strict=True):
            part.put(out, value)
        return out

    for key, name in family.copies.items():
        if key in files and not torch.equal(raw(key), raw(prefix + parts[name][0].name)):
            raise CheckpointError(f"{path}: {key} differs from {name}; an untied head is not supported.")
    known = (None if tokenizer else _tokenizer(path)) or default_tokenizer(cfg, tokenizer, path)
    made = _json(path / "config.json", {}).get(FINGERPRINT)
    if made not in (None, known.fingerprint) and not known.source:  # others may spell a tokenizer.json anew
        raise CheckpointError(
            f"{path} was exported with another tokenizer than {known.name!r} ({FINGERPRINT} differs)."
        )
    return Source(path, cfg, known, read)


def _json(path: Path, spec: dict[Any, Any]) -> dict[str, Any]:
    return dict(read_json(path, spec, CheckpointError, "copy the model again"))


def _shape(path: Path) -> tuple[Shape, Family]:
    config = _json(path, {"model_type?": TEXT})
    if (kind := config.get("model_type")) not in FAMILIES:
        known = " or ".join(map(repr, FAMILIES))
        raise CheckpointError(f"{path}: model_type = {kind!r} is not supported; daybreak computes {known}.")
    return checked_shape(path, FAMILIES[kind].shape(path, config)), FAMILIES[kind]


def _tensor_files(path: Path) -> dict[str, tuple[SafetensorsFile, Entry]]:
    """Tensor name -> its file and entry, of one model.safetensors or of the shards that an index names."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file() and not single.is_file():
        table = _json(index, {"weight_map": {str: FILE_NAME}})["weight_map"]
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


def _tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of tokenizer.json; None where there is none. Raises CheckpointError."""
    if (path / "vocab.json").is_file() and not (path / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"{path} has vocab.json and no {TOKENIZER_FILE}; save the tokenizer anew with transformers' AutoTokenizer, "
            "or name it with --data.tokenizer (gpt2 if it is GPT-2's)."
        )
    try:
        return get_tokenizer(str(path / TOKENIZER_FILE)) if (path / TOKENIZER_FILE).is_file() else None
    except DataError as error:
        raise CheckpointError(str(error)) from None


# ---- out


def export(source: Export, out: Path, dtype: str = "fp32", max_shard: int = MAX_SHARD) -> None:
    """Write the folder `out`, which transformers' Auto classes load. It appears complete or not at all.

    Memory: one shard. Raises ConfigError if `out` is not empty, or the family has no form there.
    """
    family = family_of(source.model, "Hugging Face's format")
    with appearing(out) as folder:
        folder.mkdir()
        _write_json(folder / "config.json", _config(source, family, dtype))
        start, ends = source.tokenizer.eot, source.tokenizer.ends
        stop = {"bos_token_id": start, "eos_token_id": ends[0] if len(ends) == 1 else list(ends)}
        _write_json(folder / "generation_config.json", stop)
        write_tokenizer(source.tokenizer, source.model.max_T, folder)
        _write_shards(source, family, folder, DTYPES[dtype], max_shard)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(source: Export, family: Family, dtype: str) -> dict[str, Any]:
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return {
        **family.config(source.model),
        "initializer_range": 0.02, "bos_token_id": source.tokenizer.eot, "eos_token_id": source.tokenizer.ends[0],
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


def write_tokenizer(tokenizer: Tokenizer, max_T: int, folder: Path) -> None:
    """tokenizer.json and its configuration. Ids equal daybreak's for every text."""
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_json(), encoding="utf-8")
    start, end = (tokenizer.token_bytes(i).decode().strip() for i in (tokenizer.eot, tokenizer.ends[0]))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end,
        "clean_up_tokenization_spaces": False, "model_max_length": max_T,
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", settings)
