"""Small checkpoints whose every value is known, ways to damage them, and real processes to kill."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from daybreak.engine import Engine
from daybreak.manifest import list_checkpoints
from daybreak.state.checkpoint import Snapshot, load_checkpoint

# What a run says of itself in each checkpoint, beside what the checkpoint's own keys are.
FACTS: dict[str, Any] = {
    "config": {}, "samples": 0, "skips_in_a_row": 0, "compute": "fp32", "kernels": {}, "data": {"fingerprint": ""},
    "tokenizer": {"name": "bytes", "fingerprint": ""},
}  # fmt: skip


def facts(engine: Engine) -> dict[str, Any]:
    """`FACTS` of a run that trains the engine's model."""
    return FACTS | {"config": {f"model.{key}": value for key, value in vars(engine.cfg).items()}}


def snapshot(step: int, value: float | None = None, numel: int = 96) -> Snapshot:
    """Every number in it follows from `value` (default: the step)."""
    base = torch.arange(numel, dtype=torch.float32) + (step if value is None else value)
    model = {"wte": base[:60].view(12, 5), "lnfw": base[64:69]}
    return Snapshot(
        step=step,
        model=model,
        optimizer={"m": [(0, base * 2)], "v": [(0, base * 3)]},
        flat_numel=numel,
        layout=[("wte", 0, (12, 5)), ("lnfw", 64, (5,))],
        extra={"loss_window": torch.full((4,), float(base[0]), dtype=torch.float64), "filled": torch.tensor([step])},
        manifest={**FACTS, "samples": 7 * step, "config": {"optim.lr": 0.0006}, "rng": [1, 2**63]},
        parts=lambda name: [(0, model[name].view(-1))],
    )


def exact_weight(engine: Engine, name: str) -> torch.Tensor:
    """A weight as exactly as an engine of one rank has it."""
    return torch.cat([part for _, part in engine.exact_parts(name)]).view(engine.param(name).shape)


def model_value(path: Path) -> float:
    out = torch.empty(12, 5)
    load_checkpoint(path).read_model("wte", out)
    assert torch.equal(out, torch.arange(60, dtype=torch.float32).view(12, 5) + out[0, 0])
    return out[0, 0].item()


def contents(root: Path) -> dict[int, float]:
    """Step -> value of every listed checkpoint, each read and verified in full."""
    return {load_checkpoint(path).step: model_value(path) for path in list_checkpoints(root)}


def hidden(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name.startswith("."))


def fork(body: Callable[[], None]) -> int:
    """A real process that runs `body` and exits 0, or 1 on an exception. Returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def exit_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def damage(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
