"""`daybreak plan`: what a run needs in memory, time and disk, before it starts and without a GPU."""

from __future__ import annotations

from typing import Any

import click

from daybreak.cli.options import config_options, overrides_of
from daybreak.config import resolve


@click.command()
@click.argument("target")
@click.option("--gpu", metavar="CARD", help="Plan for this card (h100, a100, 4090 ...) instead of this machine.")
@click.option("--gpus", type=click.IntRange(1), default=1, metavar="N", help="Number of cards, one process each.")
@click.option("--price", "cost__price", metavar="P", help="Dollars per hour of the whole machine (cost.price).")
@config_options
def plan(target: str, gpu: str | None, gpus: int, **flags: Any) -> None:
    """Show what a run takes before it starts: memory, time, money, disk.

    Works without a GPU and without data. TARGET and --section.key VALUE are those of `daybreak train`.

    \b
    Examples:
      daybreak plan gpt2-1558M --gpu h100 --gpus 8 --price 28
      daybreak plan d12 --gpu 4090 --batch.B 16
      daybreak plan runs/tiny
    """
    config, _ = resolve(target, overrides_of(flags))

    from daybreak.report.plan import plan as make_plan
    from daybreak.report.plan import print_plan, recipe_notes

    print_plan(make_plan(config, gpu=gpu, gpus=gpus), recipe_notes(target))
