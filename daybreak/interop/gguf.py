"""GGUF, llama.cpp's format, through the `gguf` package: for llama.cpp and everything built on it.

The names and layouts of a family are in families.py. One-dimensional tensors, and matrices that its table names, stay
fp32, as llama.cpp's own converter leaves them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daybreak.data.formats import extra
from daybreak.errors import ConfigError
from daybreak.interop.families import Family, family_of
from daybreak.interop.gguf_vocabulary import write_vocabulary
from daybreak.interop.source import Export, appearing

Q8_BLOCK = 32  # values that share a scale


def export(source: Export, out: Path, dtype: str = "f32") -> None:
    """Write the file `out`, which appears complete or not at all. Memory: the file's tensors.

    Raises ConfigError without the `gguf` package, for rows that Q8_0 cannot divide into blocks, or if `out` exists.
    """
    gguf = extra("gguf", "gguf", "--to gguf")
    if dtype == "q8_0" and source.model.C % Q8_BLOCK:
        raise ConfigError(f"--dtype q8_0 needs model.C to be a multiple of {Q8_BLOCK}, not {source.model.C}; use f16.")
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    family = family_of(source.model, "GGUF")
    with appearing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, family.gguf)
        _describe(
            writer, source, family, gguf, gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"]
        )
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.gguf.upper()], source.model.L)
        for name, shape in source.shapes.items():
            x = source.read(name)
            of = kind if len(shape) == 2 and name not in family.gguf_plain else gguf.GGMLQuantizationType.F32
            for part in family.parts(source.model, name, len(x)):
                data = gguf.quants.quantize(x[part.rows].numpy(), of)
                usual = names.get_name(family.prefix + part.name, (".weight", ".bias"))
                for theirs in (usual, *(copy for copy, ours in family.gguf_copies.items() if ours == name)):
                    writer.add_tensor(theirs, data, raw_dtype=of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _describe(writer: Any, source: Export, family: Family, gguf: Any, file_type: Any) -> None:
    c, tokenizer = source.model, source.tokenizer
    for key, value in family.gguf_keys(c).items():
        getattr(writer, f"add_{key}")(value)
    writer.add_file_type(file_type)
    write_vocabulary(writer, tokenizer, c.V, gguf.TokenType)
