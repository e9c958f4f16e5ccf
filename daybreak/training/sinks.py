"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases. One that fails is dropped with a warning."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daybreak.config import Config
from daybreak.errors import ConfigError
from daybreak.manifest import read_id

log = logging.getLogger("daybreak")
Write = Callable[[int, dict[str, float], str], None]  # step, scalars by name, a generated text ("" = none)
SHOWN = ("loss", "norm", "lr", "ms", "tok_s", "mfu", "mem_mib", "loss_z", "norm_z", "temp_c", "power_w", "skipped")
VAL = ("loss", "bpb", "text_loss", "image_loss")


def sink_names(config: Config) -> list[str]:
    """The sinks that log.sinks names."""
    return [name for name in config.log.sinks.split(",") if name]


def check_sinks(config: Config) -> None:
    """Raise ConfigError if a sink's package is missing: better before the run than after it."""
    for name in sink_names(config):
        if importlib.util.find_spec(name) is None:
            fix = f"pip install -e '.[{name}]' in daybreak's folder"
            raise ConfigError(f"log.sinks = {name!r} needs the package {name}; {fix}.")


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers under the names that dashboards show: train/loss, val/loss, eval/hellaswag ..."""
    kind = record["kind"]
    if kind == "step":
        return {f"train/{key}": float(record[key]) for key in SHOWN if record[key] is not None}
    if kind == "val":
        return {f"val/{key}": record[key] for key in VAL if record.get(key) is not None}
    return {f"eval/{record['task']}": record["accuracy"]} if kind == "eval" else {}


def _tensorboard(config: Config, folder: Path) -> tuple[Write, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(step: int, values: dict[str, float], text: str) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        if text:
            writer.add_text("sample", text, step)

    return write, writer.close


def _wandb(config: Config, folder: Path) -> tuple[Write, Callable[[], None]]:
    import wandb

    settings = wandb.Settings(
        console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
    )
    run = wandb.init(
        project="daybreak", name=config.run.name, dir=str(folder), config=dict(config.items()), settings=settings,
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        id=read_id(folder) or None, resume="allow",  # a resumed run continues its own curves
    )  # fmt: skip

    def write(step: int, values: dict[str, float], text: str) -> None:
        run.log({**values, **({"sample": text} if text else {}), "step": step})

    return write, run.finish


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb}


class Sinks:
    """The sinks of a run, each until its first failure."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._open: dict[str, tuple[Write, Callable[[], None]]] = {}
        for name in sink_names(config):
            if opened := self._guarded(name, OPEN[name], config, folder):
                self._open[name] = opened

    def record(self, record: dict[str, Any]) -> None:
        """Pass on a line of metrics.jsonl."""
        values, text = scalars(record), record["text"] if record["kind"] == "sample" else ""
        if values or text:
            for name, (write, _) in list(self._open.items()):
                self._guarded(name, write, record["step"], values, text)

    def close(self) -> None:
        """Flush and close."""
        for name, (_, close) in list(self._open.items()):
            self._guarded(name, close)

    def _guarded(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # whatever a dashboard does, the run is worth more
            self._open.pop(name, None)
            log.warning("log.sinks: %s failed and is now switched off (%s: %s).", name, type(error).__name__, error)
            return None
