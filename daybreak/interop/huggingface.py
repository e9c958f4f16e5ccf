"""Hugging Face's folders, both ways: config, generation config, tokenizer files, safetensors shards.

The names and layouts of a family are in families/.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.checked import FILE_NAME, TEXT, read_json
from daybreak.data.formats import extra
from daybreak.data.pictures import CODEC_FILE, read_metadata
from daybreak.data.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer
from daybreak.errors import CheckpointError, DataError, Error
from daybreak.files import sha256_of
from daybreak.formatting import quoted
from daybreak.interop.families import HF, Family, family_named, family_of
from daybreak.interop.part import reader
from daybreak.interop.source import DTYPES, Export, Source, appearing, checked_shape, default_tokenizer, finite, layout
from daybreak.manifest import KEPT, kept_files
from daybreak.shapes import Shape
from daybreak.state.safetensors_io import SafetensorsFile, StoredTensor, write_safetensors

CODE = Path(__file__).with_name("families")  # models' code, without the .py of our own
MAX_SHARD = 5_000_000_000  # bytes
FINGERPRINT = "daybreak_tokenizer_fingerprint"  # a key of config.json that others ignore
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
SPECIAL = ("bos_token_id", "pad_token_id", "eos_token_id")  # in config.json and in generation_config.json
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", TOKENIZER_FILE, "vocab.json", *KEPT]


# ---- in


def download(repository: str, near: str = "") -> Path:
    """Fetch a model from the hub into its cache and return its folder. near: `run_hint` of the name, for the message.
    Raises Error when that fails."""
    hub = extra("huggingface_hub", "hf", "downloading")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=FILES))
    except Exception as error:  # its own classes, and those of two HTTP libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        said = f"{repository} could not be downloaded ({reason}), and no folder has this name{near}"
        raise Error(f"{said}{' If not,' if near else ';'} check name and network, or give a folder.") from None


def open_folder(path: Path, tokenizer: str = "") -> Source:
    """The model in a folder of Hugging Face's format; tensors are read when asked for.

    Raises CheckpointError naming the file and what of it daybreak cannot use.
    """
    cfg, family = _shape(path / "config.json")
    files = _tensor_files(path)
    if len(files) < cfg.L:
        raise CheckpointError(f"{path / 'config.json'}: {cfg.L} layers, but there are {len(files)} tensors in all.")
    prefix = family.prefix if any(key.startswith(family.prefix) for key in files) else ""

    def raw(key: str) -> Tensor:
        file, entry = files[key]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        file.read(key, out)
        return finite(out, path, key)

    for copy, name in family.copies.items():
        (key,) = (prefix + same for same in family.names[name])
        if copy in files and key in files and not torch.equal(raw(copy), raw(key)):
            if not hasattr(cfg, "tied"):
                raise CheckpointError(f"{path}: {copy} differs from {name}; an untied head is not supported.")
            cfg = replace(cfg, tied=False)  # type: ignore[call-arg]  # whatever config.json says, as in transformers
    plain = {key: entry for key, (_, entry) in files.items() if not key.endswith(family.ignored)}
    if odd := next((key for key, entry in plain.items() if not entry.dtype.is_floating_point), None):
        raise CheckpointError(f"{path}: {odd!r} is {plain[odd].dtype}; give weights in fp32, bf16 or fp16.")
    parts = {n: [(part, prefix + part.name) for part in family.parts(cfg, n, s[0])] for n, _, s in layout(cfg)}
    found = {key: entry.shape for key, entry in plain.items()}
    read = reader(path, cfg, parts, found, raw, family.copies, "config.json")
    known = (None if tokenizer else _tokenizer(path)) or default_tokenizer(cfg, tokenizer, path)
    known = _with_pictures(known, path)
    made = _json(path / "config.json", {}).get(FINGERPRINT)
    if made not in (None, known.fingerprint) and not known.source:  # others may spell a tokenizer.json anew
        said = f"{path} was exported with another tokenizer than {known.name!r}"
        lost = "" if known.pictures else f"; if the model draws, copy its {CODEC_FILE} too"
        raise CheckpointError(f"{said} ({FINGERPRINT} differs){lost}.")
    return Source(path, cfg, known, read, kept={} if tokenizer else _kept(path, known))


def _kept(path: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """The files that a run keeps of a folder. Special tokens that only config.json names go with the others."""
    kept, config = kept_files(path), _json(path / "config.json", {})
    said = {key: config[key] for key in SPECIAL[:2] if type(config.get(key)) is int}
    said |= json.loads(kept.get("generation_config.json", "{}"))
    if tokenizer.ends != (tokenizer.eot,):
        said["eos_token_id"] = list(tokenizer.ends)
    if said not in ({}, {"bos_token_id": tokenizer.eot}):
        kept["generation_config.json"] = _text(said)
    return kept


def _json(path: Path, spec: dict[Any, Any]) -> dict[str, Any]:
    return dict(read_json(path, spec, CheckpointError, "copy the model again"))


def _shape(path: Path) -> tuple[Shape, Family]:
    config = _json(path, {"model_type?": TEXT})
    family = family_named(path, config)
    return checked_shape(path, family.shape(path, config)), family


def _tensor_files(path: Path) -> dict[str, tuple[SafetensorsFile, StoredTensor]]:
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
            f"or name it: daybreak import {quoted(path)} --data.tokenizer FILE (gpt2 if it is GPT-2's)."
        )
    try:
        return get_tokenizer(str(path / TOKENIZER_FILE), path) if (path / TOKENIZER_FILE).is_file() else None
    except DataError as error:
        raise CheckpointError(str(error)) from None


def _with_pictures(text: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer, with the pictures of a codec's file if the folder has one. Raises CheckpointError."""
    file = path / CODEC_FILE
    if not file.is_file():
        return text
    try:
        numbers = read_metadata(file)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    return text.with_pictures(sha256_of(file), numbers["K"], numbers["N"], numbers["D"])


