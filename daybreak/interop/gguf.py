"""GGUF, llama.cpp's format, both ways, through the `gguf` package: for llama.cpp and everything built on it.

The names and layouts of a family are in families/. One-dimensional tensors, and matrices that its table names, are
written in fp32, as llama.cpp's own converter leaves them. Quantized tensors are read as the fp32 values they stand for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.data.chat import template_text
from daybreak.data.formats import extra
from daybreak.data.tokenizer import tokenizer_of
from daybreak.errors import CheckpointError, ConfigError
from daybreak.interop.families import FAMILIES, Family, family_of, why_not
from daybreak.interop.gguf_vocabulary import read_ends, read_special, read_vocabulary, write_vocabulary
from daybreak.interop.part import Part, reader
from daybreak.interop.source import Export, Source, appearing, checked_shape, default_tokenizer, finite, layout
from daybreak.shapes import Shape

Q8_BLOCK = 32  # values that share a scale


def export(source: Export, out: Path, dtype: str = "f32") -> None:
    """Write the file `out`, which appears complete or not at all. Memory: the file's tensors.

    Raises ConfigError without the `gguf` package, for rows that Q8_0 cannot divide into blocks, for what llama.cpp
    computes in another way, or if `out` exists.
    """
    gguf = extra("gguf", "gguf", "--to gguf")
    family, c = family_of(source.model, "GGUF"), source.model
    config = family.gguf_config(c)
    rows = {shape[1] for name, shape in source.shapes.items() if len(shape) == 2 and name not in family.gguf_plain}
    if dtype == "q8_0" and (odd := [row for row in rows if row % Q8_BLOCK]):
        raise ConfigError(f"--dtype q8_0 needs rows of a multiple of {Q8_BLOCK}, not {min(odd)}; use f16.")
    kind, plain = gguf.GGMLQuantizationType[dtype.upper()], gguf.GGMLQuantizationType.F32
    with appearing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, family.gguf)
        writer.add_name(f"daybreak {c.arch} L{c.L} C{c.C}")
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in config.items():
            add[type(value)](f"{family.gguf}.{key}", value)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"])
        write_vocabulary(writer, source, gguf.TokenType)
        if template := template_text(source.kept):
            writer.add_chat_template(template)
        parts = _parts(gguf, family, c)
        for name, shape in source.shapes.items():
            x = source.read(name)
            x = x + plus if (plus := family.gguf_plus(name)) else x
            of = kind if len(shape) == 2 and name not in family.gguf_plain else plain
            for part, usual in parts[name]:
                data = gguf.quants.quantize(x[part.rows].numpy(), of)
                for theirs in (usual, *(copy for copy, ours in family.gguf_copies.items() if ours == name)):
                    writer.add_tensor(theirs, data, raw_dtype=of)
        for theirs, value in family.gguf_tensors(c).items():
            writer.add_tensor(theirs, value.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _parts(gguf: Any, family: Family, c: Shape) -> dict[str, list[tuple[Part, str]]]:
    """Each parameter's parts and their names in GGUF."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.gguf.upper()], c.L)
    parts = {name: family.gguf_parts(c, name, shape[0]) for name, _, shape in layout(c)}
    ends = (".weight", ".bias")
    return {n: [(part, names.get_name(family.prefix + part.name, ends)) for part in each] for n, each in parts.items()}


def open_file(path: Path, tokenizer: str = "") -> Source:
    """The model in a GGUF file; tensors are dequantized when asked for. tokenizer: a name or file instead of its own.

    Raises ConfigError without the `gguf` package, CheckpointError naming what of the file daybreak cannot use.
    """
    gguf = extra("gguf", "gguf", str(path))
    try:
        file = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in file.fields.items()}
    except Exception as error:  # whatever the package meets in a damaged file
        raise CheckpointError(f"{path} is not a readable GGUF file ({error}); copy it again.") from None
    kind, tensors = keys.get("general.architecture"), {tensor.name: tensor for tensor in file.tensors}
    known = {family.gguf: family for family in reversed(FAMILIES.values()) if family.gguf}
    if kind not in known:
        able = ", ".join(sorted(known)) + why_not(kind, keys)
        raise CheckpointError(f"{path}: general.architecture = {kind!r} is not supported; daybreak computes {able}.")
    if keys.get("split.count", 1) > 1:
        raise CheckpointError(f"{path} is one of {keys['split.count']} files; merge them by llama-gguf-split --merge.")

    def raw(name: str) -> Tensor:
        try:
            values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(f"{path}: {name!r} cannot be dequantized ({error}); give another file.") from None
        return finite(torch.from_numpy(values.copy()), path, name)

    family, found = known[kind], {name: tuple(map(int, x.shape[::-1])) for name, x in tensors.items()}
    own = {key.removeprefix(f"{kind}."): value for key, value in keys.items()}
    small = {name: raw(name) if name.startswith("rope") else torch.empty(0) for name in tensors}
    V = found.get("token_embd.weight", (0,))[0]
    cfg = checked_shape(path, family.shape(path, {**family.from_gguf(path, own, small), "vocab_size": V}))
    spare = {*family.gguf_copies, "rope_freqs.weight"}
    read = reader(path, cfg, _parts(gguf, family, cfg), found, raw, spare, "metadata")
    values = lambda name: read(name) - plus if (plus := family.gguf_plus(name)) else read(name)  # noqa: E731
    if tokenizer:
        return Source(path, cfg, default_tokenizer(cfg, tokenizer, path), values)
    vocabulary = tokenizer_of(read_vocabulary(path, keys, gguf.TokenType), str(path)).ending(read_ends(keys))
    kept = {name: json.dumps(value) for name, value in read_special(keys, vocabulary).items()}
    if template := keys.get("tokenizer.chat_template"):
        kept["chat_template.jinja"] = template
    return Source(path, cfg, vocabulary, values, kept=kept)
