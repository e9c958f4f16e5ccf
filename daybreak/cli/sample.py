"""`daybreak sample`: text from a trained model, on stdout as it is generated."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import click


@click.command()
@click.argument("target", metavar="RUN|HF-DIR")
@click.option("--prompt", default="", show_default="start of a document", metavar="TEXT", help="Text to continue.")
@click.option("--tokens", type=click.IntRange(1), default=128, metavar="N", help="Tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0), default=1.0, metavar="X",
              help="0 = always the likeliest token.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(0), default=0, metavar="K", help="0 = all tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, metavar="P",
              help="Only the likeliest tokens that together have probability P.")  # fmt: skip
@click.option("--stop", multiple=True, metavar="TEXT",
              help="End before this text; several times for several; in bash, $'\\n' is a line end.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1337, metavar="N", help="Same seed, same text.")
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint to use (default: the newest).")
@click.option("-n", "count", type=click.IntRange(1), default=1, metavar="N", help="Samples to draw.")
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, metavar="P",
              help="Leave out tokens below P times the probability of the likeliest.")  # fmt: skip
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0,
              metavar="X", help="Above 1: tokens that occurred before are less likely.")  # fmt: skip
@click.option("--frequency-penalty", type=click.FloatRange(-2, 2), default=0.0, metavar="X",
              help="Lower a token's logit by X for each earlier occurrence.")  # fmt: skip
@click.option("--presence-penalty", type=click.FloatRange(-2, 2), default=0.0, metavar="X",
              help="Lower the logit of tokens that occurred before by X.")  # fmt: skip
def sample(target: str, prompt: str, step: int | None, count: int, seed: int, **options: Any) -> None:
    """Generate text from a run or a Hugging Face model.

    \b
    Examples:
      daybreak sample runs/tiny
      daybreak sample runs/tiny --prompt "def main" --tokens 200 --temperature 0.8 -n 3
      daybreak sample my-hf-folder --top-p 0.9
    """
    from daybreak.generate import Sampling, sample_text
    from daybreak.interop import load_model

    how = Sampling(seed=seed, **options)
    how.check()
    engine, tokenizer, _ = load_model(target, step)
    for i in range(count):
        if count > 1:
            click.echo("---")
        if sys.stdout.isatty():  # a program gets the continuation alone
            click.echo(prompt, nl=False)
        for piece in sample_text(engine, tokenizer, prompt, replace(how, seed=seed + i)):
            click.echo(piece, nl=False)
        click.echo()
