"""Hugging Face's GPT2LMHeadModel, both ways: config, generation config, tokenizer files, safetensors shards.

Its linear layers are Conv1D, weights (in, out): transposed on the way. The head is tied, so wte is written once.
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
from daybreak.shapes import GPT2Config, Shape
from daybreak.state.safetensors_io import Entry, SafetensorsFile, write_safetensors

# daybreak's name of a tensor -> theirs. Those of CONV1D are stored (in, out).
LAYER = {
    "ln1w": "ln_1.weight", "ln1b": "ln_1.bias", "qkvw": "attn.c_attn.weight", "qkvb": "attn.c_attn.bias",
    "attprojw": "attn.c_proj.weight", "attprojb": "attn.c_proj.bias", "ln2w": "ln_2.weight", "ln2b": "ln_2.bias",
    "fcw": "mlp.c_fc.weight", "fcb": "mlp.c_fc.bias", "fcprojw": "mlp.c_proj.weight", "fcprojb": "mlp.c_proj.bias",
}  # fmt: skip
WHOLE = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
CONV1D = ("qkvw", "attprojw", "fcw", "fcprojw")
BUFFERS = ("attn.bias", "attn.masked_bias")  # causal masks that old versions stored
MAX_SHARD = 5_000_000_000  # bytes
# What the arithmetic rests on: key of config.json -> values that daybreak computes; the first is the key's default.
ARITHMETIC: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}  # fmt: skip
SIZES = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
FINGERPRINT = "daybreak_tokenizer_fingerprint"  # a key of config.json that others ignore
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "vocab.json"]


def their_name(name: str) -> str:
    """Hugging Face's name of a parameter, without `transformer.`."""
    head, _, leaf = name.rpartition(".")
    return f"{head}.{LAYER[leaf]}" if head else WHOLE[name]


def _is_conv1d(name: str) -> bool:
    return name.rpartition(".")[2] in CONV1D


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
    """The GPT-2 in a folder of Hugging Face's format; tensors are read when asked for.

    Raises CheckpointError naming the file and what of it daybreak cannot use.
    """
    cfg = _shape(path / "config.json")
    files = _tensor_files(path)
    if len(files) < cfg.L:
        raise CheckpointError(f"{path / 'config.json'}: n_layer = {cfg.L}, but there are {len(files)} tensors in all.")
    prefix = "transformer." if any(key.startswith("transformer.") for key in files) else ""
    wanted = {prefix + their_name(name): (name, shape) for name, _, shape in layout(cfg)}
    for key in files:
        if key not in wanted and key != "lm_head.weight" and not key.endswith(BUFFERS):
            raise CheckpointError(
                f"{path} is not a plain GPT-2: it has a tensor {key!r}; only GPT2LMHeadModel is read."
            )
    for key, (name, shape) in wanted.items():
        if key not in files:
            raise CheckpointError(f"{path} lacks the tensor {key!r}; copy the model again.")
        theirs = (cfg.V, cfg.C) if name == "wte" else shape[::-1] if _is_conv1d(name) else shape
        if files[key][1].shape != theirs:
            raise CheckpointError(f"{path}: {key!r} has shape {files[key][1].shape}, its config.json says {theirs}.")

    def raw(key: str) -> Tensor:
        file, entry = files[key]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        file.read(key, out)
        return out

    def read(name: str) -> Tensor:
        x = raw(prefix + their_name(name))
        if name == "wte":
            return torch.cat([x, x.new_zeros(cfg.Vp - cfg.V, cfg.C)])
        return x.T.contiguous() if _is_conv1d(name) else x

    if "lm_head.weight" in files and not torch.equal(raw("lm_head.weight"), raw(prefix + WHOLE["wte"])):
        raise CheckpointError(f"{path}: lm_head.weight differs from wte; an untied head is not supported.")
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


def _shape(path: Path) -> Shape:
    config = _json(path)
    for key, values in ARITHMETIC.items():
        if config.get(key, values[0]) not in values or (key == "model_type" and key not in config):
            known = " or ".join(repr(v) for v in values)
            raise CheckpointError(f"{path}: {key} = {config.get(key)!r} is not supported; daybreak computes {known}.")
    sizes = {key: config.get(key, default) for key, default in SIZES.items()}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {key} = {value!r} must be a whole number above 0.")
    L, C, NH, max_T, V = sizes.values()
    if config.get("n_inner") not in (None, 4 * C):
        raise CheckpointError(f"{path}: n_inner = {config['n_inner']!r} is not supported; it must be 4 * n_embd.")
    return checked_shape(path, GPT2Config(L=L, C=C, NH=NH, max_T=max_T, V=V))


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

    Memory: one shard. Raises ConfigError if `out` is not empty.
    """
    with appearing(out) as folder:
        folder.mkdir()
        _write_json(folder / "config.json", _config(source, dtype))
        eot = source.tokenizer.eot
        _write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
        write_tokenizer(source.tokenizer, source.model.max_T, folder)
        _write_shards(source, folder, DTYPES[dtype], max_shard)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(source: Export, dtype: str) -> dict[str, Any]:
    c = source.model
    sizes = dict(zip(SIZES, (c.L, c.C, c.NH, c.max_T, c.V), strict=True))
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in ARITHMETIC.items()},
        **sizes,
        "n_inner": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02,
        "bos_token_id": source.tokenizer.eot, "eos_token_id": source.tokenizer.eot, "use_cache": True,
        "dtype": name, "torch_dtype": name,  # the new name of the key and the old one
        FINGERPRINT: source.tokenizer.fingerprint,
    }  # fmt: skip


def _write_shards(source: Export, folder: Path, dtype: torch.dtype, max_shard: int) -> None:
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
        part = {f"transformer.{their_name(name)}": _in_their_layout(source, name, dtype) for name in names}
        total += sum(x.nbytes for x in part.values())
        write_safetensors(folder / file, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _in_their_layout(source: Export, name: str, dtype: torch.dtype) -> Tensor:
    x = source.read(name, dtype)
    if name == "wte":
        return x[: source.model.V].contiguous()
    return x.T.contiguous() if _is_conv1d(name) else x


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
