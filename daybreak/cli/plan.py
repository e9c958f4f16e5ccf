"""`daybreak plan`: what a run needs in memory, time and disk, before it starts and without a GPU."""

from __future__ import annotations

from typing import Any

import click

from daybreak.cli.options import config_options, overrides_of
from daybreak.config import resolve
from daybreak.errors import ConfigError


def counts(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    """N or N,N,...: numbers of at least 1."""
    one: Any = click.IntRange(1)
    return tuple(one.convert(part, param, ctx) for part in text.split(","))


@click.command()
@click.argument("target")
@click.option("--gpu", metavar="GPU", help="Plan for this GPU (h100, a100, 4090 ...) instead of this machine.")
@click.option("--gpus", callback=counts, default="1", metavar="N[,N...]",
              help="Number of GPUs; give several numbers to compare them.")  # fmt: skip
@click.option("--network", type=click.FloatRange(0, min_open=True), default=50.0, metavar="X",
              help="Network speed of each GPU's port in GB/s, for several hosts.")  # fmt: skip
@click.option("--verbose", is_flag=True, help="Also list every buffer and activation.")
@click.option("--price", "cost__price", metavar="P", help="Dollars per hour, for all GPUs together (cost.price).")
@config_options
def plan(target: str, gpu: str | None, gpus: tuple[int, ...], network: float, verbose: bool, **flags: Any) -> None:
    """Predict a run's memory, time, cost and disk.

    Needs no GPU and no data. Takes the targets and --section.key flags of `daybreak train`.

    \b
    Examples:
      daybreak plan gpt2-1558M --gpu h100 --gpus 8 --price 28
      daybreak plan gpt2-1558M --gpu h100 --gpus 8,16,64,512 --parallel.zero 1
      daybreak plan d12 --gpu 4090 --batch.B 16
      daybreak plan runs/tiny
    """
    config, _ = resolve(target, overrides_of(flags))

    from daybreak.report import plan as report
    from daybreak.report.scaling import print_scaling, scaling

    if len(gpus) > 1 and gpu is None:
        raise ConfigError(f"--gpus {','.join(map(str, gpus))} compares one kind of GPU; say which with --gpu.")
    planned = report.plan(config, gpu=gpu, gpus=gpus[0])
    # before anything is printed, since one of the numbers may be wrong
    rows = scaling(config, gpu, gpus, network) if gpu and len(gpus) > 1 else []
    report.print_plan(planned, report.recipe_notes(target), verbose)
    if gpu and rows:
        print_scaling(config, gpu, rows, network)
