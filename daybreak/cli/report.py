"""`daybreak report` and `daybreak watch`: runs as a page, as a file or live."""

from __future__ import annotations

import logging
from pathlib import Path

import click

log = logging.getLogger("daybreak")


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="File to write (default: report.html in the run, or beside the first of several runs).")  # fmt: skip
def report(runs: tuple[str, ...], out: Path | None) -> None:
    """Write one HTML page about one or several runs.

    RUNS are run folders, or main.log files of llm.c.

    \b
    Examples:
      daybreak report runs/tiny
      daybreak report runs/a runs/b log124M/main.log -o compare.html
    """
    from daybreak.report.page import write_report

    click.echo(write_report(runs, out))


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8267, help="0 = any free port.")
@click.option("--host", default="127.0.0.1", help="Address; any other one requires DAYBREAK_KEY.")
@click.option("--allow-host", "names", multiple=True, metavar="NAME", help="Allow browsers to use this host name.")
def watch(runs: tuple[str, ...], port: int, host: str, names: tuple[str, ...]) -> None:
    """Follow runs live in a browser.

    RUNS are run folders, or main.log files of llm.c. Ctrl-C ends the page; the runs continue.

    \b
    Examples:
      daybreak watch runs/tiny
      daybreak watch runs/a runs/b --port 9000
    """
    from daybreak.report.watch import Watch

    with Watch(runs, host, port, names) as server:
        click.echo(server.url)
        log.info("Ctrl-C ends this page; the runs continue.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("")
