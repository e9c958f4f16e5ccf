"""Text from a model: prompt in, tokens out, one at a time.

Sampling has its own generator, seeded per text, so it never disturbs training and the same call gives the same text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

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
    generator = torch.Generator(device="cpu").manual_seed(seed)
    window = list(prompt)[-engine.T :]
    for _ in range(count):
        check()
        logits = engine.next_logits(torch.tensor([window]))[0].float().cpu()
        if temperature == 0.0:
            token = int(logits.argmax())
        else:
            if 0 < top_k < logits.numel():
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator))
        if token == stop:
            return
        yield token
        window = [*window, token][-engine.T :]


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
        if tokens < 1 or temperature < 0 or top_k < 0:
            raise ConfigError(
                f"tokens = {tokens} must be at least 1, temperature = {temperature:g} and top_k = {top_k} at least 0."
            )
        return sample_text(self.engine, self.tokenizer, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)
