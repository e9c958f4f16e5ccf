"""Validation loss over a fixed budget of tokens, the same ones each time whatever the batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from daybreak.config import Config
from daybreak.data.dataset import check_tokenizer, text_bytes
from daybreak.data.loader import Loader
from daybreak.data.mixing import named, open_loaders, packed_rows
from daybreak.data.pictures import Pictures
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError
from daybreak.parallel import ALONE, Check, Group


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per target that counts, how many those are, and the loss in bits per UTF-8 byte (which does not
    depend on the tokenizer). For a model of pictures also the loss of text and of pictures apart, in nats per target;
    neither counts end of text and the marks around a picture. NaN: there are none. It was of `sequences` samples of T
    tokens."""

    loss: float
    tokens: int
    bits_per_byte: float
    text: float = math.nan
    image: float = math.nan
    sequences: int = 0
    T: int = 0


def validate(
    engine: Engine, loader: Loader, lengths: NDArray[Any], budget: int, check: Check = lambda: None,
    group: Group = ALONE, pictures: Pictures | None = None,
) -> Validation:  # fmt: skip
    """Loss of the first `budget` tokens of `loader` in whole samples (`Loader.parts`); of a mixture, of each source's
    share of them. `check` runs before each batch; lengths: bytes of each token (`data.dataset.text_bytes`).
    pictures: where they are among the ids. Collective: ranks take batches in turn.

    Bits per byte leave out tokens without bytes (end of text) on both sides. Targets of -1 count nowhere.
    """
    # The loss of all targets, of those with text, and of codes of pictures; how many those are; their bytes of text.
    sums = np.zeros(7)
    parts = loader.parts(budget)
    rounds = ((*part, at) for part in parts for at in range(0, part[1], engine.B * group.world))
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
        text, code = length > 0, np.zeros_like(counts)
        if pictures:
            code = (targets >= pictures.first) & (targets < pictures.boi)
        kinds = (counts, text, code)
        sums += *(losses.sum(dtype=np.float64, where=kind) for kind in kinds), *(k.sum() for k in kinds), length.sum()
    total, of_text, of_codes, tokens, texts, codes, size = group.numbers(sums.tolist())

    def mean(loss: float, count: float) -> float:
        return loss / count if count else math.nan

    apart = (mean(of_text, texts), mean(of_codes, codes)) if pictures else (math.nan, math.nan)
    extent = sum(samples for _, samples in parts), loader.T
    return Validation(mean(total, tokens), int(tokens), mean(of_text / math.log(2), size), *apart, *extent)


def validate_on(
    engine: Engine, config: Config, tokenizer: Tokenizer, name: str, beside: Path | None = None
) -> Validation:
    """Loss of a run's model on the validation split of data set `name`, of at most the run's eval.tokens tokens. Raises
    DataError if the data was tokenized otherwise. Where `name` fits several sets, the run's tokenizer decides. Packed
    rows need an engine with `documents`. beside: the run's folder, with the tokenizer of shards that have none."""
    data, V = named(config.data, name), engine.cfg.V
    rows = packed_rows(data, tokenizer.name)
    if rows > engine.T:
        fix = f"prepare it again with --row-tokens {engine.T}"
        raise ConfigError(f"{name} has rows of {rows} tokens, and the run's batch.T is {engine.T}; {fix}.")
    dataset, _, loader = open_loaders(data, rows or engine.T, 0, V, True, beside, tokenizer.name, held_out=True)
    check_tokenizer(dataset, get_tokenizer(dataset.tokenizer_name, dataset.folder), "the run", tokenizer.name)
    lengths = text_bytes(dataset, tokenizer, V)
    return validate(engine, loader, lengths, config.eval.tokens, pictures=tokenizer.pictures)
