"""`daybreak serve`: an OpenAI-compatible server for a run or a Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("target", metavar="RUN|HF-DIR")
@click.option("--host", default="127.0.0.1", help="Address; any other one requires DAYBREAK_KEY.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 = any free port.")
@click.option("--allow-host", "names", multiple=True, metavar="NAME", help="Allow clients to use this host name.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR",
              help="Also serve the model with an adapter of PEFT's; several times for several.")  # fmt: skip
@click.option("--rows", type=click.IntRange(1), default=8, metavar="N", help="Sequences at a time.")
@click.option("--queue", type=click.IntRange(1), default=64, metavar="N", help="Most open requests.")
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint to use (default: the newest).")
@click.option("--device", metavar="D", help="cpu or cuda (default: the run's).")
def serve(
    target: str, host: str, port: int, names: tuple[str, ...], adapters: tuple[str, ...], rows: int, queue: int,
    step: int | None, device: str | None,
) -> None:  # fmt: skip
    """Serve a model to a browser and to OpenAI's clients.

    The model is a run, or one that `import` knows. The endpoints are /v1/completions, /v1/chat/completions,
    /v1/images/generations, /v1/models and /health. The address shows a page on which you can write. With DAYBREAK_KEY
    set (16 characters or more), clients must send that key. SIGTERM and Ctrl-C let open requests finish.

    \b
    Examples:
      daybreak serve runs/mine
      daybreak serve gpt2 --port 9000 --rows 32
      daybreak serve SmolLM2 --adapter dialogues=SmolLM2-peft
    """
    from daybreak.data.formats import extra

    for module in ("starlette", "uvicorn"):
        extra(module, "serve", "daybreak serve")

    from daybreak.images.codec import Codec
    from daybreak.interop import load_model
    from daybreak.serve import app
    from daybreak.serve.adapters import named_folders, widest

    path = Path(target)
    name = path.resolve().name if path.exists() else target
    folders = named_folders(adapters, name)
    model = load_model(target, step, rows=rows, device=device, lora=widest(folders))
    codec = Codec.load(path, model.tokenizer) if model.tokenizer.pictures else None

    def ready(url: str) -> None:
        click.echo(
            f"{name}: {model.engine.rows} sequences of {model.engine.T} tokens at a time. Browser: {url}  API: {url}v1"
        )

    app.serve(model, name, host=host, port=port, queue=queue, folders=folders, names=names, codec=codec,
              ready=ready)  # fmt: skip
