"""`daybreak prepare`: text to token shards, with a progress bar on a terminal."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daybreak.errors import ConfigError
from daybreak.formatting import quoted

log = logging.getLogger("daybreak")

if TYPE_CHECKING:
    from daybreak.data.dataset import Manifest
    from daybreak.data.prepare import Progress

LEAST, FEW = 8, 100  # tokens of the shortest sample that is advised; examples of chats that need many epochs


@click.command()
@click.argument("sources", metavar="NAME|FILE...", nargs=-1, required=True)
@click.option("--pretokenized", is_flag=False, flag_value=0, type=click.IntRange(0), metavar="[N]",
              help="Ready-made GPT-2 token shards from the Hub: the first N for training, or all.")  # fmt: skip
@click.option("--name", metavar="NAME", help="Name of the dataset (default: the first source's, with -TOKENIZER).")
@click.option("--tokenizer", default="gpt2", metavar="T",
              help="gpt2, gpt2-N (its first N tokens), bytes, or a tokenizer.json.")  # fmt: skip
@click.option("--train-tokenizer", type=click.IntRange(0), default=0, metavar="V",
              help="Make a tokenizer of V ids from the text, in place of --tokenizer.")  # fmt: skip
@click.option("--data-dir", default="data", metavar="DIR", help="Folder of the datasets.")
@click.option("--val-fraction", type=float, metavar="F", help="Validation's share, 0 < F < 1 (default: the source's).")
@click.option("--shard-tokens", type=int, default=100_000_000, metavar="N", help="Tokens per shard.")
@click.option("--workers", type=int, default=0, metavar="N", help="Threads; 0 = all cores.")
@click.option("--text-field", default="text", metavar="KEY",
              help="Field (.jsonl, .json, .csv) or column with the text.")  # fmt: skip
@click.option("--as", "kind", type=click.Choice(["text", "chat", "images"]),
              help="What the files hold (default: as their first record looks).")  # fmt: skip
@click.option("--row-tokens", type=click.IntRange(8), metavar="T",
              help="Tokens of a row of packed chats (1024, or fewer), or of a caption and its picture.")  # fmt: skip
@click.option("--px", type=click.IntRange(8, 256), metavar="N", help="Pixels a side of pictures (32).")
@click.option("--show", type=click.IntRange(1), metavar="N", help="Print N examples of chats: context, learned.")
@click.option("--skip-bad", is_flag=True, help="Skip bad files, lines and rows, and count them.")
def prepare(
    sources: tuple[str, ...], pretokenized: int | None, name: str | None, data_dir: str, show: int | None,
    row_tokens: int | None, kind: str | None, px: int | None, train_tokenizer: int, **options: Any,
) -> None:  # fmt: skip
    """Turn text, chats or pictures into token shards for training.

    If it is stopped, run the same command again: it continues.

    \b
    NAME|FILE is one of:
      stdlib              the Python standard library on this machine (no download)
      book.txt            one document
      pages.jsonl         one document per line; .json: per value; .csv, .tsv, .parquet: per row
      chats.jsonl         a conversation in each: messages, ShareGPT, Alpaca, or prompt and completion
      pages.jsonl.gz      all but Parquet also compressed, .gz or .zst
      folder              all of these in it; files whose names say "test" are left out
      shapes              pictures of coloured shapes, with captions (no download)
      emoji               pictures and names of Debian's colour font, where it is installed
      -                   standard input, text or JSON Lines
      hf:owner/name[:config][#column]     a data set of the Hugging Face Hub (HF_ENDPOINT is respected)
      https://host/part-{00..99}.parquet  files of these kinds
      fineweb-edu[-10B|-100B|-350B], fineweb[-...], climbmix, tinystories, openwebtext, tinyshakespeare

    \b
    Examples:
      daybreak prepare stdlib --tokenizer bytes
      daybreak prepare book.txt --name mybook
      daybreak prepare book.txt --name own --train-tokenizer 300
      daybreak prepare chats.jsonl --tokenizer SmolLM2/tokenizer.json --show 3
      daybreak prepare photos --as images --px 64
      daybreak prepare fineweb-edu-100B --pretokenized 20
    """
    from daybreak.data import prepare as data
    from daybreak.data.catalogue import is_drawn
    from daybreak.data.pictures import MARK

    pictures = kind == "images" or (kind is None and is_drawn(sources))
    if px and not pictures:
        raise ConfigError(f"--px {px} is for pictures; add --as images.")
    if pictures and pretokenized is not None:
        raise ConfigError("--pretokenized is for text, and pictures have no ready-made shards; leave it out.")
    if train_tokenizer and (pictures or pretokenized is not None):
        raise ConfigError("--train-tokenizer is for text that is tokenized here; leave it out.")
    if pretokenized is not None and (options["tokenizer"] != "gpt2" or kind == "chat"):
        raise ConfigError("--pretokenized downloads text in GPT-2's tokens; leave out --tokenizer and --as.")
    if pretokenized is not None and len(sources) != 1:
        raise ConfigError(f"--pretokenized takes one NAME or hf:owner/name, not {' '.join(sources)!r}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half-written stays
    with _progress() as progress:
        if pictures:
            from daybreak.images.prepare import PX, prepare_images  # here, since it imports torch

            given = {"px": px or PX, "row_tokens": row_tokens or 0, **options}
            manifest = prepare_images(sources, name=name, data_dir=data_dir, progress=progress, **given)
        elif pretokenized is not None:
            manifest = data.pretokenized(sources[0], pretokenized, name=name, data_dir=data_dir, progress=progress)
        else:
            options |= {"kind": kind or "", "row_tokens": row_tokens or 0, "train_tokenizer": train_tokenizer}
            manifest = data.prepare(sources, name=name, data_dir=data_dir, progress=progress, **options)
    place, owner = f" --data.dir {quoted(data_dir)}" * (data_dir != "data"), _model_beside(options["tokenizer"])
    if MARK in manifest.tokenizer:
        _say_pictures(manifest, data_dir, place)
    elif manifest.rows:
        _say_rows(manifest, data_dir, place, show or 0, owner or "MODEL")
    else:
        if show:
            log.warning("--show %d: %s is text, all of which is learned; examples are shown of chats.", show,
                        manifest.name)  # fmt: skip
        _say_text(manifest, data_dir, place, owner)


def _shorter(longest: int, T: int) -> str:
    """The flag with which shards of at most so many tokens fill a sample; "" if one of T fits, or nothing does."""
    fits = T
    while fits and fits >= longest:  # a sample has one token more
        fits //= 2
    return f" --batch.T {fits}" if LEAST <= fits < T else ""


def _model_beside(tokenizer: str) -> str:
    """The folder of the model or run that this tokenizer.json is of; "" if there is none."""
    folder = Path(tokenizer).parent
    is_model = any((folder / name).is_file() for name in ("config.json", "config.toml"))
    return quoted(folder) if tokenizer.endswith(".json") and is_model else ""


def _say_text(manifest: Manifest, data_dir: str, place: str, owner: str) -> None:
    """How much text there is, and what is next. place: the flag that names data_dir, for the next command. owner: the
    model that the tokenizer is of, "" if there is none."""
    from daybreak.data.tokenizer import get_tokenizer

    train, val = manifest.train, manifest.val
    share = 100 * val.tokens / (train.tokens + val.tokens)
    V = get_tokenizer(manifest.tokenizer, Path(data_dir) / manifest.name).V
    model = "tiny" if V == 1025 else f"{'d6' if train.tokens < 10**8 else 'd12'}{f' --model.V {V}' * (V != 50_257)}"
    T = 128 if V == 1025 else 1024
    longest = min(max((s.tokens for s in split.shards), default=0) for split in (train, val))
    model += _shorter(longest, T)
    small = V != 1025 and 0 < train.bytes < 2 * 10**7 and not owner
    names = f"--data {manifest.name} --name {manifest.name}{place}"
    own = f"--data.tokenizer {manifest.tokenizer} --model.V {V}{_shorter(longest, 128)} {names}"
    tiny = f"train the smallest model on so small a text: daybreak train tiny {own}"
    short = "prepare so small a text with --tokenizer gpt2-1024, and train tiny (docs/your-text.md)."
    laptop = f"\nWithout a GPU, {short if V == 50_257 else tiny}"
    further = f"daybreak finetune {owner} --data {manifest.name}{place}; from scratch: " * bool(owner)
    then = f"Next: {further}daybreak train {model} {names}{laptop * small}"
    if 0 < longest <= LEAST:
        then = f"This is too little to train on: samples have {T:,} tokens each. Add text, and prepare it again."
    click.echo(
        f"{data_dir}/{manifest.name}: {train.tokens:,} training and {val.tokens:,} validation tokens "
        f"({manifest.tokenizer}) of {train.documents + val.documents:,} documents in "
        f"{len(train.shards) + len(val.shards)} shards\nValidation is {share:.3g} % of the tokens. {then}"
    )


def _say_pictures(manifest: Manifest, data_dir: str, place: str) -> None:
    """How many pictures there are, and what is next. place: see `_say_text`."""
    from daybreak.data.catalogue import DRAWN
    from daybreak.data.pictures import text_name
    from daybreak.data.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(manifest.tokenizer, Path(data_dir) / manifest.name)
    assert tokenizer.pictures
    D, text = tokenizer.pictures.D, text_name(tokenizer.name)
    other = f" --data.tokenizer {text}" * (text != "gpt2-1024")
    own = f" --data {manifest.name}{other} --model.V {tokenizer.V} --model.max_T {D} --name {manifest.name}"
    click.echo(
        f"{data_dir}/{manifest.name}: {manifest.train.documents:,} training and {manifest.val.documents:,} validation "
        f"documents of {D} tokens, {tokenizer.pictures.N} of them a picture's ({manifest.tokenizer})\n"
        f"Next: daybreak train shapes{own * (manifest.source != DRAWN or bool(other))}{place}"
    )


def _say_rows(manifest: Manifest, data_dir: str, place: str, show: int, model: str) -> None:
    """The first `show` examples of a packed set, then how many there are and how `model` learns from them. Learned
    text is green on a terminal; elsewhere it is between double brackets."""
    from rich.console import Console
    from rich.text import Text

    from daybreak.data.dataset import open_dataset
    from daybreak.data.packing import read_examples
    from daybreak.data.tokenizer import get_tokenizer

    folder = Path(data_dir) / manifest.name
    tokenizer, out = get_tokenizer(manifest.tokenizer, folder), Console(highlight=False, soft_wrap=True)
    found = read_examples(open_dataset(str(folder)).train, show)
    for i, example in enumerate(found, 1):
        text = Text(f"--- example {i} of {len(found)}: context, ").append("learned\n", "bold green")
        for ids, learned in example:
            said = tokenizer.decode(ids)
            text.append(f"[[{said}]]" if learned and not out.color_system else said, "bold green" if learned else "dim")
        out.print(text)
    more = "\nSo few examples need more epochs than the usual two: docs/finetune.md, under A few chats of your own."
    click.echo(
        f"{folder}: {manifest.train.documents:,} training and {manifest.val.documents:,} validation examples in rows "
        f"of {manifest.rows} tokens ({manifest.tokenizer})\n"
        f"Next: daybreak finetune {model} --data {manifest.name}{place}{more * (manifest.train.documents < FEW)}"
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr, fed with bytes of text; where stderr is no terminal, a line every half minute."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    began = said = time.monotonic()
    first: tuple[int, int] | None = None  # what an earlier attempt had done is not this one's speed
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing")

        def report(done: int, total: int, tokens: int) -> None:
            nonlocal said, first, began
            first, now = first or (done, tokens), time.monotonic()
            if done == first[0]:  # pictures are read, or their codec learns: that is no part of the speed
                began = now
            speed = (tokens - first[1]) / max(now - began, 1e-9)
            bar.update(task, completed=done, total=total, description=f"{speed / 1e6:.2f} M tokens/s")
            if not console.is_terminal and now - said >= 30 and first[0] < done < total:
                said, left = now, (total - done) * (now - began) / max(done - first[0], 1)
                log.info("%.1f %%, %.2f M tokens/s, about %.0f s left", 100 * done / total, speed / 1e6, left)

        yield report
