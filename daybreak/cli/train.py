"""`daybreak train`: from what the user typed to one call of `train`."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daybreak.cli.options import config_options, overrides_of
from daybreak.config import Config, Resume, check_resume, is_untouched_import, resolve, run_of
from daybreak.errors import ConfigError, Error
from daybreak.formatting import quoted
from daybreak.manifest import is_run
from daybreak.parallel import agent, launched, restarted

if TYPE_CHECKING:
    from daybreak.state.run import Run

log = logging.getLogger("daybreak")


@click.command()
@click.argument("target", required=False)
@config_options
@click.option("--fork", metavar="NAME", help="Start a new run NAME from the newest checkpoint of TARGET.")
@click.option("--init-from", metavar="SOURCE", help="Start at step 0 with the weights of a run, HF folder or .bin.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print only warnings and the result.")
@click.option("--verbose", is_flag=True, help="Print every detail.")
@click.option("--print-config", is_flag=True, help="Print all settings with comments, as TOML, and exit.")
@click.pass_context
def train(
    ctx: click.Context, /, target: str | None, fork: str | None, init_from: str | None, as_json: bool, quiet: bool,
    verbose: bool, print_config: bool, **flags: Any,
) -> None:  # fmt: skip
    """Train a model, or resume a run.

    \b
    TARGET is one of:
      tiny, gpt2-124M, gpt3-125M ...    a recipe shipped with daybreak
      d12, gpt3:c768 ...                a shape
      my.toml                           your own recipe
      runs/NAME                         an existing run, which resumes
      runs/NAME/checkpoints/step-N      a checkpoint, to start from with --fork
    Every setting is a flag, --section.key VALUE; --print-config lists them.

    \b
    First commands:
      daybreak train tiny
      daybreak sample runs/tiny
      daybreak train tiny --name longer --steps 2000 --optim.lr 1e-3
    """
    overrides = overrides_of(flags)
    if target is None and not print_config:
        if overrides or fork or init_from:
            raise ConfigError("train needs a TARGET: a recipe (tiny), a shape (d12), a recipe.toml or a run's folder.")
        click.echo(ctx.get_help())
        return
    if fork is not None:
        if other := next((text for key, text in overrides if key == "run.name" and text != fork), ""):
            raise ConfigError(f"--fork {fork} and --name {other} name the new run differently; leave out --name.")
        overrides.append(("run.name", fork))
    existing = None if target is None or fork is not None or print_config else run_of(target)
    with _refusals_kept(existing):
        config, resume = resolve(target, overrides)
        _check_start(target, config, resume, fork, init_from)
    if print_config:
        click.echo(config.to_toml(), nl=False)
        return
    own, fork_from = (None if resume is None else resume.run, None) if fork is None else (None, target)
    say_as_asked(quiet, verbose)
    with _refusals_kept(existing):
        carry_out(config, overrides, as_json, own=own, fork_from=fork_from, init_from=init_from)


def say_as_asked(quiet: bool, verbose: bool) -> None:
    """Log only warnings, or every detail."""
    if quiet or verbose:
        log.setLevel(logging.WARNING if quiet else logging.DEBUG)


def carry_out(
    config: Config, overrides: list[tuple[str, str]], as_json: bool, *, own: Path | None = None,
    fork_from: str | None = None, init_from: str | None = None,
) -> None:  # fmt: skip
    """Train to the end of `config`, and print the result. own: the run's folder, if it exists. A run that torchrun
    starts again is resumed, with the (dotted key, text) pairs of the command line."""
    from daybreak.state.run_folder import RunFolder
    from daybreak.training.stop import Stop

    # Threads that wait by spinning make two of them slower than one as soon as another process wants a core. Read
    # when torch loads, so only here; costs a few percent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if own is None and restarted(os.environ):  # the run has begun: continue it, unless it was refused
        folder = Path(config.run.dir) / config.run.name
        if is_run(folder) and RunFolder(folder).is_of(agent(os.environ)):
            config, own = resolve(str(folder), overrides)[0], folder
    if own is not None and restarted(os.environ):
        RunFolder(own).check_not_final()
    with Stop().handling_signals() as stop:
        from daybreak.training.loop import train as run_training  # torch; a signal may already be waiting

        run = run_training(config, resume=own, fork_from=fork_from, init_from=init_from, stop=stop)
    if launched(os.environ)["RANK"] == "0" and (stop.step or as_json):  # else it has made no step: that has been said
        try:
            _print_result(run, as_json)
        except OSError as error:  # the run is complete, and its folder has the result too
            log.warning("standard output cannot be written (%s); the result is in %s.", error.strerror, run.path)


@contextmanager
def _refusals_kept(run: Path | None) -> Iterator[None]:
    """An error of the block goes into the exit.json of an existing run: see RunFolder.refuse."""
    from daybreak.state.run_folder import RunFolder

    mark = 0 if run is None else RunFolder(run).exit_mark()
    try:
        yield
    except Error as error:
        if run is not None:
            RunFolder(run).refuse(error, mark)
        raise


def _check_start(
    target: str | None, config: Config, resume: Resume | None, fork: str | None, init_from: str | None
) -> None:
    """Raise ConfigError unless target, --fork, --init-from and --name go together."""
    if resume is None and fork is not None:
        raise ConfigError(f"--fork {fork} needs an existing run to start from, which {target} is not; give runs/NAME.")
    if resume is None:
        return
    if init_from is not None:
        raise ConfigError(f"--init-from starts at step 0, but {target} is an existing run; give a recipe or a shape.")
    if fork is None and run_of(path := Path(target or "").expanduser()) != path:
        newest = f"resume the run from its newest one with `daybreak train {quoted(resume.run)}`"
        raise ConfigError(f"{target} is a checkpoint: start a new run from it with --fork NAME, or {newest}.")
    if fork is None and config.run.name != resume.saved.run.name:
        name, new = config.run.name, "start a new run from its checkpoint with --fork"
        raise ConfigError(f"--name {name} cannot rename {target}, an existing run; leave it out, or {new} {name}.")
    saved = any(resume.run.glob("checkpoints/*/manifest.json"))
    check_resume(resume.saved, config, fork=fork is not None or is_untouched_import(resume.run), moved=saved)


def _print_result(run: Run, as_json: bool) -> None:
    """Where the run is and how good it is, on stdout; a JSON object for programs, else the last sample too."""
    from daybreak.data.chat import template_text
    from daybreak.manifest import kept_files

    records = run.metrics()
    vals = [r for r in records if r["kind"] == "val"]
    vals = [v for v in vals if v.get("tokens_evaluated") == vals[-1].get("tokens_evaluated")]  # eval.tokens may change
    last = {r["kind"]: r for r in records} | {r["what"]: r for r in records if r["kind"] == "event"}
    step, val = last.get("step", {}), vals[-1]
    unigram = float(last["unigram_entropy"]["detail"]) if "unigram_entropy" in last else None
    if as_json:
        result = {
            "run": str(run.path), "step": val["step"], "tokens": val["tokens"], "loss": step.get("loss"),
            "val_loss": val["loss"], "val_bpb": val["bpb"], "unigram_entropy": unigram,
        }  # fmt: skip
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        click.echo(json.dumps(finite))  # JSON has no NaN
        return
    if "sample" in last:
        click.echo(f"--- sample ---\n{last['sample']['text']}\n--------------")
    start, end = vals[0]["loss"], val["loss"]
    baseline = "" if unigram is None else f" (baseline {unigram:.4f}: a model that knows only token frequencies)"
    bits = "" if math.isnan(val["bpb"]) else f", {val['bpb']:.4f} bits per byte"
    change = f"{start:.4f} -> {end:.4f}" if len(vals) > 1 else f"{end:.4f}"  # one, if eval.every is 0
    click.echo(f"validation loss {change}{baseline}{bits}")
    lowest, recent = min(vals, key=lambda v: v["loss"]), [r["loss"] for r in records if r["kind"] == "step"][-10:]
    fell = math.isfinite(end) and sum(recent) < start * len(recent)  # the training loss, which may be NaN
    if not end <= start and not fell:
        click.echo(f"The run diverged: its validation loss ended at {end:.4g}, above its start. Lower optim.lr.")
    elif end > start or lowest["loss"] < 0.98 * end:
        click.echo(
            f"It was lowest at step {lowest['step']}: {lowest['loss']:.4f}. If the training loss fell on, the model "
            "learns its text by heart; train for fewer steps, or on more text."
        )
    click.echo(f"{run.path}: step {val['step']}, {val['tokens']:,} tokens. Next:")
    talks = bool(template_text(kept_files(run.path)))
    nexts = {"chat": "a conversation"} if talks else {"sample": "more text"}
    nexts |= {"report": "its curves, as a page", "serve": "a prompt in a browser"}
    if (run.path / "codec.safetensors").is_file():
        nexts["sample"] = "a picture, with --prompt TEXT --out DIR"
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        nexts["serve"] += ", after pip install -e '.[serve]' in daybreak's folder"
    commands = {f"daybreak {verb} {quoted(run.path)}": gets for verb, gets in nexts.items()}
    width = max(32, max(map(len, commands)) + 1)
    for command, gets in commands.items():
        click.echo(f"  {command:<{width}} {gets}")
