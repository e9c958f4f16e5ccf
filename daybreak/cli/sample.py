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
@click.option(
    "--seed", type=click.IntRange(0), default=1337, show_default=True, metavar="N", help="Same seed, same text."
)
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint to use (default: the newest).")
@click.option("-n", "count", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Samples to draw.")
def sample(
    run: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int, step: int | None, count: int
) -> None:
    """Sample text from the run in folder RUN.

    \b
    Examples:
      daybreak sample runs/tiny
      daybreak sample runs/tiny --prompt "def main" --tokens 200 --temperature 0.8 -n 3
    """
    from daybreak.generate import Sampler

    sampler = Sampler(run, step)
    for i in range(count):
        if count > 1:
            click.echo("---")
        for piece in sampler.text(prompt, tokens, temperature=temperature, top_k=top_k, seed=seed + i):
            click.echo(piece, nl=False)
        click.echo()
