"""Text from a model: prompt in, tokens out, one at a time.

Sampling has its own generator, seeded per text, so it never disturbs training and the same call gives the same text.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError
from daybreak.state.run import Run


def sample_tokens(
    engine: Engine,
    prompt: Sequence[int],
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 1337,
    stop: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Yield up to `count` token ids that follow `prompt` (not empty); ends early at token `stop`.

    temperature 0 always takes the likeliest token; top_k > 0 samples among the k likeliest. The model sees at most the
    last T tokens. `check` runs before each token.
    """
    rng = np.random.default_rng(seed)
    window = np.array(prompt[-engine.T :], np.int64)
    for _ in range(count):
        check()
        logits = engine.next_logits(torch.from_numpy(window)).cpu().numpy()
        token = pick(logits, temperature, top_k, rng)
        if token == stop:
            return
        yield token
        window = np.append(window, token)[-engine.T :]


def pick(logits: NDArray[np.float32], temperature: float, top_k: int, rng: np.random.Generator) -> int:
    """One token id from logits (V): a draw from softmax(logits / temperature) over the top_k likeliest (0: all)."""
    if temperature == 0.0:
        return int(logits.argmax())
    z = (logits - logits.max()).astype(np.float64) / temperature
    if 0 < top_k < z.size:
        z[z < np.partition(z, -top_k)[-top_k]] = -np.inf
    cumulative = np.exp(z).cumsum()
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def sample_text(
    engine: Engine, tokenizer: Tokenizer, prompt: str, count: int, *, temperature: float, top_k: int, seed: int,
    check: Callable[[], None] = lambda: None,
) -> Iterator[str]:  # fmt: skip
    """Yield the pieces of text that follow `prompt`, which opens a document. Ends with the document."""
    ids = [tokenizer.eot, *(int(i) for i in tokenizer.encode(prompt))]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    for token in sample_tokens(
        engine, ids, count, temperature=temperature, top_k=top_k, seed=seed, stop=tokenizer.eot, check=check
    ):
        data = tokenizer.token_bytes(token) if token < tokenizer.V else b""
        if piece := decoder.decode(data):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


class Sampler:
    """Text from a run's newest checkpoint, or the one of `step`, loaded once. Raises ConfigError, CheckpointError."""

    def __init__(self, run_dir: Path | str, step: int | None = None) -> None:
        self.engine, self.tokenizer = Run(run_dir).load_engine(step)

    def text(
        self, prompt: str = "", tokens: int = 128, *, temperature: float = 1.0, top_k: int = 0, seed: int = 1337
    ) -> Iterator[str]:
        """Pieces of a text of up to `tokens` tokens that follows `prompt`."""
        if tokens < 1 or not 0 <= temperature < math.inf or top_k < 0:
            raise ConfigError(
                f"tokens = {tokens} must be at least 1, temperature = {temperature:g} finite and at least 0, "
                f"top_k = {top_k} at least 0."
            )
        return sample_text(self.engine, self.tokenizer, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)
