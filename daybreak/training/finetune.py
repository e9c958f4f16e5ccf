"""Finetuning: a training run that starts from a model's weights, with other defaults than pretraining has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daybreak.config import LENGTH, Config, run_of
from daybreak.data.chat import TEMPLATE_FILE
from daybreak.data.dataset import given_as
from daybreak.data.mixing import open_loaders, packed_rows
from daybreak.data.tokenizer import TOKENIZER_FILE
from daybreak.errors import ConfigError
from daybreak.formatting import quoted
from daybreak.interop import open_source
from daybreak.manifest import is_run
from daybreak.parallel import launched
from daybreak.training.origin import checkpoint_of

LONGEST, SAMPLES = 1024, 16  # tokens of a sequence, and sequences of a step, where nothing else is asked for
# Learning rates, betas and decay as TRL and torchtune have them; two epochs as Tulu 3.
DEFAULTS: Mapping[str, Any] = {
    "optim.beta2": 0.999, "optim.weight_decay": 0.0, "schedule.name": "linear", "run.epochs": 2.0,
    "eval.every": 50, "eval.sample_every": 50, "checkpoint.every": 250,
}  # fmt: skip
LORA: Mapping[str, Any] = {"optim.lr": 2e-4, "lora.rank": 16}
BY_METHOD = {"lora": LORA, "qlora": {**LORA, "lora.base": "nf4"}, "full": {"optim.lr": 2e-5}}


def finetune_config(model: str, method: str, given: Mapping[str, Any]) -> Config:
    """The checked configuration of a run that starts from `model`: a run, or what interop.open_source knows.

    given: dotted keys with values, data.name among them. Raises ConfigError, CheckpointError, DataError.
    """
    if "data.name" not in given and "data.train" not in given:
        raise ConfigError("finetune needs --data NAME, a data set that was prepared with the model's tokenizer.")
    if odd := next((name for name in given if name.startswith("model.") and name != "model.max_T"), None):
        raise ConfigError(f"--{odd} cannot be given to finetune: the shape comes with the weights; leave it out.")
    if method == "full" and given.get("lora.rank"):
        raise ConfigError("--lora.rank gives adapters, and --method full trains all parameters; give only one of them.")
    if is_run(run_of(model)):
        checkpoint = checkpoint_of(model)
        tokenizer = given.get("data.tokenizer") or checkpoint.manifest["tokenizer"]["name"]
        shape, path = checkpoint.model, run_of(model).resolve()
    else:
        source = open_source(model, given.get("data.tokenizer", ""))
        shape, tokenizer, path = source.model, source.tokenizer.name, Path(model)
    name = path.stem if path.suffix in (".gguf", ".bin") else path.name
    made = {"run.name": f"{name}-{method}", **DEFAULTS, **BY_METHOD[method]}
    if not given.keys().isdisjoint(LENGTH):
        made |= dict.fromkeys(LENGTH, 0)
    config = Config(model=shape).override({**made, **given, "data.tokenizer": tokenizer})
    run, give = run_of(model), given_as(tokenizer)
    if (run / TOKENIZER_FILE).is_file() and not given.get("data.tokenizer"):
        give = quoted(run / TOKENIZER_FILE)  # perhaps with a chat template beside it
    elif (run / TEMPLATE_FILE).is_file():  # which `prepare` finds only beside a file
        give = f"MODEL/{TOKENIZER_FILE} (daybreak export {quoted(model)} --to hf MODEL makes it)"
    rows = packed_rows(config.data, give=give)
    batch, world = config.batch, int(launched(os.environ)["WORLD_SIZE"])
    if rows > (longest := config.model.max_T):
        said = f"the packed rows of {config.data.train or config.data.name} have {rows} tokens"
        raise ConfigError(f"{said}, and the model reads at most {longest}; prepare them with --row-tokens {longest}.")
    T = batch.T or rows or min(shape.max_T, LONGEST)
    config = config.override({"batch.T": T, "data.packed": rows > 0})
    config.check()  # before the loader, which may take other values
    samples = open_loaders(config.data, T, config.run.seed, config.model.V)[1].samples_per_epoch
    B = batch.B if "batch.B" in given else max(1, min(batch.B, samples // world))  # a few chats are a single row
    total = batch.total_tokens or T * B * world * max(1, min(SAMPLES, samples) // (B * world))
    config = config.override({"batch.B": B, "batch.total_tokens": total})
    if method != "full" and not config.lora.rank:
        raise ConfigError("lora.rank = 0 gives no adapters; use a rank of at least 1, or --method full.")
    config.check()
    return config
