"""`daybreak chat`: a conversation with a model, in a terminal or through a pipe."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from daybreak.errors import ConfigError
from daybreak.formatting import quoted

if TYPE_CHECKING:
    from daybreak.generate import Conversation, Sampling

COMMANDS = "/reset starts over, /system TEXT instructs, Ctrl-C stops an answer, Ctrl-D ends"


@click.command()
@click.argument("target", metavar="RUN|HF-DIR")
@click.option("--system", default="", show_default="none", metavar="TEXT", help="Instruct the model, as /system does.")
@click.option("--tokens", type=click.IntRange(1), default=512, metavar="N", help="Most tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.7, metavar="X",
              help="0 = always the likeliest token.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(0), default=0, metavar="K", help="0 = all tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, metavar="P",
              help="Only the likeliest tokens that together have probability P.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1337, metavar="N", help="Same seed, same answers.")
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint to use (default: the newest).")
def chat(target: str, system: str, step: int | None, **options: Any) -> None:
    """Talk with a model that has a chat template.

    It is a run that was finetuned on chats, or another model that sample takes. Ctrl-C stops an answer, and Ctrl-D ends
    the conversation. A long conversation forgets its oldest turns. Through a pipe, each line is a question.

    \b
    In the conversation:
      /reset         start over, with the same instruction
      /system TEXT   instruct the model; without TEXT, no longer
    Examples:
      daybreak chat runs/SmolLM2-lora
      daybreak chat SmolLM2 --system "Answer in one sentence."
      echo "Who wrote Emma?" | daybreak chat SmolLM2 --temperature 0
    """
    from daybreak.generate import Conversation, Sampling
    from daybreak.interop import load_model

    how = Sampling(**options)
    how.check()
    engine, tokenizer, template = load_model(target, step)
    if template is None:
        fix = f"daybreak sample {quoted(target)} continues text, and docs/finetune.md says how a model learns to chat"
        raise ConfigError(f"{target} does not chat, since it has no chat template: {fix}.")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it leaves nothing half-written
    talk, terminal = Conversation(engine, tokenizer, template, system), sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        click.echo(f"{target} reads up to {engine.T:,} tokens.\n{COMMANDS}.", err=True)
    with _Interrupts(terminal) as interrupts:
        for count, line in enumerate(_lines(terminal, interrupts)):
            try:
                if not _obeyed(talk, line):
                    _answer(talk, line, replace(how, seed=how.seed + count), terminal, interrupts)
            except ConfigError as error:
                if not terminal:
                    raise
                click.echo(f"daybreak: {error}", err=True)


class _Interrupts:
    """Ctrl-C on a terminal: at the prompt it empties the line. From Enter on it stops the answer, also one that
    has not begun; pressed twice, it ends the program. Through a pipe it ends the program at once."""

    def __init__(self, terminal: bool) -> None:
        self.at_prompt, self.pressed, self._terminal = False, False, terminal

    def _press(self, *_: Any) -> None:
        if self.at_prompt or self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._press) if self._terminal else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def _lines(terminal: bool, interrupts: _Interrupts) -> Iterator[str]:
    """The lines that are typed or piped in, without empty ones."""
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys, and earlier questions
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        interrupts.pressed = False  # an answer that had ended before it was pressed
        try:
            interrupts.at_prompt = True
            line = input("> " if terminal else "").strip()
            interrupts.at_prompt = False
        except EOFError:
            return click.echo(nl=terminal)
        except KeyboardInterrupt:
            interrupts.at_prompt = False
            if not terminal:
                raise
            line = ""
            click.echo("\n(Ctrl-D ends)", err=True)
        if line:
            yield line


def _obeyed(talk: Conversation, line: str) -> bool:
    """Whether the line is a command, which is then carried out."""
    command, _, said = line.partition(" ")
    if command == "/reset":
        talk.turns.clear()
    elif command == "/system":
        talk.system = said.strip()
    elif re.fullmatch(r"/\w+", line):
        click.echo(f"({line} is unknown: {COMMANDS})", err=True)
    else:
        return False
    return True


def _answer(talk: Conversation, question: str, how: Sampling, terminal: bool, interrupts: _Interrupts) -> None:
    """Print the answer as it is generated, up to where Ctrl-C stops it."""
    with closing(talk.ask(question, how)) as pieces:
        for i, piece in enumerate(pieces):
            if i == 0 and talk.forgotten:
                turns = f"{talk.forgotten} oldest turn{'s' * (talk.forgotten > 1)}"
                click.echo(f"(forgot the {turns}: the model reads {talk.engine.T:,} tokens)", err=True)
            click.echo(piece, nl=False)
            if interrupts.pressed:
                break
    click.echo(" (stopped)" if interrupts.pressed else "")
    if terminal:
        click.echo()
