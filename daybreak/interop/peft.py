"""Adapters (LoRA) as PEFT's folders hold them, both ways: adapter_config.json and adapter_model.safetensors.

PEFT has an adapter for each of its linear layers, and so do we for each part of a packed one. The layer that we call
part `q` of `h.0.qkv` is `model.layers.0.self_attn.q_proj` there, and its adapter has two tensors:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (r, in)      rows 0 to r - 1 of our h.0.qkv_A
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight (out, r)     its rows of our h.0.qkv_B

The names of layers are those of families/. PEFT's folder has no weights of the model itself: it names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.checked import FLAG, NUMBER, TEXT, WHOLE, read_json
from daybreak.config_keys import LoraConfig
from daybreak.data.chat import TEMPLATE_FILE, template_text
from daybreak.data.tokenizer import listed_ends
from daybreak.errors import CheckpointError, ConfigError
from daybreak.formatting import quoted
from daybreak.interop.families import family_of
from daybreak.interop.huggingface import write_json, write_tokenizer
from daybreak.interop.source import DTYPES, Export, Source, appearing, finite
from daybreak.manifest import kept_files
from daybreak.models.adapters import Adapter, adapters_of, layer_parts
from daybreak.models.registry import build_model
from daybreak.shapes import Shape
from daybreak.state.safetensors_io import SafetensorsFile, write_safetensors

CONFIG, TENSORS, BEFORE = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
GENERATION = "generation_config.json"
READ = {"peft_type": TEXT, "base_model_name_or_path": TEXT, "r": WHOLE, "lora_alpha": NUMBER, "use_rslora?": FLAG}
# Keys that ask for another computation, unless they are absent, null, false or empty.
OTHERS = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "modules_to_save",
          "alora_invocation_tokens", "target_parameters", "layer_replication", "trainable_token_indices",
          "arrow_config", "kasa_config", "monteclora_config", "velora_config")  # fmt: skip
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the model's own weights too


def _layers(shape: Shape) -> Iterator[tuple[str, str, str]]:
    """Of each part of each linear layer: its name (h.0.q), its packed layer (h.0.qkv), and PEFT's name of it."""
    family, model = family_of(shape, "PEFT's format"), build_model(shape)
    for row in model.rows():
        if "." in row.name and len(row.shape) == 2:
            theirs = family.parts(shape, row.name, row.shape[0])
            for name, part in zip(layer_parts(row, model.parts), theirs, strict=True):
                yield name, row.name[:-1], family.prefix + part.name.removesuffix(".weight")


# ---- out


def export(source: Export, out: Path, dtype: str = "fp32") -> None:
    """Write the folder `out` with a run's adapters, which PEFT loads beside the model that they belong to. It appears
    complete or not at all. Raises ConfigError if the run has none, or `out` is not empty."""
    lora, adapters = source.checkpoint.lora, source.weights.adapters
    if not adapters:
        raise ConfigError(f"{source.checkpoint.path.parents[1]} has no adapters; use --to hf for all of its weights.")
    tensors, modules = dict[str, Tensor](), set[str]()
    for name, layer, theirs in _layers(source.model):
        adapter = adapters.get(layer)
        if adapter is None or name not in adapter.parts:
            continue
        modules.add(theirs)
        down, up = source.weights.adapter(layer)
        sizes = [stop - first for first, stop in adapter.columns]
        for letter, each in (("A", torch.split(down, lora.rank)), ("B", torch.split(up, sizes))):
            value = each[adapter.parts.index(name)].to(DTYPES[dtype]).contiguous()
            tensors[f"{BEFORE}{theirs}.lora_{letter}.weight"] = value
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": source.came_from,
        "r": lora.rank, "lora_alpha": lora.alpha or 2 * lora.rank, "use_rslora": lora.rslora, "lora_dropout": 0.0,
        "target_modules": sorted(_short(modules, source.model)), "bias": "none", "inference_mode": True,
        "fan_in_fan_out": source.model.arch == "gpt2", "modules_to_save": None,
    }  # fmt: skip
    with appearing(out) as folder:
        folder.mkdir()
        write_json(folder / CONFIG, config)
        write_safetensors(folder / TENSORS, tensors, {"format": "pt"})
        write_tokenizer(source.tokenizer, source.model.max_T, folder, source.kept)


def _short(chosen: set[str], shape: Shape) -> set[str]:
    """Layers by their last words, as people write them, if these mean no others too; else by their whole names."""
    words = {name.rpartition(".")[2] for name in chosen}
    meant = {theirs for _, _, theirs in _layers(shape) if theirs.rpartition(".")[2] in words}
    return words if meant == chosen else chosen


# ---- in


def open_folder(path: Path, base: Source) -> Source:
    """The model `base` with the adapters in a folder of PEFT's, and with its chat template and ends, if it has them.
    Raises CheckpointError for what we cannot compute."""
    lora, adapters, read = read_adapters(path, base.model)
    both = lambda name: read(name) if name[:-2] in adapters else base.read(name)  # noqa: E731
    own, ends, kept = kept_files(path), listed_ends(path), dict(base.kept)
    if template := template_text(own):
        kept |= own | {TEMPLATE_FILE: template}
    tokenizer = base.tokenizer.ending([*ends, *base.tokenizer.ends])
    if ends:  # a run has its own from this file
        kept[GENERATION] = json.dumps(json.loads(kept.get(GENERATION, "{}")) | {"eos_token_id": list(tokenizer.ends)})
    return replace(base, path=path, read=both, lora=lora, base=str(base.path), kept=kept, tokenizer=tokenizer)


