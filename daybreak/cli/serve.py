"""`daybreak serve`: an OpenAI-compatible server for a run or a Hugging Face model."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.argument("target", metavar="RUN|HF-DIR")
@click.option("--host", default="127.0.0.1", show_default=True, help="Another needs a key in DAYBREAK_API_KEY.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 = any free one.")
@click.option("--allow-host", "names", multiple=True, metavar="NAME", help="Further name clients may call it by.")
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Texts at a time.")
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint to use (default: the newest).")
@click.option("--device", metavar="D", help="cpu or cuda (default: the run's).")
def serve(
    target: str, host: str, port: int, names: tuple[str, ...], rows: int, step: int | None, device: str | None
) -> None:
    """Serve a run, or a model that `import` knows, as OpenAI's /v1/completions and /v1/models.

    With DAYBREAK_API_KEY set, clients must send that key. SIGTERM and Ctrl-C let requests under way end.

    \b
    Examples:
      daybreak serve runs/mine
      daybreak serve gpt2 --port 9000 --rows 32
    """
    from daybreak.data.formats import extra

    for module in ("starlette", "uvicorn"):
        extra(module, "serve", "daybreak serve")

    from daybreak.interop import load_model
    from daybreak.serve import app

    path = Path(target)
    engine, tokenizer = load_model(target, step, rows=rows, device=device)
    name = path.resolve().name if path.exists() else target

    def ready(url: str) -> None:
        click.echo(f"{name}: {engine.rows} texts at a time, {engine.T} tokens each, at {url}")

    key = os.environ.get("DAYBREAK_API_KEY", "")
    app.serve(engine, tokenizer, name, host=host, port=port, key=key, names=names, ready=ready)
