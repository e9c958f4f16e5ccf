"""`daybreak prepare`: text to token shards, with a progress bar on a terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from daybreak.data.prepare import Progress


@click.command()
@click.argument("sources", metavar="NAME|FILE...", nargs=-1, required=True)
@click.option("--name", metavar="NAME", help="Name of the dataset (default: the first source's, -TOKENIZER appended).")
@click.option(
    "--tokenizer", default="gpt2", show_default=True, metavar="T", help="gpt2, bytes, or gpt2-N (its first N)."
)
@click.option("--data-dir", default="data", show_default=True, metavar="DIR", help="Folder that holds the datasets.")
@click.option("--val-fraction", type=float, metavar="F", help="Fraction held out (default: the source's own split).")
@click.option("--shard-tokens", type=int, default=100_000_000, show_default=True, metavar="N", help="Tokens per shard.")
@click.option("--workers", type=int, default=0, show_default=True, metavar="N", help="Threads; 0 = all cores.")
@click.option(
    "--text-field", default="text", show_default=True, metavar="KEY", help="Field of .jsonl that is the text."
)
def prepare(
    sources: tuple[str, ...],
    name: str | None,
    tokenizer: str,
    data_dir: str,
    val_fraction: float | None,
    shard_tokens: int,
    workers: int,
    text_field: str,
) -> None:
    """Tokenize text into the shards that training reads.

    \b
    NAME|FILE is one of:
      stdlib              the Python standard library on this machine (no download)
      book.txt            one document
      pages.jsonl         one document per line
      folder              all of these in it

    \b
    Examples:
      daybreak prepare stdlib --tokenizer bytes
      daybreak prepare book.txt --name mybook
    """
    from daybreak.data.prepare import prepare as prepare_dataset

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half-written stays
    with _progress() as progress:
        manifest = prepare_dataset(
            sources,
            name=name,
            data_dir=data_dir,
            tokenizer=tokenizer,
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            workers=workers,
            text_field=text_field,
            progress=progress,
        )
    train, val = manifest.train, manifest.val
    shards = len(train.shards) + len(val.shards)
    click.echo(
        f"{data_dir}/{manifest.name}: {train.tokens:,} training and {val.tokens:,} validation tokens "
        f"({manifest.tokenizer}) of {train.documents + val.documents:,} documents in {shards} shards"
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr, fed with bytes of text; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda done, total, tokens: bar.update(task, completed=done, total=total)
