"""For the recovery tests: a tiny run on shards made by hand, real `daybreak train` processes, comparisons."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ranks
import torch
from patience import until
from safetensors.torch import load_file

import daybreak
from daybreak.config import Config
from daybreak.manifest import list_checkpoints
from daybreak.state.checkpoint import load_checkpoint

V, CHILD = 97, Path(__file__).with_name("recovery_child.py")


def write_shard(path: Path, tokens: np.ndarray[Any, Any]) -> None:
    """A token shard by hand: 256 little-endian int32, then uint16 tokens."""
    path.write_bytes(struct.pack("<256i", 20240520, 1, tokens.size, *[0] * 253) + tokens.astype("<u2").tobytes())


def make_shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.Generator(np.random.PCG64(1))
    for name, count in (("x_train_0", 3000), ("x_train_1", 1500), ("x_val_0", 1200)):
        write_shard(folder / f"{name}.bin", np.cumsum(rng.integers(0, 3, count)) % V)
    return folder


def config(shards: Path, runs: Path, name: str, **values: Any) -> Config:
    """A tiny model: 35 steps an epoch, so that runs cross its end."""
    keys = {
        "model.L": 1, "model.C": 16, "model.NH": 2, "model.max_T": 16, "model.V": 257,
        "data.train": str(shards / "*train*"), "data.val": str(shards / "*val*"), "data.tokenizer": "bytes",
        "batch.B": 4, "batch.total_tokens": 128, "optim.lr": 3e-3, "schedule.warmup": 1, "eval.every": 50,
        "eval.tokens": 256, "eval.sample_tokens": 4, "checkpoint.every": 5, "checkpoint.keep": 2, "run.dir": str(runs),
        "run.name": name, "run.device": "cpu", "guard.loss_z": 6.0, "guard.norm_z": 6.0,
    }  # fmt: skip
    return Config().override(keys | {k.replace("__", "."): v for k, v in values.items()})


def recipe(made: Config, folder: Path) -> Path:
    path = folder / f"{made.run.name}.toml"
    path.write_text(made.to_toml())
    return path


def spawn(
    args: list[Any], accident: dict[str, Any] | None = None, verb: str = "train", **options: Any
) -> subprocess.Popen[str]:
    """`daybreak train ARGS` as a process, or another verb, with an accident on the way (see recovery_child)."""
    head = ["-m", "daybreak"] if accident is None else [str(CHILD), json.dumps(accident)]
    command = [sys.executable, *head, verb, *map(str, args), "--log.every", "1000000"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, **options)


def train(args: list[Any], accident: dict[str, Any] | None = None) -> tuple[int, str]:
    """The same to its end, in a process that is forked (see ranks): exit code and stderr."""
    line = ["train", *args, "--log.every", "1000000"]
    what, line = (ranks.daybreak, line) if accident is None else (ranks.accident, [json.dumps(accident), *line])
    with tempfile.NamedTemporaryFile() as err:
        (code,) = ranks.finish([ranks.alone(line, Path.cwd(), what, Path(err.name))])
        return code, Path(err.name).read_text()


def curve(run: daybreak.Run) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["norm"], r["lr"], r["skipped"]) for r in run.metrics("step")]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = load_file(checkpoint / "model.safetensors")
    if (checkpoint / "base.safetensors").exists():
        found |= load_file(checkpoint / "base.safetensors")
    for path in checkpoint.glob("optimizer-*"):
        found |= {f"optimizer.{k}": v for k, v in load_file(path).items()}
    return found


def assert_same(a: daybreak.Run, b: daybreak.Run) -> None:
    """Loss curve, validation losses, weights, optimizer state and outlier windows are equal, bit for bit."""
    assert curve(a) == curve(b)
    assert [(r["step"], r["loss"]) for r in a.metrics("val")] == [(r["step"], r["loss"]) for r in b.metrics("val")]
    wa, wb = tensors(a.checkpoints[0]), tensors(b.checkpoints[0])
    assert wa.keys() == wb.keys()
    assert [name for name in wa if not torch.equal(wa[name], wb[name])] == []


def assert_intact(folder: Path) -> int:
    """Every listed checkpoint verifies in full, and none that was reported saved is lost. Returns the newest step."""
    root = folder / "checkpoints"
    steps = [load_checkpoint(path, "full").step for path in list_checkpoints(root)]
    newest = steps[0] if steps else -1
    if (folder / "metrics.jsonl").exists():
        told = [r["step"] for r in daybreak.Run(folder).metrics("checkpoint")]
        assert newest >= max(told, default=-1), (newest, told)
    return newest


def wait_for(folder: Path, process: subprocess.Popen[str], steps: int) -> None:
    """Until the run has recorded `steps` more steps."""

    def count() -> int:
        path = folder / "metrics.jsonl"
        return path.read_bytes().count(b'"kind":"step"') if path.exists() else 0

    goal = count() + steps
    until(lambda: count() >= goal, process)


def exit_code(folder: Path) -> int:
    return int(json.loads((folder / "exit.json").read_text())["code"])
