"""`daybreak doctor`: what this machine has and what of it is used; with a run, whether it is sound."""

from __future__ import annotations

import click

from daybreak.errors import CheckpointError, ConfigError, Error


@click.command()
@click.argument("run", required=False)
@click.option("--check", "try_out", is_flag=True, help="Train here for two minutes and compare: does all work?")
def doctor(run: str | None, try_out: bool) -> None:
    """Look at this machine, try it out, or verify a run.

    Exit code 1 if --check finds something bad, 5 if RUN is damaged.

    \b
    Examples:
      daybreak doctor
      daybreak doctor --check
      daybreak doctor runs/tiny
    """
    if try_out:
        from daybreak.report.check import check

        if run is not None:
            raise ConfigError(f"--check looks at this machine, not at a run; leave out {run}, or leave out --check.")
        line = ""
        for line in check():
            click.echo(line)
        if not line.startswith("all"):
            raise Error("this machine does not compute as it should, see the lines marked BAD.")
        return
    from daybreak.report.doctor import check_run, machine

    if run is None:
        click.echo("\n".join(machine()))
        return
    lines, good = check_run(run)
    click.echo("\n".join(lines))
    if not good:
        way, none = "training it again uses the newest good checkpoint", "it has no good checkpoint to continue from"
        then = way if any(line.startswith("good") for line in lines) else none
        raise CheckpointError(f"{run} is damaged, see above; {then}.")
