"""`daybreak sample`: text from a trained model, on stdout as it is generated."""

from __future__ import annotations

import click


@click.command()
@click.argument("run")
@click.option("--prompt", default="", metavar="TEXT", help="Text to continue (default: start of a document).")
@click.option(
    "--tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Tokens to generate."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=1.0, show_default=True, metavar="X", help="0 = greedy."
)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, metavar="K", help="0 = all tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="P",
              help="Only the likeliest tokens that together have probability P.")  # fmt: skip
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option(
    "--seed", type=click.IntRange(0), default=1337, show_default=True, metavar="N", help="Same seed, same text."
)
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint to use (default: the newest).")
@click.option("-n", "count", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Samples to draw.")
def sample(
    run: str, prompt: str, tokens: int, temperature: float, top_k: int, top_p: float, stop: tuple[str, ...], seed: int,
    step: int | None, count: int,
) -> None:  # fmt: skip
    """Sample text from the run in folder RUN.

    \b
    Examples:
      daybreak sample runs/tiny
      daybreak sample runs/tiny --prompt "def main" --tokens 200 --temperature 0.8 -n 3
    """
    from daybreak.generate import Sampler, Sampling

    sampler = Sampler(run, step)
    for i in range(count):
        if count > 1:
            click.echo("---")
        for piece in sampler.text(prompt, Sampling(tokens, temperature, top_k, top_p, seed + i, stop)):
            click.echo(piece, nl=False)
        click.echo()
