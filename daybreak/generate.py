"""Text from a model: prompts in, tokens out, several texts at a time.

Keys and values of every text are kept in the engine's cache, one row a text, so a token costs one position and not the
whole text again. A text longer than T goes on in a sliding window: its places change with every token, so the cache is
of no use there. Each text is sampled by its own generator: the same call gives the same text, and training is not
disturbed.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError
from daybreak.state.run import Run

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How a text goes on: up to `tokens` tokens; temperature 0 takes the likeliest; top_k > 0 draws among the k
    likeliest, top_p < 1 among the fewest that have that probability together; the first of `stop` ends it."""

    tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1337
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # keep each token's log-probability and this many likeliest alternatives

    def check(self) -> None:
        """Raise ConfigError, naming the field, its value and its rule."""
        if self.tokens < 0:
            raise ConfigError(f"tokens = {self.tokens} must be at least 0.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature:g} must be finite and at least 0.")
        if self.top_k < 0 or self.seed < 0:
            raise ConfigError(f"top_k = {self.top_k} and seed = {self.seed} must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p:g} must be above 0 and at most 1.")
        if "" in self.stop:
            raise ConfigError("stop = '' must not be empty; leave it out.")


DEFAULT = Sampling()


class Token(NamedTuple):
    """One token: log-probability before temperature and cuts, and the likeliest alternatives with theirs."""

    id: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()


def pick(logits: Logits, temperature: float, top_k: int, rng: np.random.Generator, top_p: float = 1.0) -> int:
    """One token id from logits (V): a draw from softmax(logits / temperature) over the top_k likeliest (0: all), and
    of these over the fewest that together have top_p of the probability."""
    if temperature == 0.0:
        return int(logits.argmax())
    z = (logits - logits.max()).astype(np.float64) / temperature
    if 0 < top_k < z.size:
        z[z < np.partition(z, -top_k)[-top_k]] = -np.inf
    p = np.exp(z)
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p * p.sum()]] = 0
    cumulative = p.cumsum()
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def token_of(logits: Logits, token: int, logprobs: int | None) -> Token:
    """The token with what its logits (V) say, if asked for."""
    if logprobs is None:
        return Token(token)
    z = logits.astype(np.float64)
    z -= z.max()
    z -= np.log(np.exp(z).sum())
    best = np.argpartition(-z, min(logprobs, z.size - 1))[:logprobs]
    best = best[np.lexsort((best, -z[best]))]
    return Token(token, float(z[token]), tuple((int(i), float(z[i])) for i in best))


def score(engine: Engine, ids: Sequence[int], logprobs: int | None) -> list[Token]:
    """The tokens of a text (at most T + 1) from the second on, with what the model says of them."""
    if len(ids) < 2:
        return []
    logits = engine.logits(torch.tensor([ids[:-1]]))[0].float().cpu().numpy()
    return [token_of(x, token, logprobs) for x, token in zip(logits, ids[1:], strict=True)]


