"""`daybreak export`: a run's weights in the formats of other programs."""

from __future__ import annotations

from pathlib import Path

import click

from daybreak.errors import ConfigError

# Format -> what --dtype may be, its default first.
FORMATS = {
    "hf": ("fp32", "bf16", "fp16"),
    "gguf": ("f32", "f16", "bf16", "q8_0"),
    "llmc": ("bf16", "fp32"),
    "peft": ("fp32", "bf16", "fp16"),
}


@click.command()
@click.argument("run")
@click.option("--to", "to", type=click.Choice(list(FORMATS)), required=True, help="Format of the output.")
@click.argument("out")
@click.option("--dtype", metavar="D", help="hf, peft: fp32, bf16, fp16. gguf: f32, f16, bf16, q8_0. llmc: bf16, fp32.")
@click.option("--step", type=click.IntRange(0), metavar="N", help="Checkpoint to use (default: the newest).")
@click.option("--ranks", type=click.IntRange(1), default=1, metavar="P", help="llmc: state files.")
@click.option("--zero", type=click.IntRange(0, 1), default=0, metavar="Z", help="llmc: ZeRO stage.")
@click.option("--debug-state", is_flag=True, help="llmc: also write the file for its unit test.")
def export(
    run: str, to: str, out: str, dtype: str | None, step: int | None, ranks: int, zero: int, debug_state: bool
) -> None:
    """Write a run's weights for other programs.

    OUT must not exist yet.

    \b
    Formats:
      hf      a folder for transformers: config, tokenizer, safetensors
      gguf    a file for llama.cpp
      llmc    a folder that llm.c resumes from: model, optimizer state, tokenizer
      peft    a folder for PEFT: the adapters of a finetuned model, without the model
    The other formats have adapters merged into the weights.

    \b
    Examples:
      daybreak export runs/tiny --to hf tiny-hf --dtype bf16
      daybreak export runs/tiny --to gguf tiny.gguf --dtype q8_0
      daybreak export runs/tiny --to llmc log_tiny --ranks 8 --zero 1
    """
    dtype = dtype or FORMATS[to][0]
    if dtype not in FORMATS[to]:
        raise ConfigError(f"--dtype {dtype} is not one of {to}'s: {', '.join(FORMATS[to])}.")
    if to != "llmc" and (ranks > 1 or zero or debug_state):
        raise ConfigError(f"--ranks, --zero and --debug-state belong to --to llmc, not {to}; leave them out.")

    import torch

    from daybreak.interop import gguf, huggingface, llmc_files, peft
    from daybreak.interop.source import DTYPES, Export
    from daybreak.state.run import Run

    source, path = Export(Run(run).checkpoint(step), whole=to == "llmc"), Path(out)
    if to == "llmc" and source.tokenizer.source:
        own = f"a tokenizer.json of its own ({source.tokenizer.name})"
        raise ConfigError(f"{run} has {own}, which {to} cannot hold; use --to hf.")
    if to == "hf":
        huggingface.export(source, path, dtype)
    elif to == "gguf":
        gguf.export(source, path, dtype)
    elif to == "peft":
        peft.export(source, path, dtype)
    else:
        llmc_files.export(source, Run(run).config, path, dtype, ranks, zero, debug_state)
    click.echo(f"{path}: step {source.step} of {run} as {to}, {dtype}")
    if to == "peft" and (said := peft.unreadable(source.came_from)):
        click.echo(f"{path / peft.CONFIG}: {said}")
    if source.weights.adapters and to != "peft":
        click.echo(source.weights.said(DTYPES.get({"f16": "fp16"}.get(dtype, dtype), torch.float32)))
    if source.model.max_T < source.checkpoint.model.max_T:
        click.echo(f"its max_T is {source.model.max_T}, the run's batch.T: later positions were not trained")
