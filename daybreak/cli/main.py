"""The command `daybreak`: its verbs, its log on stderr, and the one place where errors become exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import click

from daybreak import __version__
from daybreak.cli.bench import bench
from daybreak.cli.chat import chat
from daybreak.cli.doctor import doctor
from daybreak.cli.ends import ending
from daybreak.cli.eval import evaluate
from daybreak.cli.export import export
from daybreak.cli.finetune import finetune
from daybreak.cli.import_ import import_
from daybreak.cli.options import SHORT
from daybreak.cli.plan import plan
from daybreak.cli.prepare import prepare
from daybreak.cli.report import report, watch
from daybreak.cli.sample import sample
from daybreak.cli.serve import serve
from daybreak.cli.train import train
from daybreak.config_keys import NOTHING, theirs
from daybreak.console import guard_streams
from daybreak.errors import ConfigError
from daybreak.formatting import meant

TEXTS = ("--prompt", "--stop", "--system", "--eval.prompt")  # flags whose values are no paths


class Verbs(click.Group):
    """The verbs in the order of use; an unknown one gets the nearest."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            hint = meant(args[0], self.commands, "daybreak --help lists all.")
            raise ConfigError(f"unknown command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


VERBS = [prepare, plan, train, finetune, evaluate, sample, chat, serve, import_, export, report, watch, doctor, bench]
SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=Verbs, commands=VERBS, invoke_without_command=True, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="daybreak", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train language models, from scratch or further.

    \b
    Examples:
      daybreak train tiny                  train a small model on the CPU, in two minutes
      daybreak sample runs/tiny            read what it writes
      daybreak prepare book.txt            your own text, as token shards in data/book
      daybreak plan gpt2-124M              what a run needs, before it starts
      daybreak watch runs/tiny             follow it in a browser; report: the same as a file
      daybreak doctor                      what this machine has, and what of it is used
      daybreak bench d12 --batch.B 4       how fast a step is here, and where its time goes
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at that moment, so that a live display may redirect it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    log = logging.getLogger("daybreak")
    log.handlers = [_Stderr()]
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    log.propagate = False


def _sentence(error: click.ClickException) -> str:
    """A usage error in our form: an unknown flag gets the nearest one, everything else the way to the help."""
    command = error.ctx if isinstance(error, click.UsageError) else None
    path = command.command_path if command is not None else "daybreak"
    if isinstance(error, click.NoSuchOption) and command is not None:
        known = [flag[2:] for p in command.command.get_params(command) for flag in p.opts if flag.startswith("--")]
        name = error.option_name.lstrip("-")  # compare without dashes: --lr means --optim.lr
        hint = meant(name, known, f"see {path} --help.", "--{}")
        if (ours := theirs(name)) == NOTHING and "optim.lr" in known:  # --model.dropout too
            hint = "daybreak has nothing like it."
        elif ours in known:
            hint = f"did you mean {SHORT.get(ours, [f'--{ours}'])[0]}?"
        return f"unknown flag {error.option_name}; {hint}"
    said = " ".join(error.format_message().split())  # click lists choices one a line
    return f"{said.rstrip('.')}; see {path} --help."


def _expand(arg: str, before: str) -> str:
    """An argument with ~ as the home folder, also in --flag=~/x, unless it is text. before: the argument before it."""
    flag, equals, value = arg.partition("=") if arg.startswith("-") else ("", "", arg)
    return arg if (flag or before) in TEXTS else f"{flag}{equals}{os.path.expanduser(value)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's own) and return the exit code (docs/files.md)."""
    guard_streams(result=True)
    _log_to_stderr()
    if argv is None:  # libraries parse sys.argv too, and would take our flags for theirs
        argv, sys.argv = sys.argv[1:], sys.argv[:1]
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # half-written files go away; training has its own way
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    return ending("daybreak", partial(_run, argv))


def _run(argv: Sequence[str]) -> int:
    try:
        argv = [_expand(arg, before) for before, arg in pairwise(["", *argv])]
        return cli.main(argv, prog_name="daybreak", standalone_mode=False) or 0
    except click.ClickException as error:
        raise ConfigError(_sentence(error)) from None
    except click.Abort:
        raise KeyboardInterrupt from None