# ---- out


def export(source: Export, out: Path, dtype: str = "fp32", max_shard: int = MAX_SHARD) -> None:
    """Write the folder `out`, which transformers' Auto classes load. It appears complete or not at all.

    Memory: one shard. Raises ConfigError if `out` is not empty, or the family has no form there.
    """
    family = family_of(source.model, HF)
    with appearing(out) as folder:
        folder.mkdir()
        write_tokenizer(source.tokenizer, source.model.max_T, folder, source.kept)
        said = _json(folder / "generation_config.json", {}).items()
        special = {key: i for key, i in said if key in SPECIAL and (type(i) is not int or i < source.model.V)}
        write_json(folder / "config.json", _config(source, family, dtype) | special)
        if source.tokenizer.pictures:
            shutil.copyfile(source.run / CODEC_FILE, folder / CODEC_FILE)
        if family.code:
            shutil.copyfile(CODE / f"{family.code}.txt", folder / family.code)
        _write_shards(source, family, folder, DTYPES[dtype], max_shard)


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a value as these folders have them."""
    path.write_text(_text(value), encoding="utf-8")


def _config(source: Export, family: Family, dtype: str) -> dict[str, Any]:
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return {
        "initializer_range": 0.02, "use_cache": True, **family.config(source.model),
        "bos_token_id": source.tokenizer.eot,
        "dtype": name, "torch_dtype": name,  # the new name of the key and the old one
        FINGERPRINT: source.tokenizer.fingerprint,
    }  # fmt: skip


def _write_shards(source: Export, family: Family, folder: Path, dtype: torch.dtype, max_shard: int) -> None:
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, shape in source.shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if used + size > max_shard and shards[-1] and size > 4:  # the scalars of all layers may be one tensor
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            x = source.read(name, torch.float32 if name.rpartition(".")[2] in family.fp32 else dtype)
            for part in family.parts(source.model, name, len(x)):
                key, value = family.prefix + part.name, part.theirs(x)
                tensors[key] = tensors[key] + value if key in tensors else value  # zeros but for what x holds
        total += sum(x.nbytes for x in tensors.values())
        write_safetensors(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(tokenizer: Tokenizer, max_T: int, folder: Path, kept: Mapping[str, str] | None = None) -> None:
    """tokenizer.json with its configuration, the ends of texts, and the chat template: what was `kept` of an imported
    model, else our own. Ids equal daybreak's for every text."""
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_json(), encoding="utf-8")
    eot, ends = tokenizer.eot, list(tokenizer.ends)
    start, *named = (tokenizer.token_bytes(i).decode(errors="ignore").strip() for i in (eot, *ends))
    end = next(filter(None, named))  # a part of a character has no name
    made: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {**TOKENIZER_CONFIG, "bos_token": start, "eos_token": end},
        "generation_config.json": {"bos_token_id": eot},
    }  # fmt: skip
    for name, text in (kept or {}).items():
        if name in made:
            made[name] = json.loads(text)
        else:
            (folder / name).write_text(text, encoding="utf-8")
    made["tokenizer_config.json"]["model_max_length"] = max_T
    made["generation_config.json"]["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name, value in made.items():
        write_json(folder / name, value)