def read_adapters(path: Path, shape: Shape) -> tuple[LoraConfig, dict[str, Adapter], Callable[[str], Tensor]]:
    """The adapters in a folder of PEFT's for a model of this shape: their settings, those of each layer, and their
    tensors by our names. Raises CheckpointError for what we cannot compute."""
    lora = lora_of(path)
    file, places = SafetensorsFile(path / TENSORS), {theirs: name for name, _, theirs in _layers(shape)}
    keys = {f"{BEFORE}{theirs}.lora_{letter}.weight": name for theirs, name in places.items() for letter in "AB"}
    if odd := next((key for key in file.entries if key not in keys), None):
        raise CheckpointError(f"{path} has more than adapters of linear layers: daybreak has no place for {odd!r}.")
    chosen = dict.fromkeys(keys[key] for key in file.entries)
    if not chosen:
        raise CheckpointError(f"{path / TENSORS} has no adapter of a linear layer; copy the adapter again.")
    lora = replace(lora, targets=",".join(_targets(list(chosen), shape.L)))
    model = build_model(shape)
    adapters, theirs = adapters_of(model.rows(), model.parts, lora), {name: key for key, name in places.items()}
    widths = {row.name[:-1]: row.shape[1] for row in model.rows() if len(row.shape) == 2}

    def read(name: str) -> Tensor:
        adapter = adapters[name[:-2]]
        sizes = [lora.rank if name[-1] == "A" else stop - first for first, stop in adapter.columns]
        width = widths[name[:-2]] if name[-1] == "A" else lora.rank
        found = []
        for part, rows in zip(adapter.parts, sizes, strict=True):
            key = f"{BEFORE}{theirs[part]}.lora_{name[-1]}.weight"
            if key not in file.entries or file.entries[key].shape != (rows, width):
                has = file.entries[key].shape if key in file.entries else "missing"
                said = f"{key!r} is {has}, and the model with r = {lora.rank} needs {rows, width}"
                raise CheckpointError(f"{path / TENSORS}: {said}; copy the adapter again.")
            found.append(torch.empty(rows, width, dtype=file.entries[key].dtype))
            file.read(key, found[-1])
            finite(found[-1], path, key)
        return torch.cat(found)

    for name in adapters:
        read(name + "_A"), read(name + "_B")  # so that what is missing is said at once
    return lora, adapters, read


def base_of(path: Path) -> str:
    """The model that an adapter belongs to, as its folder names it: from here or from beside it, or on the Hub."""
    said = str(_config(path)["base_model_name_or_path"])
    found = Path(said) if Path(said).is_dir() else path.parent / said
    if fix := unreadable(said):
        raise CheckpointError(f"{path / CONFIG}: {fix}")
    if (found / CONFIG).is_file():
        raise CheckpointError(f"{path / CONFIG}: its model, {said}, is an adapter too; merge that one into its model.")
    return str(found) if found.is_dir() else said


def unreadable(model: str) -> str:
    """The advice if an adapter's model is a checkpoint of a run, which PEFT and `import` cannot open; else ""."""
    if not (at := re.fullmatch(r"(.+)/checkpoints/step-0*([0-9]+)", model)):
        return ""
    command = f"daybreak export {quoted(at[1])} --step {at[2]} --to hf OUT"
    return f"its model is a run's checkpoint; write it with `{command}`, and give OUT as base_model_name_or_path."


def _config(path: Path) -> dict[str, Any]:
    return dict(read_json(path / CONFIG, READ, CheckpointError, "copy the adapter again"))


def lora_of(path: Path) -> LoraConfig:
    """Rank, alpha and kind of scale. Raises CheckpointError for kinds of adapters that compute something else."""
    c = _config(path)
    if c["peft_type"] != "LORA" or c.get("bias", "none") != "none":
        said = f"peft_type = {c['peft_type']!r} and bias = {c.get('bias')!r}"
        raise CheckpointError(f"{path / CONFIG}: {said} are not supported; daybreak computes LORA with bias none.")
    if odd := next((key for key in OTHERS if c.get(key)), None):
        raise CheckpointError(f"{path / CONFIG}: {odd} = {c[odd]!r} is not supported; daybreak computes plain LoRA.")
    if (start := c.get("init_lora_weights")) not in STARTS:
        raise CheckpointError(f"{path / CONFIG}: init_lora_weights = {start!r} also changes the model; not supported.")
    if not c["r"] or not c["lora_alpha"] > 0:
        raise CheckpointError(f"{path / CONFIG}: r and lora_alpha must be above 0.")
    return LoraConfig(c["r"], float(c["lora_alpha"]), "*", c.get("use_rslora", False))


def _targets(names: list[str], L: int) -> list[str]:
    """Patterns of lora.targets that fit just these parts."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return list(leaves) if len(names) == L * len(leaves) else names
