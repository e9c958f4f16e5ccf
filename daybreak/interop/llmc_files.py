"""llm.c's files, byte for byte: model .bin, optimizer state of any rank count and ZeRO stage, tokenizer, debug state.

All are little-endian and open with 256 int32. A checkpoint is a set: model_%08d.bin, a state_%08d_%05d.bin per rank,
and an empty DONE_%08d, written last. Tensors are mapped, not read: importing costs no second copy in memory.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from daybreak.config import Config
from daybreak.data.dataset import open_dataset
from daybreak.data.kinds import guess
from daybreak.data.loader import Loader
from daybreak.data.tokenizer import Tokenizer, own_tokenizers
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import CheckpointError, ConfigError, Error, explained
from daybreak.files import replacing, write_atomic
from daybreak.formatting import quoted
from daybreak.interop.source import Export, Layout, Source, appearing, checked_shape, default_tokenizer, finite, layout
from daybreak.shapes import GPT2Config, Shape

log = logging.getLogger("daybreak")

MODEL, STATE, TOKENIZER, DEBUG = 20240326, 20240527, 20240328, 20240327  # magic numbers
HEADER = 1024
VERSIONS = {3: torch.float32, 5: torch.bfloat16}
TOKENIZER_NAME = "gpt2_tokenizer.bin"
GENERATOR_BYTES = 2520  # llm.c's Mersenne Twister struct
ROUNDING_SEED, SHUFFLE_SEED = 13371337, 42  # rank r adds r
FORMATS = {3: "an fp32 model", 5: "a bf16 model"}


def model_name(step: int) -> str:
    return f"model_{step:08d}.bin"


def state_name(step: int, rank: int) -> str:
    return f"state_{step:08d}_{rank:05d}.bin"


def done_name(step: int) -> str:
    return f"DONE_{step:08d}"


def done_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, newest first."""
    found = [re.fullmatch(r"DONE_(\d+)", name) for name in (os.listdir(folder) if folder.is_dir() else [])]
    return sorted((int(m[1]) for m in found if m), reverse=True)


# ---- reading


def _refuse(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} {reason}.")


