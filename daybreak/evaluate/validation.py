"""Validation loss over a fixed budget of tokens, the same ones each time whatever the batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from daybreak.config import Config
from daybreak.data.dataset import check_tokenizer, text_bytes
from daybreak.data.loader import Loader
from daybreak.data.mixing import named, open_loaders, packed_rows
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError
from daybreak.parallel import ALONE, Check, Group


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per target that counts, how many those are, and the loss in bits per UTF-8 byte (which does not
    depend on the tokenizer)."""

    loss: float
    tokens: int
    bits_per_byte: float


def validate(
    engine: Engine, loader: Loader, lengths: NDArray[Any], budget: int, check: Check = lambda: None,
    group: Group = ALONE,
) -> Validation:  # fmt: skip
    """Loss of the first `budget` tokens of `loader` in whole samples (`Loader.parts`); of a mixture, of each source's
    share of them. `check` runs before each batch; lengths: bytes of each token (`data.dataset.text_bytes`).
    Collective: ranks take batches in turn.

    Bits per byte leave out tokens without bytes (end of text) on both sides. Targets of -1 count nowhere.
    """
    sums = np.zeros(4)  # the loss of all targets, and of those with text; the targets; their bytes of text
    rounds = ((*part, at) for part in loader.parts(budget) for at in range(0, part[1], engine.B * group.world))
    for source, samples, round_ in rounds:
        check()
        first = round_ + group.rank * engine.B
        if first >= samples:
            continue
        batch = source.batch(first, min(engine.B, samples - first))
        targets = batch[1]
        losses = engine.eval_losses(*map(torch.from_numpy, batch)).cpu().numpy()
        counts = targets >= 0
        length = lengths[targets] * counts
        of_text = losses.sum(dtype=np.float64, where=length > 0)
        sums += losses.sum(dtype=np.float64), of_text, counts.sum(), length.sum()
    total, text_total, tokens, size = group.numbers(sums.tolist())
    bits = text_total / math.log(2)
    return Validation(total / tokens if tokens else math.nan, int(tokens), bits / size if size else math.nan)


def validate_on(engine: Engine, config: Config, tokenizer: Tokenizer, name: str) -> Validation:
    """Loss of a run's model on the validation split of data set `name`, of at most the run's eval.tokens tokens. Raises
    DataError if the data was tokenized otherwise. Where `name` fits several sets, the run's tokenizer decides. Packed
    rows need an engine with `documents`."""
    data, V = named(config.data, name), engine.cfg.V
    rows = packed_rows(data, tokenizer.name)
    if rows > engine.T:
        raise ConfigError(f"{name} has rows of {rows} tokens, and the run's batch.T is {engine.T}; pack shorter rows.")
    dataset, _, loader = open_loaders(data, rows or engine.T, config.run.seed, V, prefer=tokenizer.name)
    check_tokenizer(dataset, get_tokenizer(dataset.tokenizer_name, dataset.folder), "the run", tokenizer.name)
    return validate(engine, loader, text_bytes(dataset, tokenizer, V), config.eval.tokens)
