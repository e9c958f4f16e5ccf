"""An existing run: its folder as an object. `daybreak.load` returns it, and verbs after training start from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from daybreak.config import Config, run_config, run_hint
from daybreak.config_keys import LoraConfig
from daybreak.data.mixing import named, packed_rows
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.engine import Engine, plan_engine
from daybreak.engine.device import engine_spec, pick_device
from daybreak.engine.fit import check_fits
from daybreak.errors import CheckpointError, ConfigError, DataError
from daybreak.formatting import quoted
from daybreak.manifest import checkpoint_step, list_checkpoints
from daybreak.state.checkpoint import Checkpoint, load_checkpoint, newest_good
from daybreak.state.merged import Merged
from daybreak.state.metrics import read_metrics
from daybreak.state.restore import Weights, restore_weights
from daybreak.state.run_folder import RunFolder


class Run:
    """A run's folder: configuration, metrics, checkpoints, weights. Raises ConfigError if `path` is none."""

    def __init__(self, path: Path | str) -> None:
        self.folder = RunFolder(Path(path).expanduser())
        if not self.folder.config.is_file():
            fix = run_hint(self.path) or "; give a folder that daybreak train made."
            raise ConfigError(f"{self.path} is not a run: it has no config.toml{fix}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    @property
    def config(self) -> Config:
        """The complete configuration of the run (see `run_config`)."""
        return run_config(self.path)

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in step order, or those of one kind (step, val, sample, ...)."""
        if not self.folder.metrics.is_file():
            return []
        return [r for r in read_metrics(self.folder.metrics) if kind is None or r["kind"] == kind]

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        return list_checkpoints(self.folder.checkpoints, self.folder.id)

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """The newest good checkpoint, or the one of `step`. Raises CheckpointError."""
        if step is None:
            found = newest_good(self.folder.checkpoints, self.folder.id)
            if found is None:
                again = f"daybreak train {quoted(self.path)}"
                raise CheckpointError(f"{self.path} has no checkpoint yet; train it first: {again}")
            return found
        by_step = {checkpoint_step(path): path for path in self.checkpoints}
        if step not in by_step:
            have = ", ".join(map(str, sorted(by_step))) or "none"
            raise CheckpointError(f"{self.path} has no checkpoint of step {step}; there are: {have}.")
        return load_checkpoint(by_step[step])

    def load_engine(
        self, step: int | None = None, *, B: int = 1, rows: int = 1, device: str | None = None, data: str = "",
        lora: LoraConfig | None = None, T: int = 0,
    ) -> tuple[Engine, Tokenizer]:  # fmt: skip
        """A checkpoint's weights in an engine that evaluates B rows, also of the data set `data`, and writes `rows`
        texts at a time (no optimizer state), and its tokenizer. lora: adapters to leave room for, its own merged.
        T: tokens of a row, 0: the run's; more than model.max_T only where positions are no parameters.

        Raises CheckpointError, DataError (this daybreak's tokenizer differs), OutOfMemory.
        """
        config, checkpoint = self.config, self.checkpoint(step)
        made = checkpoint.manifest["tokenizer"]
        tokenizer = get_tokenizer(made["name"], self.path)
        if tokenizer.fingerprint != made["fingerprint"]:
            said = f"{self.path} was trained with tokenizer {made['name']} {made['fingerprint'][:16]}"
            has = f"this daybreak has {tokenizer.fingerprint[:16]}"
            raise DataError(f"{said}, {has}; use the version that trained it.")
        packed = packed_rows(named(config.data, data), tokenizer.name) if data else 0
        config = config.override({"data.packed": packed > 0})
        return engine_with(config, checkpoint, B=B, rows=rows, device=device, lora=lora, T=T), tokenizer


def engine_with(
    config: Config, weights: Weights, *, B: int = 1, rows: int = 1, device: str | None = None,
    lora: LoraConfig | None = None, T: int = 0,
) -> Engine:  # fmt: skip
    """An engine that evaluates B rows of T tokens (0: the run's) and writes `rows` texts at a time, with these weights.
    lora: adapters of these sizes, which the caller fills; the weights' own are merged. CheckpointError, OutOfMemory."""
    if lora is not None:
        config, weights = replace(config, lora=lora), Merged(weights)
    where = pick_device(device or config.run.device)
    spec = engine_spec(config, where, train=False, B=B, rows=min(rows, config.T), T=T or config.T)
    check_fits(plan_engine(spec)[2], where)
    engine = Engine(spec, device=where, init=False)
    restore_weights(engine, weights, adapters=lora is None)
    return engine