def _header(path: Path, magic: int, kind: str, versions: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    with explained(CheckpointError, f"{path} cannot be read"), open(path, "rb") as file:
        data = file.read(HEADER)
    it_is = guess(data, magic)
    if len(data) < HEADER:
        _refuse(path, f"is not {kind} of llm.c: {len(data)} bytes, shorter than the {HEADER}-byte header{it_is}")
    header = np.frombuffer(data, "<i4")
    if header[0] != magic:
        _refuse(path, f"is not {kind} of llm.c: magic number {header[0]} instead of {magic}{it_is}")
    if header[1] not in versions:
        known = " and ".join(map(str, versions))
        _refuse(path, f"has version {header[1]} of {kind}; only {known} can be read: write it again with a newer llm.c")
    return header


def _map(path: Path, dtype: torch.dtype, start: int, count: int) -> Tensor:
    """Elements of a file as a tensor over its pages (copy on write: the file never changes)."""
    raw = np.memmap(path, "<i2" if dtype == torch.bfloat16 else "<f4", "c", start, (count,))
    flat = torch.from_numpy(raw)
    return flat.view(torch.bfloat16) if dtype == torch.bfloat16 else flat


def _shape(path: Path) -> tuple[Shape, torch.dtype, int]:
    """Shape, dtype and number of parameters of a model file, everything checked."""
    header = _header(path, MODEL, "a model file", tuple(VERSIONS))
    dtype = VERSIONS[int(header[1])]
    max_T, V, L, NH, C, Vp = (int(x) for x in header[2:8])
    cfg = checked_shape(path, GPT2Config(L=L, C=C, NH=NH, max_T=max_T, V=V))
    if Vp != cfg.Vp:
        _refuse(path, f"pads its vocabulary of {V} to {Vp} instead of {cfg.Vp}")
    # Not the layout of all layers, whose length a damaged header would decide.
    one, two = (sum(prod(shape) for _, _, shape in layout(replace(cfg, L=n))) for n in (1, 2))
    count = one + (L - 1) * (two - one)
    want, size = HEADER + count * dtype.itemsize, path.stat().st_size
    if size != want:
        _refuse(path, f"has {size} bytes, {FORMATS[int(header[1])]} of its shape has {want}; copy it again")
    return cfg, dtype, count


def _views(cfg: Shape, flat: Tensor) -> dict[str, Tensor]:
    return {name: flat[start : start + prod(shape)].view(shape) for name, start, shape in layout(cfg)}


def open_model(path: Path, tokenizer: str = "") -> Source:
    """The weights of a model file (version 3 or 5). Raises CheckpointError naming what is wrong with it."""
    cfg, dtype, count = _shape(path)
    beside = path.parent / TOKENIZER_NAME
    if not tokenizer and beside.is_file():
        words = read_tokenizer(beside)
        own = (t for t in own_tokenizers(len(words)) if [t.token_bytes(i) for i in range(t.eot)] == words[:-1])
        fix = f"name it: daybreak import {quoted(path)} --data.tokenizer FILE"
        known = next(own, None) or _refuse(beside, f"has {len(words)} tokens of no tokenizer of daybreak's; {fix}")
    else:
        known = default_tokenizer(cfg, tokenizer, path)
    views = _views(cfg, _map(path, dtype, HEADER, count))
    return Source(path, cfg, known, lambda name: finite(views[name], path, name))


@dataclass(frozen=True)
class _State:
    """One rank's state file: `numel` elements of each of m, v and, if `masters`, the fp32 weights."""

    path: Path
    world: int
    rank: int
    step: int
    masters: bool
    numel: int

    def part(self, index: int) -> Tensor:
        return _map(self.path, torch.float32, HEADER + 4 * self.numel * index, self.numel)


def _open_state(path: Path, count: int) -> _State:
    header = _header(path, STATE, "an optimizer state", (1,))
    world, rank, masters, shuffle, step = (int(header[i]) for i in (2, 3, 4, 5, 10))
    if world < 1 or not 0 <= rank < world or masters not in (0, 1) or shuffle not in (0, 1) or step < 0:
        _refuse(path, f"has a header of rank {rank} of {world}, step {step}, flags {masters} and {shuffle}")
    size = path.stat().st_size
    for numel in {count, count // world} if count % world == 0 else {count}:
        end = HEADER + 4 * numel * (2 + masters)
        if size == end + _loader_bytes(path, end, shuffle):
            return _State(path, world, rank, step, bool(masters), numel)
    _refuse(path, f"has {size} bytes, which fits neither ZeRO stage 0 nor 1 of the model beside it; copy it again")


def _loader_bytes(path: Path, start: int, shuffle: int) -> int:
    """Length of the data loader's state that begins at `start`; -1 where there cannot be one."""
    if not shuffle:
        return 0
    total = 0
    with open(path, "rb") as file:
        for _ in range(2):  # the order of the shards, the order of the samples in one
            file.seek(start + total)
            field = file.read(8)
            if len(field) < 8 or (n := struct.unpack("<Q", field)[0]) > 1 << 40:
                return -1
            total += 8 + 4 * n
    return total + GENERATOR_BYTES


def open_folder(folder: Path, step: int | None = None, tokenizer: str = "") -> Source:
    """The newest checkpoint in a folder, or the one of `step`: weights (the masters where there are any), m, v, step.

    Raises ConfigError for a step that is not there, CheckpointError for files that are missing, damaged or disagree.
    """
    steps = done_steps(folder)
    if step is not None and step not in steps:
        raise ConfigError(f"{folder} has no checkpoint of step {step}; there are: {', '.join(map(str, steps))}.")
    step = steps[0] if step is None else step
    model = open_model(folder / model_name(step), tokenizer)
    cfg, rows = model.model, layout(model.model)
    count = sum(prod(shape) for _, _, shape in rows)
    first = _open_state(folder / state_name(step, 0), count)
    states = [first, *(_open_state(folder / state_name(step, rank), count) for rank in range(1, first.world))]
    for rank, s in enumerate(states):
        if (s.world, s.masters, s.numel, s.rank, s.step) != (first.world, first.masters, first.numel, rank, step):
            _refuse(
                s.path, f"is of rank {s.rank} of {s.world} at step {s.step} and does not belong to {first.path.name}"
            )
    states = states if first.numel < count else states[:1]  # ZeRO 0: every rank wrote all of it
    odd = next((name for name, _, shape in rows if prod(shape) % len(states)), None)
    if odd:
        _refuse(first.path, f"cannot be divided over {first.world} ranks: {odd!r} does not divide")
    read = partial(_master, rows, states) if first.masters else model.read
    moments = {key: _gathered(rows, states, index) for key, index in (("m", 0), ("v", 1))}
    return Source(folder, cfg, model.tokenizer, read, step, moments)


def _gathered(rows: Layout, states: list[_State], index: int) -> list[tuple[int, Tensor]]:
    """ZeRO 1: rank r has the r-th of P equal slices of every tensor of every layer, at the tensor's start / P."""
    P, flats = len(states), [state.part(index) for state in states]
    ranges = []
    for _, start, shape in rows:
        n = prod(shape) // P
        ranges += [(start + r * n, flat[start // P : start // P + n]) for r, flat in enumerate(flats)]
    return ranges


def _master(rows: Layout, states: list[_State], name: str) -> Tensor:
    row = next(row for row in rows if row[0] == name)
    return finite(torch.cat([part for _, part in _gathered([row], states, 2)]), states[0].path, name).view(row[2])


def read_tokenizer(path: Path) -> list[bytes]:
    """Every token of a tokenizer file, in order of id. Raises CheckpointError."""
    header = _header(path, TOKENIZER, "a tokenizer", (1, 2))
    data, at = path.read_bytes(), HEADER
    tokens: list[bytes] = []
    for _ in range(int(header[2])):
        n = data[at] if at < len(data) else 0
        if n == 0 or at + 1 + n > len(data):
            _refuse(path, f"ends after {len(tokens)} of its {header[2]} tokens; copy it again")
        tokens.append(data[at + 1 : at + 1 + n])
        at += 1 + n
    if at != len(data) or not tokens:
        _refuse(path, f"has {len(data)} bytes, its {header[2]} tokens take {at}; copy it again")
    return tokens


# ---- writing


def _start(file: IO[bytes], fields: Mapping[int, int]) -> None:
    header = np.zeros(256, "<i4")
    for index, value in fields.items():
        header[index] = value
    file.write(header.tobytes())


def _write(file: IO[bytes], x: Tensor) -> None:
    file.write(x.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_model(path: Path, source: Export, dtype: str = "bf16") -> None:
    """A model file: version 5 for bf16 (rounded to nearest), 3 for fp32."""
    c, version = source.model, {"fp32": 3, "bf16": 5}[dtype]
    with replacing(path) as file:
        _start(file, dict(enumerate((MODEL, version, c.max_T, c.V, c.L, c.NH, c.C, c.Vp))))
        for name in source.shapes:
            _write(file, source.read(name, VERSIONS[version]))


def write_state(path: Path, source: Export, *, rank: int, world: int, zero: int, samples: Sequence[int]) -> None:
    """One rank's optimizer state with masters, and a data loader that has read nothing.

    samples: of each training shard, at llm.c's B, T and number of processes; empty = a loader that does not shuffle.
    """
    parts = world if zero else 1
    with replacing(path) as file:
        fields = {0: STATE, 1: 1, 2: world, 3: rank, 4: 1, 5: int(bool(samples)), 10: source.step}
        seed = ROUNDING_SEED + rank
        _start(file, fields | {20: seed, 22: seed})  # u64 of which the upper halves are 0
        for key in ("m", "v", "masters"):
            for name, shape in source.shapes.items():
                n = prod(shape) // parts
                start = rank * n if zero else 0
                if key == "masters":
                    _write(file, source.read(name).view(-1)[start : start + n])
                else:
                    _write(file, source.read_moment(key, name, start, n))
        if samples:
            file.write(_fresh_loader(samples, SHUFFLE_SEED + rank))


def _fresh_loader(samples: Sequence[int], seed: int) -> bytes:
    """The permutations and the generator with which llm.c's loader begins its first epoch."""
    bits = np.random.MT19937()
    bits.state = np.random.RandomState(seed).get_state(legacy=False)  # type: ignore[assignment]

    def permutation(n: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        order = np.arange(n, dtype="<i4")
        for i in range(n - 1, 0, -1):
            j = int(bits.random_raw()) % (i + 1)
            order[i], order[j] = order[j], order[i]
        return order

    shards = permutation(len(samples))
    inside = permutation(samples[shards[0]])
    state = bits.state["state"]
    drawn = len(samples) > 1 or len(inside) > 1
    left, following = (625 - state["pos"], state["pos"]) if drawn else (1, 0)
    generator = struct.pack("<QiI", 0, left, following) + state["key"].astype("<u4").tobytes()
    return b"".join((
        struct.pack("<Q", len(shards)), shards.tobytes(), struct.pack("<Q", len(inside)), inside.tobytes(),
        generator, struct.pack("<2I", 0, 0x9908B0DF),
    ))  # fmt: skip


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """A tokenizer file, version 2."""
    with replacing(path) as file:
        _start(file, dict(enumerate((TOKENIZER, 2, tokenizer.V, tokenizer.eot))))
        for token in range(tokenizer.V):
            data = tokenizer.token_bytes(token)
            file.write(bytes([len(data)]) + data)


def write_checkpoint(
    folder: Path, source: Export, *, dtype: str = "bf16", world: int = 1, zero: int = 0, samples: Sequence[int] = ()
) -> None:
    """The whole set of a step in `folder`, DONE last, so that an interrupted writing leaves none that counts.

    Raises ConfigError for another family than GPT-2, another optimizer than AdamW, and if ZeRO 1 cannot divide the
    tensors over `world` ranks; Error when the disk refuses.
    """
    if not isinstance(source.model, GPT2Config):
        raise ConfigError(f"model.arch = {source.model.arch!r} has no form in llm.c's files, which hold GPT-2 only.")
    m = source.model
    if m != GPT2Config(L=m.L, C=m.C, NH=m.NH, max_T=m.max_T, V=m.V):
        raise ConfigError(f"llm.c cannot hold this shape: its files say only the sizes of a GPT-2 ({m.text()}).")
    if source.checkpoint.whole & source.shapes.keys():
        optim = source.checkpoint.manifest["config"].get("optim.name")
        raise ConfigError(f"llm.c trains with AdamW, and cannot hold the state of {optim}; use --to hf or --to gguf.")
    odd = next((name for name, shape in source.shapes.items() if zero and prod(shape) % world), None)
    if odd:
        raise ConfigError(f"--ranks {world} does not divide the tensor {odd!r}, as ZeRO 1 needs; use --zero 0.")
    step = source.step
    with explained(Error, f"{folder} could not be written", "free space or choose another place"):
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder / model_name(step), source, dtype)
        for rank in range(world):
            write_state(folder / state_name(step, rank), source, rank=rank, world=world, zero=zero, samples=samples)
        write_atomic(folder / done_name(step), "")


def remove_checkpoint(folder: Path, step: int) -> None:
    """Remove a step's files, DONE first: a half removed set must not count."""
    for path in (folder / done_name(step), folder / model_name(step), *folder.glob(f"state_{step:08d}_*.bin")):
        path.unlink(missing_ok=True)


def export(
    source: Export, config: Config, out: Path, dtype: str, ranks: int = 1, zero: int = 0, debug_state: bool = False
) -> None:
    """Write the folder `out`: a checkpoint that llm.c resumes from with `ranks` processes, and the tokenizer's file.

    config: the run's; its B, T and training shards decide the state of llm.c's loader.
    """
    with appearing(out) as folder:
        write_checkpoint(folder, source, dtype=dtype, world=ranks, zero=zero, samples=loader_samples(config, ranks))
        write_tokenizer(folder / TOKENIZER_NAME, source.tokenizer)
        if debug_state:
            _export_debug_state(source, config, folder / "debug_state.bin")


def loader_samples(config: Config, ranks: int) -> list[int]:
    """Samples of each training shard as llm.c counts them; empty, with a note, where its shuffling loader cannot be."""
    d, per_sample = config.data, config.batch.B * config.T * ranks
    try:
        shards = open_dataset(d.name, d.dir, d.train, d.val, d.tokenizer).train
        samples = [(shard.tokens - 1) // per_sample for shard in shards]
        if all(samples):
            return samples
        reason = f"a shard is shorter than B * T * ranks = {per_sample} tokens"
    except Error as error:
        reason = str(error).rstrip(".")
    log.info("llm.c will read its data in order from the first shard, unshuffled: %s.", reason)
    return []


def _export_debug_state(source: Export, config: Config, path: Path) -> None:
    """The values for llm.c's unit test: x, y (B, T); logits (B, T, V); the loss; every gradient; all computed in fp32,
    on the first 4 rows of up to 64 tokens of the validation split."""
    c, d = source.model, config.data
    T = min(64, c.max_T)
    shards = open_dataset(d.name, d.dir, d.train, d.val, d.tokenizer).val
    x, y = (torch.from_numpy(a.astype(np.int64)) for a in Loader(shards, T, shuffle=False, V=c.V).batch(0, 4))
    engine = Engine(EngineSpec(c, B=4, T=T))
    engine.load_params({name: source.read(name) for name in source.shapes})
    logits = engine.logits(x)
    engine.forward_backward(x[None], y[None])
    grads = [engine.grad(name) for name in source.shapes]
    with replacing(path) as file:
        _start(file, dict(enumerate((DEBUG, 2, *x.shape))))
        for tokens in (x, y):
            _write(file, tokens.to(torch.int32))
        for part in (logits, engine.eval_losses(x, y).mean(), *grads):
            _write(file, part.float())
