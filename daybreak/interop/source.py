"""A model from outside: its shape, its tensors by daybreak's names, and the run folder that is made of them.

Also what all formats share: the parameters' order, whose tokenizer a vocabulary is, and folders that appear whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.checked import TEXT, read_json
from daybreak.config import Config
from daybreak.config_keys import LoraConfig
from daybreak.data.chat import Template
from daybreak.data.pictures import CODEC_FILE
from daybreak.data.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer
from daybreak.errors import CheckpointError, ConfigError, Error, explained
from daybreak.files import fsync_folder, remove, temporary_of, write_atomic
from daybreak.formatting import quoted
from daybreak.kernels.guard import WINDOW
from daybreak.models.adapters import adapter_rows, adapters_of, is_adapter
from daybreak.models.registry import build_model
from daybreak.models.rows import Row
from daybreak.shapes import Shape
from daybreak.state.checkpoint import Checkpoint, Snapshot, save_checkpoint
from daybreak.state.merged import Merged
from daybreak.state.run_folder import ORIGIN, RunFolder

LONGEST = 8192  # batch.T of a model that could compute longer sequences, unless another is given: memory grows with it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Layout = list[tuple[str, int, tuple[int, ...]]]  # name, first element in a flat buffer, shape


def _placed(rows: list[Row]) -> Layout:
    """The rows one after the other."""
    starts = accumulate((row.numel for row in rows), initial=0)
    return [(row.name, start, row.shape) for row, start in zip(rows, starts, strict=False)]


def layout(cfg: Shape) -> Layout:
    """(daybreak's name, first element, shape) of every parameter in llm.c's order: all layers of one, then the next."""
    kinds: dict[str, list[Row]] = {}
    for row in build_model(cfg).rows():
        kinds.setdefault(row.name.rpartition(".")[2], []).append(row)
    return _placed([row for kind in kinds.values() for row in kind])


@dataclass(frozen=True)
class Source:
    """Weights, and where they come with it optimizer state, read from other programs' files.

    read: a tensor in daybreak's layout (out, in), any float dtype, by daybreak's name; wte has Vp rows.
    optimizer: "m" and "v" -> ranges of a flat buffer in `layout`'s order as (first element, 1-D tensor); empty: zeros.
    kept: texts of files that stay with the model, by name (see manifest.KEPT).
    lora: its adapters, whose tensors `read` has too. base: where the model without them is.
    """

    path: Path
    model: Shape
    tokenizer: Tokenizer
    read: Callable[[str], Tensor]
    step: int = 0
    optimizer: Mapping[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)
    base: str = ""

    def __post_init__(self) -> None:
        if self.tokenizer.V > self.model.V:
            raise ConfigError(
                f"tokenizer {self.tokenizer.name!r} has {self.tokenizer.V} ids, but {self.path} only {self.model.V}; "
                f"name the right one: daybreak import {quoted(self.path)} --data.tokenizer FILE."
            )

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The entries of a checkpoint's manifest about the tokenizer."""
        return {"tokenizer": {"name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint}}

    def names(self) -> list[str]:
        """Names of all parameters."""
        return [name for name, _, _ in [*layout(self.model), *self.adapter_layout()]]

    def adapter_layout(self) -> Layout:
        """As `layout`, of its adapters."""
        model = build_model(self.model)
        rows = adapter_rows(model.rows(), adapters_of(model.rows(), model.parts, self.lora), self.lora.rank)
        return _placed([row for row in rows if is_adapter(row.name)])

    def read_model(self, name: str, out: Tensor) -> None:
        """Copy a tensor into `out` of the same shape, any float dtype, any device."""
        value = self.read(name)
        if value.shape != out.shape:
            raise CheckpointError(
                f"{self.path}: {name!r} has shape {tuple(value.shape)}, the model to train {tuple(out.shape)}; "
                "choose the shape that these weights have."
            )
        out.copy_(value)


def with_model(config: Config, source: Source) -> Config:
    """The configuration with this model; batch.T is at most LONGEST if it does not say another."""
    T = config.batch.T or (LONGEST if source.model.max_T > LONGEST else 0)
    return replace(config, model=source.model, lora=source.lora).override({"batch.T": T})


def make_run(source: Source, config: Config, *, into: Path | None = None) -> Path:
    """A run folder (config.run.dir / run.name) that training continues: one checkpoint at the source's step.

    Its data fingerprint is empty: any data will do for its first step. `into`: an existing folder to use instead.
    Raises ConfigError when the run exists.
    """
    config = with_model(config, source).override({"data.tokenizer": source.tokenizer.name})
    config.check()
    if into is None:
        folder = RunFolder(Path(config.run.dir) / config.run.name)
        folder.check_free()
        with appearing(folder.path) as made:  # whole or not at all, whatever stops us
            make_run(source, config, into=made)
        return folder.path
    folder = RunFolder(into)
    into.mkdir(exist_ok=True)
    folder.check_links()
    folder.keep_id()
    folder.write_env()
    for key, ranges in source.optimizer.items():
        for _, values in ranges:
            finite(values, source.path, f"optimizer state {key}")
    table = source.adapter_layout() or layout(source.model)  # of what is trainable
    numel = table[-1][1] + prod(table[-1][2])
    zeros = [(0, torch.zeros(numel))]
    manifest = {
        **source.manifest,
        "config": dict(config.items()), "run": folder.id, "seed": config.run.seed, "compute": "", "kernels": {},
        "samples": config.tokens_between(0, source.step) // config.T, "skips_in_a_row": 0, "data": {"fingerprint": ""},
    }  # fmt: skip
    model = {name: source.read(name).contiguous() for name in source.names()}
    snapshot = Snapshot(
        step=source.step, model=model, flat_numel=numel, layout=table, manifest=manifest,
        optimizer={key: source.optimizer.get(key, zeros) for key in ("m", "v")},
        extra={"windows": torch.zeros(2, WINDOW, dtype=torch.float64), "counts": torch.zeros(2, dtype=torch.int64)},
        parts=lambda name: [(0, model[name].view(-1))],
    )  # fmt: skip
    write_atomic(folder.config, config.to_toml())
    if source.tokenizer.source:
        write_atomic(folder.path / TOKENIZER_FILE, source.tokenizer.source)
    if source.tokenizer.pictures:
        shutil.copyfile(Path(source.base or source.path) / CODEC_FILE, folder.path / CODEC_FILE)
    for name, text in source.kept.items():
        write_atomic(folder.path / name, text)
    if source.base:
        write_atomic(folder.path / ORIGIN, json.dumps({"from": source.base}) + "\n")
    write_atomic(folder.path / "imported.json", json.dumps({"from": source.path.name, "step": source.step}) + "\n")
    save_checkpoint(folder.checkpoints, snapshot)  # last: in a folder of llm.c's it says that the rest is there
    return folder.path


class Export:
    """A checkpoint as writers of other formats want it: shape, tokenizer, tensors one at a time.

    Where positions are parameters, its max_T is the T of training: no verb of daybreak computes longer sequences, and
    later positions may never have been trained. whole: the checkpoint's own max_T.
    """

    def __init__(self, checkpoint: Checkpoint, whole: bool = False) -> None:
        self.checkpoint, self.weights, self.step = checkpoint, Merged(checkpoint), checkpoint.step
        full, T = checkpoint.model, checkpoint.manifest["config"].get("batch.T")
        short = full if whole or not T else replace(full, max_T=T)
        self.shapes, self._stored = ({name: shape for name, _, shape in layout(cfg)} for cfg in (short, full))
        self.model = full if self.shapes == self._stored else short
        self.run = checkpoint.path.parents[1]
        self.came_from = came_from(self.run)
        self.kept = checkpoint.kept
        self.tokenizer: Tokenizer = get_tokenizer(checkpoint.manifest["tokenizer"]["name"], self.run)
        template = Template.of(self.kept, self.run, self.tokenizer)
        self.end_of_turn = template.end_of_turn(self.tokenizer) if template else None
        if self.end_of_turn is not None:  # a base model's own ends lack it, and generation would never stop
            self.tokenizer = self.tokenizer.ending((*self.tokenizer.ends, self.end_of_turn))
        self._offsets = {name: start for name, start, _ in checkpoint.layout}

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter in daybreak's layout, rounded to nearest."""
        out = torch.empty(self._stored[name])
        self.weights.read_model(name, out)
        return out[: self.shapes[name][0]].to(dtype)

    def read_moment(self, key: str, name: str, start: int, count: int) -> Tensor:
        """`count` elements from the `start`-th on of a parameter's "m" or "v", fp32; zeros for one that is frozen."""
        out = torch.zeros(count)
        if name in self._offsets:
            self.checkpoint.read_optimizer(key, self._offsets[name] + start, out)
        return out


def came_from(run: Path) -> str:
    """The weights that a run began with, as its folder notes; "" if it began with random ones. A model of the Hub by
    its name."""
    if not (run / ORIGIN).is_file():
        return ""
    said = str(read_json(run / ORIGIN, {"from": TEXT}, CheckpointError, "remove it")["from"])
    hub = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", said)
    return f"{hub[1]}/{hub[2]}" if hub else said


def default_tokenizer(cfg: Shape, given: str, where: Path) -> Tokenizer:
    """The tokenizer called `given`, or GPT-2's where the vocabulary has its size. ConfigError if neither is there."""
    if not given and cfg.V not in (50257, 50304):
        said = f"{where} does not say which tokenizer its {cfg.V} ids are of"
        raise ConfigError(f"{said}; name it: daybreak import {quoted(where)} --data.tokenizer FILE.")
    return get_tokenizer(given or "gpt2", where)


def checked_shape(path: Path, cfg: Shape) -> Shape:
    """The shape that a file describes. CheckpointError if there can be no such model."""
    try:
        cfg.check()
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that daybreak cannot compute: {error}") from None
    return cfg


def finite(x: Tensor, path: Path, name: str) -> Tensor:
    """x as it is. CheckpointError if one of its values is NaN or infinite."""
    if not torch.isfinite(x).all():
        raise CheckpointError(f"{path}: {name!r} has values that are NaN or infinite; give a model that computes.")
    return x


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place when the block ends well and vanishes when it does not.

    Raises ConfigError when there is a non-empty `path` already, Error when the disk refuses.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} exists already; choose another name, or remove it.")
    temporary = temporary_of(path)
    try:
        with explained(Error, f"{path} could not be written", "free space or choose another place"):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        remove(temporary)
