"""`daybreak plan`: what a run needs in memory, time and disk, before it starts and without a GPU."""

from __future__ import annotations

from typing import Any

import click

from daybreak.cli.options import config_options, overrides_of
from daybreak.config import resolve


@click.command()
@click.argument("target")
@config_options
def plan(target: str, **flags: Any) -> None:
    """Show the memory of a run, tensor by tensor, before it starts.

    TARGET and --section.key VALUE are those of `daybreak train`.

    \b
    Examples:
      daybreak plan gpt2-124M
      daybreak plan d48 --batch.B 16 --precision.compute bf16
      daybreak plan runs/tiny
    """
    config, _ = resolve(target, overrides_of(flags))

    from daybreak.report.plan import plan as make_plan
    from daybreak.report.plan import print_plan

    print_plan(make_plan(config))
