"""`daybreak import`: weights from Hugging Face, llama.cpp or llm.c as a run that training continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from daybreak.cli.options import config_options, overrides_of
from daybreak.config import Config, parse_value
from daybreak.errors import ConfigError
from daybreak.formatting import quoted


@click.command("import")
@click.argument("source", metavar="NAME|PATH")
@config_options
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint of llm.c to use (default: the newest).")
def import_(source: str, step: int | None, **flags: Any) -> None:
    """Make a run from weights of other programs.

    `daybreak train` continues the run.

    \b
    NAME|PATH is one of:
      gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME    a model on the Hugging Face Hub
      folder with config.json                               saved by transformers (safetensors)
      folder with adapter_config.json                       saved by PEFT: adapters (LoRA), which name their model
      model.gguf                                            weights of llama.cpp, quantized ones too
      model.bin                                             weights of llm.c, fp32 or bf16
      folder with DONE_*                                    a checkpoint of llm.c: weights, optimizer, step
    Until its first step you can change its data and settings: daybreak train RUN --data D --optim.lr X.

    \b
    Examples:
      daybreak import gpt2 --name mine
      daybreak import log124M --name on --data fineweb-10B --batch.B 64 --batch.total_tokens 524288
    """
    given = {name: parse_value(name, text) for name, text in overrides_of(flags)}
    model = next((name for name in given if name.startswith("model.")), None)
    if model:
        raise ConfigError(f"--{model} cannot be given to import: the shape comes with the weights; leave it out.")
    config = Config().override(given)  # checked when the shape is known
    path = Path(source)
    name = config.run.name or (path.stem if path.suffix in (".bin", ".gguf") else path.resolve().name)

    from daybreak.interop import open_source
    from daybreak.interop.source import make_run

    found = open_source(source, config.data.tokenizer, step)
    run = make_run(found, config.override({"run.name": name}))
    m = found.model
    click.echo(f"{run}: {m.text()}, {found.tokenizer.name} tokenizer")
    if found.optimizer:
        tokens = config.override({"batch.T": config.batch.T or m.max_T}).tokens_between(0, found.step)
        place = f"step x batch = {tokens:,} tokens"
        click.echo(f"step {found.step}, with optimizer state; the data order restarts at {place}")
    if found.tokenizer.source:
        click.echo(f"prepare text with its tokenizer: daybreak prepare FILE --tokenizer {quoted(run)}/tokenizer.json")
    click.echo(f"continue with: daybreak train {quoted(run)} --data DATA")
