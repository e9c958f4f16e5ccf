"""Pictures from a model: a caption in, exactly N codes out.

Of the logits only those of codes count, so what follows boi is always a picture. With guidance (Ho & Salimans 2022, as
in LlamaGen) a picture has two rows of the engine's cache: one that reads the caption, one that reads none. Its logits
are none + guidance (caption - none), and both rows take the same code.

    row 0   EOT . . a red circle boi | c_1 c_2 ...
    row 1   EOT . . . . . . . .  boi | c_1 c_2 ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from daybreak.data.pictures import Pictures
from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError
from daybreak.generate import Sampling, choose


def pictures_of(tokenizer: Tokenizer, where: str | Path) -> Pictures:
    """Where pictures are among the ids of a tokenizer. ConfigError if it has none."""
    if tokenizer.pictures is None:
        raise ConfigError(f"{where} has learned text only, and draws no pictures; train one on a set of pictures.")
    return tokenizer.pictures


def head(tokenizer: Tokenizer, pictures: Pictures, caption: str) -> list[int]:
    """The ids of a document up to where its picture begins. ConfigError for a caption that is too long."""
    ids = tokenizer.encode(caption)
    if ids.size > pictures.room:
        said = f"the prompt has {ids.size} tokens, and before a picture there is room for {pictures.room}"
        raise ConfigError(f"{said}; shorten {caption[:40]!r}.")
    return pictures.head(ids.tolist(), tokenizer.eot)


def draw(
    engine: Engine, tokenizer: Tokenizer, captions: Sequence[str], how: Sampling, guidance: float = 1.0,
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.int64]:  # fmt: skip
    """The codes (n, N) of a picture for each caption, the i-th with seed + i; "" is a picture of any kind.

    As many are drawn at a time as the engine has rows; with guidance other than 1 each takes two. `check` runs before
    each code. Raises ConfigError for a caption that is too long."""
    pictures = pictures_of(tokenizer, "this model")
    pairs = [[head(tokenizer, pictures, text) for text in (c, "")[: 1 + (guidance != 1)]] for c in captions]
    each = max(1, engine.rows // (1 + (guidance != 1)))
    made = [
        _drawn(engine, pictures, pairs[at : at + each], how, how.seed + at, guidance, check)
        for at in range(0, len(pairs), each)
    ]
    return np.concatenate(made)


def _drawn(
    engine: Engine, pictures: Pictures, pairs: Sequence[Sequence[list[int]]], how: Sampling, seed: int,
    guidance: float, check: Callable[[], None],
) -> NDArray[np.int64]:  # fmt: skip
    """The codes of the pictures that are drawn together."""
    rows, each, first = [row for pair in pairs for row in pair], len(pairs[0]), pictures.first
    random = [np.random.default_rng(seed + i) for i in range(len(pairs))]
    made = np.empty((len(pairs), pictures.N), np.int64)
    check()
    logits = torch.cat([engine.prefill(i, [row]).clone() for i, row in enumerate(rows)])
    for n in range(pictures.N):
        x = logits[:, first : first + pictures.K].float()
        if each == 2:
            x = x[1::2] + guidance * (x[0::2] - x[1::2])
        given = x.numpy() if x.device.type == "cpu" else x
        made[:, n] = choose(given, [how] * len(pairs), [r.random() for r in random]).tolist()
        if n + 1 < pictures.N:
            check()
            place = len(rows[0]) + n
            logits = engine.decode((made[:, n].repeat(each) + first).tolist(), [place] * len(rows))
    return made
