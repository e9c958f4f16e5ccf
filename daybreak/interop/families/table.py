"""A family's table of names, and how it is used in both directions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

from torch import Tensor

from daybreak.errors import CheckpointError
from daybreak.interop.part import Part
from daybreak.shapes import Shape, model_config

OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")  # keys that GGUF files may lack


@dataclass(frozen=True)
class Family:
    """The table of one family. One that differs in more than names overrides methods."""

    arch: str  # ours
    model_type: str  # theirs
    architecture: str  # transformers' class
    prefix: str  # of tensor names; some files leave it out
    layer: str  # before the names of layer {}
    names: Mapping[str, tuple[str, ...]]  # our last word -> their tensors, inside `layer` or the whole model
    sizes: Mapping[str, tuple[str, int | None]]  # our key -> config.json's and its default there
    arithmetic: Mapping[str, tuple[Any, ...]]  # key of config.json -> values that we compute, the default first
    written: Mapping[str, Any]  # further keys of a config.json of ours
    aliases: Mapping[str, str] = field(default_factory=dict)  # transformers' other names of keys -> the key
    padded: Collection[str] = ("wte",)  # parameters with a row for every id, which theirs do not pad
    transposed: Collection[str] = ()
    copies: Mapping[str, str] = field(default_factory=dict)  # tensors that some files have -> what they repeat, ours
    fp32: Collection[str] = ()  # scalars that stay in fp32 in files of any dtype
    code: str = ""  # the file with the model's code for transformers, if it has no such model itself
    ignored: tuple[str, ...] = ()  # endings of tensors without learned values
    gguf: str = ""  # llama.cpp's architecture, if it has this family
    gguf_keys: Mapping[str, str] = field(default_factory=dict)  # key of GGUF -> config.json's with this value
    gguf_plain: Collection[str] = ()  # matrices that stay fp32 in GGUF
    gguf_copies: Mapping[str, str] = field(default_factory=dict)  # further tensors of GGUF -> what they repeat, ours

    def shape(self, path: Path, config: Mapping[str, Any]) -> Shape:
        """The shape that config.json, read from `path`, describes. CheckpointError for another arithmetic than ours."""
        return model_config({"arch": self.arch, **self.sizes_of(path, self.checked(path, config))})

    def checked(self, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
        """The same configuration without aliases, and with values that we compute. Raises CheckpointError."""
        if config.get("quantization_config"):
            raise CheckpointError(f"{path}: quantization_config is not supported; give weights in fp32, bf16 or fp16.")
        config = dict(config)
        for alias, key in self.aliases.items():
            if alias in config and config.setdefault(key, config[alias]) != config[alias]:
                both = f"{alias} = {config[alias]!r} and {key} = {config[key]!r}"
                raise CheckpointError(f"{path}: {both} are two names of one value; remove the wrong one.")
        for key, values in self.arithmetic.items():
            if (value := config.get(key, values[0])) not in values:
                known = " or ".join(map(repr, values))
                raise CheckpointError(f"{path}: {key} = {short(value)} is not supported; daybreak computes {known}.")
        return config

    def sizes_of(self, path: Path, config: Mapping[str, Any]) -> dict[str, int]:
        """Our keys that `sizes` names. Raises CheckpointError."""
        known = dict(self.sizes.values()) | dict(config)
        return {ours: whole(path, known, key) for ours, (key, _) in self.sizes.items()}

    def config(self, shape: Shape) -> dict[str, Any]:
        """The keys of config.json for a shape."""
        kept = {key: values[0] for key, values in self.arithmetic.items()}
        sizes = {key: getattr(shape, ours) for ours, (key, _) in self.sizes.items()}
        names = {"architectures": [self.architecture], "model_type": self.model_type}
        return {**names, **kept, **sizes, **self.written}

    def parts(self, shape: Shape, name: str, rows: int) -> list[Part]:
        """The tensors of one of our parameters, which has so many rows, without their prefix."""
        head, _, leaf = name.rpartition(".")
        before, each = self.layer.format(head.rpartition(".")[2]) if head else "", self.rows_of_each(shape, leaf, rows)
        return [Part(before + n, r, leaf in self.transposed) for n, r in zip(self.names[leaf], each, strict=True)]

    def rows_of_each(self, shape: Shape, leaf: str, rows: int) -> Sequence[slice | Tensor]:
        """Which of a parameter's rows each of its tensors holds, in their order. A family overrides it where one of our
        parameters is several tensors of theirs, or has its rows in another order."""
        return [slice(min(rows, shape.V) if leaf in self.padded else rows)]

    def holds(self, shape: Shape) -> bool:
        """Whether config.json can say all of a shape: reading what is written gives the shape again."""
        return shape.arch == self.arch and self.shape(Path(), self.config(shape)) == shape

    def gguf_parts(self, shape: Shape, name: str, rows: int) -> list[Part]:
        """As `parts`, with the rows as llama.cpp orders them. It transposes nothing."""
        return [replace(part, transposed=False) for part in self.parts(shape, name, rows)]

    def gguf_plus(self, name: str) -> float:
        """The number that GGUF adds to the values of one of our parameters."""
        return 0.0

    def gguf_config(self, shape: Shape) -> dict[str, Any]:
        """GGUF's metadata of a shape, by names without the architecture. ConfigError if llama.cpp computes another."""
        config = self.config(shape)
        return {key: config[name] for key, name in self.gguf_keys.items()}

    def gguf_tensors(self, shape: Shape) -> dict[str, Tensor]:
        """Further tensors that are computed from the shape."""
        return {}

    def from_gguf(self, path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """config.json's keys from those of a GGUF file, and from its small tensors. Raises CheckpointError."""
        for key in self.gguf_keys:
            if key not in keys and key not in OPTIONAL:
                raise CheckpointError(f"{path} lacks the key {self.gguf}.{key}; convert the model again.")
        return {name: plain(keys[key]) for key, name in self.gguf_keys.items() if key in keys}


def number(path: Path, values: Mapping[str, Any], key: str) -> float:
    """values[key], a number above 0. Raises CheckpointError."""
    x: Any = values.get(key)
    if type(x) not in (int, float) or not 0 < x < 1e300:
        raise CheckpointError(f"{path}: {key} = {short(x)} must be a number above 0.")
    return float(x)


def whole(path: Path, values: Mapping[str, Any], key: str, least: int = 1) -> int:
    """values[key], a whole number of at least `least`. Raises CheckpointError."""
    if type(x := values.get(key)) is not int or x < least:
        raise CheckpointError(f"{path}: {key} = {short(x)} must be a whole number above {least - 1}.")
    return x


def plain(value: Any) -> Any:
    """A number of a file that stores fp32, as people write it: 1e-05 and not 9.999999747378752e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
