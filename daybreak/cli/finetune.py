"""`daybreak finetune`: a model, a data set and a method become the configuration of a training run."""

from __future__ import annotations

from typing import Any

import click

from daybreak.cli.options import config_options, overrides_of
from daybreak.cli.train import carry_out, say_as_asked
from daybreak.config import parse_value


@click.command()
@click.argument("model")
@config_options
@click.option("--method", type=click.Choice(["lora", "qlora", "full"]), default="lora",
              help="Train adapters (LoRA), the same on a model in 4 bits (QLoRA), or all parameters.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print only warnings and the result.")
@click.option("--verbose", is_flag=True, help="Print every detail.")
@click.option("--print-config", is_flag=True, help="Print all settings with comments, as TOML, and exit.")
def finetune(
    model: str, method: str, as_json: bool, quiet: bool, verbose: bool, print_config: bool, **flags: Any
) -> None:
    """Train a model further, on your data.

    \b
    MODEL is one of:
      runs/NAME                     a run, or one of its checkpoints
      folder with config.json       saved by transformers; with adapter_config.json, by PEFT
      model.gguf                    weights of llama.cpp
      OWNER/NAME                    a model on the Hugging Face Hub
    The data must be prepared with the model's tokenizer. Every setting is a flag; --print-config lists them.
    The result is a run: `daybreak train runs/NAME` resumes it.

    \b
    Examples:
      daybreak finetune SmolLM2 --data dialogues
      daybreak finetune SmolLM2 --data dialogues --lora.rank 64 --lora.targets q,k,v,attproj
      daybreak finetune runs/tiny --data book --method full --optim.lr 1e-5
    """
    overrides = overrides_of(flags)
    from daybreak.training.finetune import finetune_config  # torch

    config = finetune_config(model, method, {name: parse_value(name, text) for name, text in overrides})
    if print_config:
        click.echo(config.to_toml(), nl=False)
        return
    say_as_asked(quiet, verbose)
    carry_out(config, overrides, as_json, init_from=model)
