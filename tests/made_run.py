"""Run folders written line by line, from the contract of metrics.jsonl; what the report makes of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from daybreak.config import Config
from daybreak.report.series import Follower

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>\u2028"


class MadeRun:
    """A run folder whose metrics are written line by line, from the contract."""

    def __init__(self, path: Path, **keys: Any) -> None:
        self.path = path
        path.mkdir()
        (path / "config.toml").write_text(Config().override({"run.steps": 10, **keys}).to_toml())
        self.line("run", 0, 0.0, name=path.name, config_hash="0", device="card", parameters=100, flops_per_token=600.0)

    def line(self, kind: str, step: int, t: float, end: str = "\n", **fields: Any) -> None:
        record = {"v": 1, "kind": kind, "step": step, "tokens": 1000 * step, "t": t, **fields}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + end)

    def step(self, step: int, t: float, loss: Any, **more: Any) -> None:
        fields = {
            "loss": loss, "norm": 0.5, "lr": 1e-3, "ms": 2000.0, "tok_s": 500.0, "mfu": None, "loss_z": None,
            "norm_z": None, "skipped": False, "mem_mib": 10, "eta_s": 1.0, "epoch": 0,
        }  # fmt: skip
        self.line("step", step, t, **{**fields, **more})


def made_run(path: Path) -> MadeRun:
    """Four steps, then a restart from step 2 an hour later that repeats 3 and goes to 5; one update skipped."""
    run = MadeRun(path, **{"cost.price": 36.0})
    run.step(1, 100.0, 6.0)
    run.step(2, 200.0, 5.0)
    run.line("val", 2, 200.0, loss=5.5, tokens_evaluated=10, bpb=2.0)
    run.line("sample", 2, 210.0, text=EVIL)
    run.step(3, 300.0, 9.0)
    run.step(4, 400.0, 9.0)
    run.line("val", 4, 410.0, loss=9.5, tokens_evaluated=10, bpb=3.0)
    run.line("run", 2, 4000.0, name="made", config_hash="0", device="card", parameters=100, flops_per_token=600.0)
    run.step(3, 4100.0, 4.0)
    run.step(4, 4200.0, "NaN", skipped=True, loss_z=7.5)
    run.line("event", 4, 4200.0, what="skip", detail="loss nan")
    run.step(5, 4300.0, 3.0, temp_c=60.0, power_w=690.0)
    run.line("eval", 4, 4310.0, task="hellaswag", accuracy=0.25, examples=100)
    run.line("checkpoint", 5, 4320.0, path="checkpoints/step-00000005", seconds=1.5, stall=0.1, bytes=1000)
    return run


def read(path: Path) -> dict[str, Any]:
    run = Follower(path)
    run.update()
    return run.payload()
