"""Where a run starts from: an existing run, one of its checkpoints, other weights; and what is left to do."""

from __future__ import annotations

import logging
from pathlib import Path

from daybreak.config import Config, run_of
from daybreak.config_keys import toml_value
from daybreak.errors import CheckpointError, ConfigError
from daybreak.formatting import quoted, several
from daybreak.interop import open_source
from daybreak.manifest import checkpoint_step, is_run, published
from daybreak.shapes import Shape
from daybreak.state.checkpoint import Checkpoint
from daybreak.state.merged import Merged
from daybreak.state.restore import Weights, check_model
from daybreak.state.run import Run
from daybreak.training.schedule import learning_rate

log = logging.getLogger("daybreak")


def checkpoint_of(path: Path | str) -> Checkpoint:
    """The newest good checkpoint of a run, or the checkpoint that `path` itself is. Raises CheckpointError."""
    run = run_of(path)
    return Run(run).checkpoint(None if run == Path(path).expanduser() else checkpoint_step(Path(path)))


def fork_of(path: Path | str, config: Config) -> Checkpoint:
    """`checkpoint_of`, for a new run of this configuration. Raises ConfigError if the checkpoint has made all of its
    steps, or has the state of another optimizer."""
    checkpoint, steps = checkpoint_of(path), config.run.steps
    was = checkpoint.config.optim.name
    if checkpoint.step and was != config.optim.name:
        raise ConfigError(
            f"optim.name = {config.optim.name} cannot continue {checkpoint.path}, which has the state of {was}; leave "
            "it out, or start a new run from its weights with --init-from."
        )
    if 0 < steps <= checkpoint.step:
        raise ConfigError(f"{checkpoint.path} is at step {checkpoint.step} of run.steps = {steps}; give --steps more.")
    return checkpoint


def weights_of(source: Path | str, shape: Shape, grows: bool) -> Weights:
    """Weights of a run's newest checkpoint, of one checkpoint, or of another program's files, adapters merged.
    Raises CheckpointError if they are of another shape, before there is a folder, which would be resumed from random
    weights. grows: their vocabulary may be smaller."""
    weights = Merged(checkpoint_of(source) if is_run(run_of(source)) else open_source(source))
    check_model(weights, shape, grows)
    return weights


def finished_at(run: Run, steps: int) -> int:
    """The run's step if it has made `steps` updates and what follows them: validation, sample, checkpoint; else 0."""
    if not steps or all(checkpoint_step(path) < steps for path in run.checkpoints):
        return 0  # without reading a checkpoint twice at each resume
    try:
        newest = run.checkpoint()
    except CheckpointError:
        return 0  # whoever resumes it is told
    last = ("sample", "image") if run.config.eval.sample_tokens else ("val",)  # a model of pictures draws some
    return max((r["step"] for r in run.metrics() if r["kind"] in last and r["step"] == newest.step >= steps), default=0)


def way_on(run: Path, given: Weights | None, again: str) -> str:
    """What to do about a run that was stopped before its first update, as the end of a sentence. given: the weights
    that it begins with. again: the command that resumes it."""
    unsaved = given is not None and not published(run / "checkpoints")
    return f"; remove {run} and start it again" if unsaved else f"; resume with: {again}"


def nothing_to_do(run: Run, config: Config, at: int) -> str:
    """The line for a run that is at step `at` and has made all steps of `config`. It names other data."""
    said = f"has made its {at} steps; --steps N --optim.horizon N trains it to step N."
    if at > config.run.steps:
        said = f"is at step {at}, past --steps {config.run.steps}; give more than {at}."
    other = ", ".join(change for change in differing(run.config, config) if change.startswith("data."))
    return f"nothing to do: {run.path} {said}" + (f" Not read: {other}." if other else "")


def say_origin(checkpoint: Checkpoint, now: Config) -> None:
    """Name the checkpoint, and every setting that is another one than then, but for the run's name and folder."""
    log.info("resuming from %s", checkpoint.path)
    if changed := differing(checkpoint.config, now):
        log.info("changed since the checkpoint: %s", ", ".join(changed))


def differing(old: Config, new: Config) -> list[str]:
    """The settings with another value in `new`, as `key old -> new`, without the run's name and folder."""
    was = dict(old.items()) | {"run.name": new.run.name, "run.dir": new.run.dir}
    return [f"{k} {toml_value(was.get(k))} -> {toml_value(now)}" for k, now in new.items() if now != was.get(k)]


def check_rate(path: Path | str, saved: Config, config: Config, *, fork: bool, warn: bool = False) -> None:
    """`warn` where a run is made longer than its schedule. Raise ConfigError if the added steps had learning rate 0."""
    was, steps = saved.run.steps, config.run.steps
    if not 0 < was < steps or config.optim.lr == 0:
        return
    if (rate := learning_rate(was, config.optim, config.schedule)) > 0:
        if warn and config.optim.horizon <= was and rate < config.optim.lr:
            log.warning(
                "the schedule ended at step %d: the added steps keep its last learning rate, %.2g. To stretch it, add "
                "--optim.horizon %d.", config.optim.horizon, rate, steps,
            )  # fmt: skip
        return
    same, name = (f" --fork {quoted(config.run.name)}", config.run.name) if fork else ("", f"{config.run.name}-longer")
    raise ConfigError(
        f"--steps {steps} adds {several(steps - was, 'step')} to {run_of(path)}, each with learning rate 0: its "
        f"schedule ends at step {config.optim.horizon} (optim.horizon, schedule.final_frac). Stretch the schedule:\n"
        f"  daybreak train {quoted(path)}{same} --steps {steps} --optim.horizon {steps}\n"
        f"or train a copy at a tenth of its highest rate:\n"
        f"  daybreak train {quoted(path)} --fork {quoted(name)} --steps {steps} --schedule.final_frac 0.1"
    )
