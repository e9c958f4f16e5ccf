"""`daybreak eval`: scores of a run or of exported weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daybreak.config import run_hint
from daybreak.errors import ConfigError
from daybreak.formatting import quoted, several
from daybreak.manifest import is_run

if TYPE_CHECKING:
    from daybreak.engine import Engine
    from daybreak.evaluate.harness import Score

# The metrics that --data prints; the last two of a model of pictures.
VALIDATION = ("validation loss (nats per token)", "bits per byte", "nats per text token", "nats per image token")


@click.command("eval")
@click.argument("target", metavar="RUN|HF-DIR")
@click.option("--tasks", metavar="A,B", help="core, hellaswag, lambada, arc, piqa, winogrande, mmlu, gsm8k, ...")
@click.option("--leaderboard", is_flag=True, help="The six tasks of the first Open LLM Leaderboard, and their mean.")
@click.option("--hellaswag", metavar="FILE", help="Score a run as llm.c does; FILE is the .jsonl or an eval .bin.")
@click.option("--data", metavar="NAME", help="Validation loss of a run on a prepared data set or a folder of shards.")
@click.option("--shots", type=click.IntRange(0), metavar="N", help="Examples in the prompt (default: the task's own).")
@click.option("--data-files", metavar="DIR", help="Read data sets from DIR/owner/name, without a network.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N examples of each task.")
@click.option("--batch", type=click.IntRange(1), default=8, metavar="B", help="Sequences at a time.")
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint to use (default: the newest).")
@click.option("--device", metavar="D", help="cpu or cuda (default: the run's).")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def evaluate(
    target: str, tasks: str | None, leaderboard: bool, hellaswag: str | None, data: str | None, shots: int | None,
    data_files: str | None, limit: int | None, batch: int, step: int | None, device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Score a model with lm-evaluation-harness.

    Or with llm.c's HellaSwag, or by its validation loss on your data. The model is a run. --tasks and --leaderboard
    also take a folder of a Hugging Face model; they need pip install -e '.[eval]' in daybreak's folder. --data scores
    at most the run's eval.tokens tokens, in sequences of its batch.T.

    \b
    Examples:
      daybreak eval runs/mine --tasks hellaswag,lambada
      daybreak eval runs/mine --leaderboard --data-files sets
      daybreak eval runs/mine --hellaswag hellaswag_val.jsonl --tasks hellaswag     (llm.c's and lm-eval's)
      daybreak eval runs/mine --data my-gpt2
      daybreak eval runs/mine --tasks core --data-files eval_bundle
    """
    own = hellaswag is not None or data is not None
    if (chosen := bool((tasks or "").strip(" ,")) + leaderboard) > 1 or not (chosen or own):
        raise ConfigError("eval needs --tasks A,B or --leaderboard, --hellaswag FILE, --data NAME, or several of them.")
    path, folder = Path(target), Path(data_files) if data_files else None
    from_run = is_run(path)
    if not from_run and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            fix = f"`daybreak import {quoted(target)}` makes a run with their model"
            raise ConfigError(f"{target} holds adapters alone; {fix}.")
        neither = "is neither a run (config.toml) nor a Hugging Face model's folder (config.json)"
        raise ConfigError(f"{target} {neither}{run_hint(target) or '.'}")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--data-files {data_files} is not a folder.")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip(" ,")]
    has_core, names = "core" in names, [name for name in names if name != "core"]
    if has_core and not from_run:
        raise ConfigError(f"--tasks core scores runs only, and {target} is not a run; import it.")
    if not from_run and own:
        flag, way = ("--hellaswag", "use --tasks hellaswag") if data is None else ("--data", "import it")
        raise ConfigError(f"{flag} scores runs only, and {target} is not a run; {way}.")

    from daybreak.evaluate import harness
    from daybreak.evaluate.core import core, read_bundle
    from daybreak.evaluate.multiple_choice import accuracy, load_examples
    from daybreak.evaluate.validation import validate_on
    from daybreak.state.run import Run

    names = [*harness.LEADERBOARD] if leaderboard else [t for name in names for t in harness.TASKS.get(name, [name])]
    if names:  # before anything is scored
        harness.known_tasks(names, folder)
    if has_core:
        read_bundle(folder)
    if from_run:
        run = Run(path)
        rows = batch if chosen else 1
        engine, tokenizer = run.load_engine(step, B=batch, rows=rows, device=device, data=data or "")
    scores: list[Score] = []
    if hellaswag is not None:
        both = accuracy(engine, load_examples(Path(hellaswag), tokenizer, engine.T, limit or 0))
        values = [("acc_norm (llm.c: mean loss per token)", both.acc_norm), ("acc (sum of losses)", both.acc)]
        scores = [harness.Score("hellaswag, in-loop", m, v, both.examples, 0) for m, v in values]
    if data is not None:
        loss = validate_on(engine, run.config, tokenizer, data, run.path)
        numbers = (loss.loss, loss.bits_per_byte, loss.text, loss.image)
        found = [(m, v) for m, v in zip(VALIDATION, numbers, strict=True) if m in VALIDATION[:2] or not math.isnan(v)]
        scores += [harness.Score(data, m, value, loss.sequences, 0) for m, value in found]
    if has_core:

        def longer(T: int) -> Engine:
            return run.load_engine(step, B=max(1, batch * engine.T // T), device=device, T=T)[0]

        scores += core(engine, tokenizer, folder, limit or 0, longer)
    if names:
        greedy = not leaderboard and any(not t.startswith(harness.CHOICE) for t in names)
        lm: Any = harness.engine_lm(engine, tokenizer, greedy) if from_run else harness.hf_lm(path, batch, device)
        if leaderboard:
            theirs = harness.leaderboard(lm, folder, limit)
        else:
            theirs = harness.scores_of(harness.run_harness(lm, names, shots, folder, limit))
        scores += [s._replace(task=f"{s.task}, lm-eval") for s in theirs] if scores else theirs
    _print(scores, as_json, loss.T if data is not None else 0)


def _print(scores: list[Score], as_json: bool, T: int) -> None:
    """One line a score; T: tokens of the sequences that a validation loss is of."""
    if as_json:
        values = [s.value if math.isfinite(s.value) else None for s in scores]  # JSON has no NaN
        click.echo(json.dumps([s._asdict() | {"value": value} for s, value in zip(scores, values, strict=True)]))
        return
    for s in scores:
        rows = f"{several(s.examples, 'sequence')} of {T} tokens"
        over = rows if s.metric in VALIDATION else f"{s.examples} examples, {s.shots} shots"
        click.echo(f"{s.task:24} {s.metric:38} {s.value:8.4f}   {over}")
