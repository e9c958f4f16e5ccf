"""The configuration on the command line: every key is a flag, `--section.key VALUE`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from daybreak.config import every_key

KEYS = list(every_key())
# The only undotted spellings of configuration keys.
SHORT = {
    "run.name": ("--name", "NAME", "Name of the run (default: the target's); its folder is runs/NAME."),
    "data.name": ("--data", "DATA", "Prepared dataset, or a folder of token shards."),
    "run.steps": ("--steps", "N", "Optimizer steps (default: the recipe's, else one epoch)."),
    "run.epochs": ("--epochs", "N", "Passes over the training data, instead of --steps."),
    "run.tokens": ("--tokens", "N", "Training tokens, instead of --steps: 1B, 300M, 5000000."),
    "run.max_hours": ("--max-hours", "H", "Save and stop (exit 75) after H hours."),
    "run.profile": ("--profile", "A:B", "Profile steps A to B."),
}
# Where a command's default differs.
OWN = {
    ("finetune", "run.name"): "Name of the run (default: MODEL-METHOD); its folder is runs/NAME.",
    ("finetune", "run.steps"): "Optimizer steps (default: two epochs).",
}


def _dest(name: str) -> str:
    return name.replace(".", "__")


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a flag for every configuration key. The command receives them raw, see `overrides_of`."""
    for name in reversed(KEYS):
        if name in SHORT:
            flag, metavar, text = SHORT[name]
            text = OWN.get((command.__name__, name), text)
            hidden = name in ("run.max_hours", "run.profile") and command.__name__ != "train"
            command = click.option(flag, f"--{name}", _dest(name), metavar=metavar, help=text, hidden=hidden)(command)
        else:
            command = click.option(f"--{name}", _dest(name), hidden=True)(command)
    return command


def overrides_of(flags: dict[str, Any]) -> list[tuple[str, str]]:
    """The (dotted key, text) pairs among a command's arguments; text is parsed by `config.parse_value`."""
    return [(name, flags[_dest(name)]) for name in KEYS if flags[_dest(name)] is not None]
