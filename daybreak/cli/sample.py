"""`daybreak sample`: text from a trained model, on stdout as it is generated; or pictures, as PNG files."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daybreak.errors import ConfigError, explained

if TYPE_CHECKING:
    from daybreak.generate import Sampling
MOST_ROWS = 16  # of the cache: with guidance, half as many pictures are drawn at a time


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
@click.option("--out", metavar="DIR", help="Draw pictures of the prompt, as PNG files in this folder.")
@click.option("--guidance", type=click.FloatRange(0, 20), default=1.0, metavar="G",
              help="Of pictures: above 1 they follow the prompt more closely.")  # fmt: skip
def sample(
    target: str, prompt: str, step: int | None, count: int, seed: int, out: str | None, guidance: float, **options: Any
) -> None:
    """Generate text, or pictures, from a run or a Hugging Face model.

    \b
    Examples:
      daybreak sample runs/tiny
      daybreak sample runs/tiny --prompt "def main" --tokens 200 --temperature 0.8 -n 3
      daybreak sample my-hf-folder --top-p 0.9
      daybreak sample runs/shapes --prompt "a red circle left of a blue square" --out drawn -n 4
    """
    from daybreak.generate import Sampling, sample_text
    from daybreak.interop import load_model

    how = Sampling(seed=seed, **options)
    how.check()
    if out is not None:
        for path in _pictures(target, prompt, step, count, how, Path(out), guidance):
            click.echo(path)
        return
    if guidance != 1:
        raise ConfigError(f"--guidance {guidance} is for pictures; add --out DIR.")
    engine, tokenizer, _ = load_model(target, step)
    for i in range(count):
        if count > 1:
            click.echo("---")
        if sys.stdout.isatty():  # a program gets the continuation alone
            click.echo(prompt, nl=False)
        for piece in sample_text(engine, tokenizer, prompt, replace(how, seed=seed + i)):
            click.echo(piece, nl=False)
        click.echo()


def _pictures(
    target: str, prompt: str, step: int | None, count: int, how: Sampling, out: Path, guidance: float
) -> list[Path]:
    """Draw pictures into files, whose names are the prompt's words and the seed. ConfigError for a model of text."""
    from daybreak.images.codec import Codec
    from daybreak.images.draw import draw, head, pictures_of
    from daybreak.images.png import write_png
    from daybreak.interop import load_model

    if how.stop or how.repetition_penalty != 1 or how.frequency_penalty or how.presence_penalty:
        raise ConfigError("--stop and the penalties are for text; leave them out with --out.")
    engine, tokenizer, _ = load_model(target, step, rows=min(MOST_ROWS, count * (1 + (guidance != 1))))
    head(tokenizer, pictures_of(tokenizer, target), prompt)  # before anything is written
    codec = Codec.load(Path(target), tokenizer)
    with explained(ConfigError, f"--out {out} cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        words, paths = re.sub(r"\W+", "-", prompt).strip("-")[:80] or "picture", list[Path]()
        for i, pixels in enumerate(codec.decode(draw(engine, tokenizer, [prompt] * count, how, guidance))):
            paths.append(out / f"{words}-{how.seed + i}.png")
            write_png(paths[-1], pixels)
    return paths
