"""`daybreak doctor`: what this machine has and what of it is used; with a run, whether it is sound."""

from __future__ import annotations

import click

from daybreak.errors import CheckpointError


@click.command()
@click.argument("run", required=False)
def doctor(run: str | None) -> None:
    """Look at this machine, or verify every checkpoint and the data of RUN, to the last byte.

    Exit code 5 if something is bad.

    \b
    Examples:
      daybreak doctor
      daybreak doctor runs/tiny
    """
    from daybreak.report.doctor import check_run, machine

    if run is None:
        click.echo("\n".join(machine()))
        return
    lines, good = check_run(run)
    click.echo("\n".join(lines))
    if not good:
        raise CheckpointError(f"{run} is damaged, see above; training it again uses the newest good checkpoint.")
