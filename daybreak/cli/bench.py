"""`daybreak bench`: how fast a step is here, kernel group by kernel group, beside its floor."""

from __future__ import annotations

from typing import Any

import click

from daybreak.cli.options import config_options, overrides_of
from daybreak.config import resolve


@click.command()
@click.argument("target")
@click.option("--seconds", type=click.FloatRange(min=0.0), default=10.0, help="Time steps for this long.")
@click.option("--tune", metavar="FOLDER", help="Search the fastest matmuls for this GPU, and write a table to FOLDER.")
@config_options
def bench(target: str, seconds: float, tune: str | None, **flags: Any) -> None:
    """Time a training step, and show where the time goes.

    Uses random tokens, so it needs no data, and writes nothing. Takes the targets and --section.key flags of
    `daybreak train`.

    --tune writes its table after each matmul, and skips those that the table has. So you may stop it at any time, and
    the same command resumes. To measure all of them anew, delete the table.

    \b
    Examples:
      daybreak bench tiny
      daybreak bench d48 --batch.B 16 --batch.total_tokens 131072 --batch.recompute 2
      daybreak bench d48 --batch.B 16 --tune .
    """
    config, _ = resolve(target, overrides_of(flags))

    from daybreak.report import bench as report

    if tune is not None:
        report.tune_products(config, tune)
    else:
        report.print_bench(report.bench(config, seconds))