class Text:
    """One text under way: prompt, tokens made, and what they spell so far.

    A character may span tokens, and so may a stop string, which ends the text before it: what could be the beginning
    of either is not yet in `text`. `done` becomes "stop" (the document's end, or a stop string) or "length". Without a
    tokenizer nothing is spelt and only "length" ends it.
    """

    def __init__(self, prompt: Sequence[int], how: Sampling, tokenizer: Tokenizer | None = None) -> None:
        assert prompt, "a text has at least one token to go on from"
        self.ids, self.how, self.tokenizer = list(prompt), how, tokenizer
        self.made: list[Token] = []
        self.starts: list[int] = []  # of each token's text
        self.text, self._held = "", ""
        self.done = "" if how.tokens else "length"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rng = np.random.default_rng(how.seed)

    def take(self, logits: Logits) -> None:
        """Pick the next token."""
        how = self.how
        token = pick(logits, how.temperature, how.top_k, self._rng, how.top_p)
        if self.tokenizer and token == self.tokenizer.eot:
            self.done = "stop"
        else:
            self.made.append(token_of(logits, token, how.logprobs))
            self.ids.append(token)
            self.starts.append(len(self.text) + len(self._held))
            if len(self.made) == how.tokens:
                self.done = "length"
        if self.tokenizer:
            known = self.done != "stop" and token < self.tokenizer.V
            self._spell(self._decoder.decode(self.tokenizer.token_bytes(token) if known else b"", bool(self.done)))

    def _spell(self, piece: str) -> None:
        self._held += piece
        if found := [at for stop in self.how.stop if (at := self._held.find(stop)) >= 0]:
            self.text, self._held, self.done = self.text + self._held[: min(found)], "", "stop"
            return
        begun = [n for stop in self.how.stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        cut = len(self._held) - max(begun if begun and not self.done else [0])
        self.text, self._held = self.text + self._held[:cut], self._held[cut:]


class Batch:
    """Texts under way in one engine, at most `engine.rows`; they may come and go between any two tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.texts: dict[int, Text] = {}  # by row of the cache

    @property
    def room(self) -> int:
        """Texts that can join."""
        return self.engine.rows - len(self.texts)

    def add(self, texts: Sequence[Text]) -> None:
        """Let texts join, at most `room`, and give each its first token. Short ones are read together."""
        T, capacity = self.engine.T, self.engine.B * self.engine.T
        waiting = [text for text in texts if not text.done]
        while waiting:
            row = min(set(range(self.engine.rows)) - set(self.texts))
            free = next(n for n in range(1, self.engine.rows + 1) if row + n in {*self.texts, self.engine.rows})
            many = 1
            while many < min(free, len(waiting)) and (many + 1) * _longest(waiting[: many + 1], T) <= capacity:
                many += 1
            now, waiting = waiting[:many], waiting[many:]
            logits = self.engine.prefill(row, [text.ids[-T:] for text in now]).numpy()
            self.texts |= {row + i: text for i, text in enumerate(now)}
            self._take({row + i: logits[i] for i in range(many)})

    def step(self) -> None:
        """One more token for each text. Those that are done leave."""
        T = self.engine.T
        inside = {row: text for row, text in self.texts.items() if len(text.ids) <= T}
        if inside:
            rows = range(max(inside) + 1)
            tokens = [inside[row].ids[-1] if row in inside else 0 for row in rows]
            places = [len(inside[row].ids) - 1 if row in inside else 0 for row in rows]
            logits = self.engine.decode(tokens, places).numpy()
            self._take({row: logits[row] for row in inside})
        for row in [row for row in self.texts if row not in inside]:
            window = self.texts[row].ids[-T:]
            self._take({row: self.engine.prefill(row, [window])[0].numpy()})

    def _take(self, logits: dict[int, Logits]) -> None:
        for row, x in logits.items():
            self.texts[row].take(x)
            if self.texts[row].done:
                del self.texts[row]

    def drop(self, texts: Sequence[Text]) -> None:
        """Let texts leave before they are done."""
        self.texts = {row: text for row, text in self.texts.items() if text not in texts}


def _longest(texts: Sequence[Text], T: int) -> int:
    return min(T, max(len(text.ids) for text in texts))


def write_all(engine: Engine, texts: Sequence[Text]) -> None:
    """Write texts to their ends, as many at a time as the cache has rows."""
    batch, waiting = Batch(engine), texts
    while waiting or batch.texts:
        batch.step()
        joining, waiting = waiting[: batch.room], waiting[batch.room :]
        batch.add(joining)


def open_document(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt that opens a document."""
    return [tokenizer.eot, *(int(i) for i in tokenizer.encode(prompt))]


def sample_text(
    engine: Engine, tokenizer: Tokenizer, prompt: str, how: Sampling, check: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Yield the pieces of text that follow `prompt`, which opens a document. Ends with the document. `check` runs
    before each token."""
    text, batch, sent = Text(open_document(tokenizer, prompt), how, tokenizer), Batch(engine), 0
    while not text.done:
        check()
        batch.step() if text.made else batch.add([text])
        if len(text.text) > sent:
            yield text.text[sent:]
            sent = len(text.text)


class Sampler:
    """Text from a run's newest checkpoint, or the one of `step`, loaded once; `rows` prompts at a time.

    Raises ConfigError, CheckpointError."""

    def __init__(self, run_dir: Path | str, step: int | None = None, rows: int = 1) -> None:
        self.engine, self.tokenizer = Run(run_dir).load_engine(step, rows=rows)

    def text(self, prompt: str = "", how: Sampling = DEFAULT) -> Iterator[str]:
        """Pieces of the text that follows `prompt`. Raises ConfigError."""
        how.check()
        return sample_text(self.engine, self.tokenizer, prompt, how)

    def texts(self, prompts: Sequence[str], how: Sampling = DEFAULT) -> list[str]:
        """What follows each of the prompts, the i-th sampled with seed + i. Raises ConfigError."""
        how.check()
        ids = [open_document(self.tokenizer, prompt) for prompt in prompts]
        texts = [Text(x, replace(how, seed=how.seed + i), self.tokenizer) for i, x in enumerate(ids)]
        write_all(self.engine, texts)
        return [text.text for text in texts]
