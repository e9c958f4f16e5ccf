"""In and out: Hugging Face, llm.c's files, GGUF. `open_source` tells what it was given by its form."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from daybreak.config import run_hint
from daybreak.errors import ConfigError
from daybreak.manifest import is_run

if TYPE_CHECKING:
    from daybreak.config_keys import LoraConfig
    from daybreak.data.chat import Template
    from daybreak.data.tokenizer import Tokenizer
    from daybreak.engine import Engine
    from daybreak.interop.source import Source

# The published GPT-2 models, by the names people use for them; openai-community/NAME on the hub.
HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


class Model(NamedTuple):
    """A model that generates text. A model that does not chat has no template."""

    engine: Engine
    tokenizer: Tokenizer
    template: Template | None = None


def load_model(
    target: str | Path, step: int | None = None, *, rows: int = 1, device: str | None = None,
    lora: LoraConfig | None = None,
) -> Model:  # fmt: skip
    """A run, or what `open_source` knows, with an engine that generates `rows` sequences at a time.

    step: which checkpoint (None: the newest). lora: see `engine_with`. Raises ConfigError, CheckpointError, DataError,
    OutOfMemory.
    """
    from daybreak.config import Config
    from daybreak.data.chat import Template
    from daybreak.interop.source import with_model
    from daybreak.state.run import Run, engine_with

    if is_run(Path(target)):
        run = Run(target)
        engine, tokenizer = run.load_engine(step, rows=rows, device=device, lora=lora)
        return Model(engine, tokenizer, Template.load(run.path, tokenizer))
    if is_run(named := Path("runs") / target) and not Path(target).exists():
        raise ConfigError(f"{target} does not exist; did you mean {named}?")
    source = open_source(target, "", step, also="a run, ")
    engine = engine_with(with_model(Config(), source), source, rows=rows, device=device, lora=lora)
    return Model(engine, source.tokenizer, Template.of(source.kept, source.path, source.tokenizer))


def open_source(name: str | Path, tokenizer: str = "", step: int | None = None, also: str = "") -> Source:
    """Weights to start from: a Hugging Face folder, a .gguf file, a model .bin or checkpoint folder of llm.c, or a name
    on the hub.

    An existing path goes first. tokenizer: a name or file, instead of what is beside the weights. step: which of
    llm.c's checkpoints (None: the newest). also: what else the caller takes, for messages.
    Raises ConfigError for an unknown name, CheckpointError for what cannot be used.
    """
    from daybreak.interop import gguf, huggingface, llmc_files, peft

    path = Path(name).expanduser()
    if path.is_dir() and llmc_files.done_steps(path):
        return llmc_files.open_folder(path, step, tokenizer)
    if step is not None:
        raise ConfigError(f"--step {step} chooses among llm.c's DONE_* checkpoints, and {name} is no folder with any.")
    if (path / peft.CONFIG).is_file():
        return peft.open_folder(path, open_source(peft.base_of(path), tokenizer))
    if (path / "config.json").is_file():
        return huggingface.open_folder(path, tokenizer)
    if path.suffix == ".gguf" and path.is_file():
        return gguf.open_file(path, tokenizer)
    if path.is_file():
        return llmc_files.open_model(path, tokenizer)
    repository = f"openai-community/{name}" if str(name) in HUB else str(name)
    elsewhere = str(name) in HUB or not path.parent.exists()  # runs/typo stays here
    if elsewhere and not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        return huggingface.open_folder(huggingface.download(repository, run_hint(name)), tokenizer)
    files = "a Hugging Face folder, a .gguf file, a .bin or a checkpoint folder of llm.c"
    known = f"{also}{', '.join(HUB)}, OWNER/NAME, {files}"
    if path.exists():
        raise ConfigError(f"{name} has neither config.json nor DONE_* files{run_hint(name) or f'; give {known}.'}")
    similar = difflib.get_close_matches(str(name)[:100], HUB, 1)  # or it is a path
    near = run_hint(name) or (f"; did you mean {similar[0]!r}?" if similar else "")
    raise ConfigError(f"{name} does not exist{near}{' If not,' if near else ';'} give {known}.")
