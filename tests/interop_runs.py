"""Runs whose every number is known, made without the code that imports and exports; and llm.c's files built by hand."""

from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ranks
import torch
from oracle import Shape, random_values
from patience import PATIENCE
from torch import Tensor

from daybreak.cli.main import main as cli_main
from daybreak.config import Config
from daybreak.data.tokenizer import get_tokenizer
from daybreak.state.checkpoint import Snapshot, save_checkpoint

ROOT = Path(__file__).parents[1]
MAX_T = 64
# llm.c's order of tensors (format description, section 2.3).
ORDER = ["wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b", "fcw", "fcb",
         "fcprojw", "fcprojb", "lnfw", "lnfb"]  # fmt: skip


def shape_of(tokenizer: str = "gpt2-1024", L: int = 3, C: int = 96, NH: int = 4, max_T: int = MAX_T) -> Shape:
    return Shape(L=L, C=C, NH=NH, max_T=max_T, V=get_tokenizer(tokenizer).V)


def values_of(shape: Shape, seed: int = 5) -> dict[str, Tensor]:
    """fp32 weights that are not bf16 numbers: rounding shows."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, x in random_values(shape, seed).items():
        made[name] = (x * (1 + 0.003 * torch.rand(x.shape, generator=g, dtype=torch.float64))).float()
    made["wte"][shape.V :] = 0
    return made


def in_llmc_order(shape: Shape, values: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(name, tensor) as they follow each other in llm.c's files: all layers of a tensor before the next tensor."""
    out = []
    for name in ORDER:
        names = [name] if name in values else [f"h.{i}.{name}" for i in range(shape.L)]
        out += [(n, values[n]) for n in names]
    return out


def config_of(shape: Shape, tokenizer: str, **keys: Any) -> Config:
    model = {f"model.{k}": getattr(shape, k) for k in ("L", "C", "NH", "max_T", "V")}
    return Config().override(
        model
        | {"data.tokenizer": tokenizer, "run.device": "cpu", "batch.B": 2, "eval.tokens": 128, "eval.sample_tokens": 4}
        | {k.replace("__", "."): v for k, v in keys.items()}
    )


def write_run(
    folder: Path, tokenizer: str = "gpt2-1024", step: int = 7, seed: int = 5, max_T: int = MAX_T, **keys: Any
) -> Shape:
    """A run as training leaves it: config.toml and one checkpoint with known weights, m = seed + 1, v = |seed + 2|."""
    shape = shape_of(tokenizer, max_T=max_T)
    config = config_of(shape, get_tokenizer(tokenizer).name, **keys)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml())
    flat: dict[str, list[Tensor]] = {"m": [], "v": []}
    layout, at, m, v = [], 0, values_of(shape, seed + 1), values_of(shape, seed + 2)
    # Not llm.c's order, and with holes, as the engine's buffers have them.
    for name in reversed(list(shape.parameters())):
        n = prod(shape.parameters()[name])
        layout.append((name, at, shape.parameters()[name]))
        hole = torch.zeros(-n % 128)
        flat["m"] += [m[name].view(-1), hole]
        flat["v"] += [v[name].view(-1).abs(), hole]
        at += n + hole.numel()
    tok, model = get_tokenizer(tokenizer), values_of(shape, seed)
    save_checkpoint(folder / "checkpoints", Snapshot(
        step=step, model=model, parts=lambda name: [(0, model[name].view(-1))],
        optimizer={k: [(0, torch.cat(x))] for k, x in flat.items()}, flat_numel=at, layout=layout,
        extra={"windows": torch.zeros(2, 128, dtype=torch.float64), "counts": torch.zeros(2, dtype=torch.int64)},
        manifest={
            "config": dict(config.items()), "samples": 14, "skips_in_a_row": 0, "seed": 42, "compute": "fp32",
            "tokenizer": {"name": tok.name, "fingerprint": tok.fingerprint}, "data": {"fingerprint": ""}, "kernels": {},
        },
    ))  # fmt: skip
    return shape


def write_shard(path: Path, tokens: np.ndarray[Any, Any]) -> None:
    """A token shard by hand: 256 little-endian int32, then uint16 tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<256i", 20240520, 1, tokens.size, *[0] * 253) + tokens.astype("<u2").tobytes())


def write_shards(folder: Path, V: int, sizes: tuple[int, ...] = (1200, 900)) -> None:
    rng = np.random.default_rng(3)
    for i, n in enumerate(sizes):
        write_shard(folder / f"x_train_{i:06d}.bin", rng.integers(0, V, n))
    write_shard(folder / "x_val_000000.bin", rng.integers(0, V, 600))


Done = subprocess.CompletedProcess


def daybreak(folder: Path, *argv: str, code: int = 0, run: ranks.Run = ranks.daybreak, **env: str) -> Done:
    """The program, or llm.c's, as a process of its own in `folder`, which is forked."""
    with TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        status = ranks.Forked(run, list(argv), folder, out, os.environ | env, err).wait(PATIENCE)
        done = Done(list(argv), status, out.read_text(), err.read_text())
    assert status == code, (done.stdout, done.stderr)
    return done


def inside(folder: Path, *argv: str, code: int = 0, main: Callable[[list[str]], int] = cli_main) -> Done:
    """The same in this process: faster, since torch is loaded already. What `main` sets up is put back."""
    log, environ = logging.getLogger("daybreak"), dict(os.environ)
    before = log.handlers, log.level, log.propagate
    out, err = io.StringIO(), io.StringIO()
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(err):
            status = main(list(argv))
    finally:
        log.handlers, log.level, log.propagate = before
        os.environ.clear()
        os.environ.update(environ)
    assert status == code, (out.getvalue(), err.getvalue())
    return Done(list(argv), status, out.getvalue(), err.getvalue())
