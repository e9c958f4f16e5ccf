"""Text from a model: prompts in, tokens out, several sequences at a time.

The engine's cache keeps keys and values of every sequence in one row, so each new token costs one position and not the
whole sequence again:

    row 0   prompt . . . . | a b c d           `Batch.add` reads prompts, several short ones together (prefill)
    row 1   prompt . | e f g h i               `Batch.step` makes one more token of every row (decode)
    row 2                                      free: another sequence may join before any token

A sequence longer than T continues in a sliding window. Its positions change with every token, so the cache is of no use
there. Each sequence has its own random generator. So the same call gives the same text, and training is not disturbed.
"""

from __future__ import annotations

import codecs
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from daybreak.checked import Rule
from daybreak.config_keys import FRACTION, at_least, key, within
from daybreak.data.chat import Message, Template
from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError
from daybreak.state.run import Run

Logits = NDArray[np.float32]
BLOCK = 512  # of a running sum


NOT_NEGATIVE = Rule("must be finite and at least 0", lambda x: bool(0 <= x < math.inf))
ABOVE_0 = Rule("must be finite and above 0", lambda x: bool(0 < x < math.inf))
SHARE = Rule("must be above 0 and at most 1", lambda x: bool(0 < x <= 1))
BIASES = Rule("must hold biases from -100 to 100", lambda pairs: all(-100 <= bias <= 100 for _, bias in pairs))
STOPS = Rule("must hold no empty text; leave it out", lambda texts: "" not in texts)


@dataclass(frozen=True)
class Sampling:
    """How a sequence continues. Temperature 0 takes the likeliest token. The first of `stop` that appears ends it."""

    tokens: int = key(128, "the most tokens to generate", at_least(0))
    temperature: float = key(1.0, "0 = always the likeliest token", NOT_NEGATIVE)
    top_k: int = key(0, "draw among this many likeliest tokens; 0 = all", at_least(0))
    top_p: float = key(1.0, "draw among the fewest likeliest tokens that together have this probability", SHARE)
    seed: int = key(1337, "same seed, same text", at_least(0))
    stop: tuple[str, ...] = key((), "end before any of these texts", STOPS)
    logprobs: int | None = key(None, "keep each token's log-probability and this many likeliest alternatives")
    min_p: float = key(0.0, "only tokens that have at least this share of the likeliest's probability", FRACTION)
    frequency_penalty: float = key(0.0, "taken from a token's logit for each time that it was generated", within(-2, 2))
    presence_penalty: float = key(0.0, "taken once if the text has generated it", within(-2, 2))
    repetition_penalty: float = key(1.0, "divides a known token's logit if positive, else multiplies it", ABOVE_0)
    logit_bias: tuple[tuple[int, float], ...] = key((), "token ids, and what is added to their logits", BIASES)

    @property
    def adjusts(self) -> bool:
        """Whether a penalty or a bias changes logits."""
        penalties = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1
        return bool(self.logit_bias or penalties)

    def check(self) -> None:
        """Raise ConfigError, naming the field, its value and its rule."""
        for field in fields(self):
            rule, value = field.metadata["rule"], getattr(self, field.name)
            if rule is not None and not rule.holds(value):
                raise ConfigError(f"{field.name} = {value} {rule.text}.")


DEFAULT = Sampling()


class Token(NamedTuple):
    """One token with its log-probability before temperature and cuts, and the likeliest alternatives with theirs."""

    id: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Any, hows: Sequence[Sampling], draws: Sequence[float]) -> Any:
    """One token id (b) from each row of logits (b, V) in fp32: a draw from softmax(logits / temperature) over the top_k
    likeliest (0: all), and of these over the fewest that together have top_p of the probability. `draws`: a random
    number in [0, 1) for each row. A numpy array gives an array, a tensor a tensor on its device.

    Of equal probabilities top_p takes lower ids first; top_k keeps all that equal the k-th. Probabilities are whole
    numbers of 2^-52 / V of the likeliest's, so every sum is exact in fp64 and no order of summing changes the token.
    """
    if not any(how.temperature for how in hows):
        return logits.argmax(-1)
    rows = [
        (max(h.temperature or 1.0, 1e-30), h.top_k, h.top_p, h.min_p, u, h.temperature)
        for h, u in zip(hows, draws, strict=True)
    ]
    numbers, top_k = np.array(rows), max(how.top_k for how in hows)
    cuts = (top_k, any(how.top_p < 1 for how in hows), any(how.min_p for how in hows))
    if not isinstance(logits, Tensor):
        return _drawn(logits, numbers, *cuts)
    if logits.device.type == "cpu":
        return _drawn(logits, torch.from_numpy(numbers), *cuts)
    kind = (get_ident(), logits.device, logits.shape, logits.dtype, bool(top_k), *cuts[1:])
    if kind not in _replays:
        _replays[kind] = _Replay(logits, numbers, *cuts)
    return _replays[kind](logits, numbers)


def _drawn(logits: Any, numbers: Any, most: int, top_p_cuts: bool, min_p_cuts: bool) -> Any:
    """`choose` without a wait for the device. numbers: (b, 6), the settings of each row. most: the largest top_k, 0 if
    no row uses it.

    Arrays are for a CPU, where steps allocate no tensors. There it sorts only the likeliest tokens. A GPU sorts all,
    which is faster than asking it how many are enough."""
    V = logits.shape[-1]
    xp: Any = np
    ids: Any = np.arange(V)
    if isinstance(logits, Tensor):
        xp, ids = torch, torch.arange(V, device=logits.device)
    temperature, top_k, top_p, min_p, draw, hot = numbers.T[..., None]
    whole = 2.0 ** (52 - V.bit_length())
    p = xp.round(xp.exp((logits - xp.amax(logits, -1)[:, None]) / temperature) * whole)
    if min_p_cuts:
        p = p * (p >= min_p * whole)
    if most or top_p_cuts:
        s = _largest(p, min(V, max(most, 1 + V // 32 if top_p_cuts else 0)))
    if most:
        least = xp.where(top_k > 0, _at(s, top_k[:, 0].clip(1, s.shape[-1]) - 1), 0)
        p, s = p * (p >= least), s * (s >= least)
    if top_p_cuts:
        enough = xp.ceil(top_p * p.sum(-1)[:, None])
        if xp is np and (s.sum(-1)[:, None] < enough).any():
            s = _largest(p, V)
        last = _reach(s, enough)
        least = _at(s, last)
        final = _reach((p == least) * 1.0, last[:, None] + 1 - (s > least).sum(-1)[:, None])
        p = p * ((p > least) | ((p == least) & (ids <= final[:, None])))
    total = p.sum(-1)[:, None]
    drawn = _reach(p, xp.minimum(xp.floor(draw * total) + 1, total))
    return xp.where(hot[:, 0] > 0, drawn, logits.argmax(-1))


class _Replay:
    """`_drawn` on a GPU as a CUDA graph, because its fifty small launches take longer than a small model's token."""

    def __init__(self, logits: Tensor, numbers: NDArray[np.float64], *cuts: Any) -> None:
        self._logits, self._numbers = logits.clone(), torch.from_numpy(numbers).to(logits.device)
        _drawn(self._logits, self._numbers, *cuts)  # loads what a capture may not load
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._ids: Tensor = _drawn(self._logits, self._numbers, *cuts)

    def __call__(self, logits: Tensor, numbers: NDArray[np.float64]) -> Tensor:
        self._logits.copy_(logits)
        self._numbers.copy_(torch.from_numpy(numbers))
        self._graph.replay()
        return self._ids


_replays: dict[tuple[Any, ...], _Replay] = {}  # by thread, and by all that a graph cannot change


def _largest(p: Any, n: int) -> Any:
    """The n largest values of each row of an array, from the largest down; of a tensor all."""
    if isinstance(p, Tensor):
        return p.sort(-1, descending=True).values
    return np.sort(np.partition(p, p.shape[-1] - n)[:, p.shape[-1] - n :])[:, ::-1]


def _at(values: Any, places: Any) -> Any:
    """The entry of each row at its place, as a column. The host neither waits for a GPU nor copies indices to it."""
    if isinstance(values, Tensor):
        return torch.take_along_dim(values, places.long()[:, None], 1)
    return np.take_along_axis(values, places.astype(np.int64)[:, None], 1)


def _reach(values: Any, target: Any) -> Any:
    """The places (b) where the running sum of values (b, V), whole numbers, reaches target (b, 1).

    It works in two stages, because a GPU sums a long row step by step."""
    (b, V), pad = values.shape, -values.shape[-1] % BLOCK
    whole = (
        torch.constant_pad_nd(values, (0, pad)) if isinstance(values, Tensor) else np.pad(values, ((0, 0), (0, pad)))
    )
    blocks = whole.reshape(b, -1, BLOCK)
    ends = blocks.sum(-1).cumsum(-1)
    block = (ends < target).sum(-1).clip(max=ends.shape[-1] - 1)
    inside = _at(blocks, block[:, None])[:, 0].cumsum(-1)
    place = (inside < target - (_at(ends, block) - inside[:, -1:])).sum(-1)
    return (block * BLOCK + place).clip(max=V - 1)


def adjusted(logits: Logits, text: Text) -> Logits:
    """Logits (V) after the sequence's bias and penalties; the same array if it has none."""
    how = text.how
    if not how.adjusts:
        return logits
    x = logits.copy()
    if how.repetition_penalty != 1:
        seen = sorted(set(text.ids))
        x[seen] = np.where(x[seen] > 0, x[seen] / how.repetition_penalty, x[seen] * how.repetition_penalty)
    for token, times in Counter(token.id for token in text.made).items():
        x[token] -= how.frequency_penalty * times + how.presence_penalty
    for token, bias in how.logit_bias:
        x[token] += bias
    return x


def token_of(logits: Logits, token: int, logprobs: int | None) -> Token:
    """The token, with log-probabilities from its logits (V) if they are asked for."""
    if logprobs is None:
        return Token(token)
    z = logits.astype(np.float64)
    z -= z.max()
    z -= np.log(np.exp(z).sum())
    best = np.argpartition(-z, min(logprobs, z.size - 1))[:logprobs]
    best = best[np.lexsort((best, -z[best]))]
    return Token(token, float(z[token]), tuple((int(i), float(z[i])) for i in best))


def score(engine: Engine, ids: Sequence[int], logprobs: int | None) -> list[Token]:
    """The tokens of a sequence (at most T + 1) from the second on, with their log-probabilities."""
    if len(ids) < 2:
        return []
    logits = engine.logits(torch.tensor([ids[:-1]]))[0].float().cpu().numpy()
    return [token_of(x, token, logprobs) for x, token in zip(logits, ids[1:], strict=True)]


class Text:
    """One sequence: its prompt, the tokens generated, and their text so far.

    A character may span tokens, and so may a stop string, which ends the text before it. Anything that could be the
    beginning of either is not yet in `text`. `done` becomes "stop" (the document's end, or a stop string) or "length".
    Without a tokenizer there is no text, and only "length" ends the sequence. adapter: see `Batch`. codes: the only ids
    that it may take, which are those of a picture; None: all of text.
    """

    def __init__(
        self, prompt: Sequence[int], how: Sampling, tokenizer: Tokenizer | None = None, adapter: str = "",
        codes: range | None = None,
    ) -> None:  # fmt: skip
        assert prompt, "a prompt has at least one token"
        self.codes = codes
        self.ids, self.how, self.tokenizer, self.adapter = list(prompt), how, tokenizer, adapter
        self.made: list[Token] = []
        self.starts: list[int] = []  # of each token's text
        self.text, self._held = "", ""
        self.done = "" if how.tokens else "length"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rng = np.random.default_rng(how.seed)

    def draw(self) -> float:
        """The random number for the next token. Greedy sequences use none."""
        return self._rng.random() if self.how.temperature else 0.0

    def take(self, token: int, logits: Logits | None = None) -> None:
        """Add a token. Its log-probability needs the logits (V) that it was chosen from."""
        if self.tokenizer and token in self.tokenizer.ends:
            self.done = "stop"
        else:
            self.made.append(Token(token) if logits is None else token_of(logits, token, self.how.logprobs))
            self.ids.append(token)
            self.starts.append(len(self.text) + len(self._held))
            if len(self.made) == self.how.tokens:
                self.done = "length"
        if self.tokenizer:
            known = self.done != "stop" and token < self.tokenizer.V
            self._spell(self._decoder.decode(self.tokenizer.token_bytes(token) if known else b"", bool(self.done)))

    def _spell(self, piece: str) -> None:
        self._held += piece
        if found := [at for stop in self.how.stop if (at := self._held.find(stop)) >= 0]:
            self.text, self._held, self.done = self.text + self._held[: min(found)], "", "stop"
            return
        held, stops = self._held, self.how.stop
        begun = [n for stop in stops for n in range(1, min(len(stop), len(held) + 1)) if held.endswith(stop[:n])]
        cut = len(self._held) - max(begun if begun and not self.done else [0])
        self.text, self._held = self.text + self._held[:cut], self._held[cut:]


class Batch:
    """The sequences of one engine, at most `engine.rows`. They may join and leave between any two tokens.

    use: sets the engine's adapter to a text's before each call. Rows of other adapters take part in a call of `decode`
    too. It writes their next token's keys and values, which their own call then overwrites, before they are read."""

    def __init__(self, engine: Engine, use: Callable[[str], None] = lambda adapter: None) -> None:
        self.engine, self.use, self.ahead = engine, use, engine.device.type == "cuda"
        self.texts: dict[int, Text] = {}  # by row of the cache

    @property
    def room(self) -> int:
        """The number of sequences that can join."""
        return self.engine.rows - len(self.texts)

    def add(self, texts: Sequence[Text]) -> None:
        """Let sequences join, at most `room`, and give each its first token. Short prompts are read together."""
        T, capacity = self.engine.T, self.engine.B * self.engine.T
        waiting = [text for text in texts if not text.done]
        while waiting:
            row = min(set(range(self.engine.rows)) - set(self.texts))
            free = next(n for n in range(1, self.engine.rows + 1) if row + n in {*self.texts, self.engine.rows})
            many, adapter = 1, waiting[0].adapter
            alike = next((i for i, text in enumerate(waiting) if text.adapter != adapter), len(waiting))
            while many < min(free, alike) and (many + 1) * _longest(waiting[: many + 1], T) <= capacity:
                many += 1
            self.use(adapter)
            now, waiting = waiting[:many], waiting[many:]
            logits = self.engine.prefill(row, [text.ids[-T:] for text in now])
            self.texts |= {row + i: text for i, text in enumerate(now)}
            self._take(range(row, row + many), logits)

    def step(self) -> None:
        """Generate one more token for each sequence. Those that are done leave."""
        T = self.engine.T
        inside = {row: self.texts[row] for row in sorted(self.texts) if len(self.texts[row].ids) <= T}
        outside, rows = [row for row in self.texts if row not in inside], range(max(inside, default=0) + 1)
        for adapter in dict.fromkeys(text.adapter for text in inside.values()):
            self.use(adapter)
            own = [row for row, text in inside.items() if text.adapter == adapter]
            whole = [inside[row].ids if row in inside and len(inside[row].ids) <= T else [0] for row in rows]
            logits = self.engine.decode([ids[-1] for ids in whole], [len(ids) - 1 for ids in whole])
            every = len(own) == len(rows)
            self._take(own, logits if every else logits[own], self.ahead and every and not outside)
        for row in outside:
            self.use(self.texts[row].adapter)
            window = self.texts[row].ids[-T:]
            self._take([row], self.engine.prefill(row, [window]))

    def _take(self, rows: Sequence[int], logits: Tensor, ahead: bool = False) -> None:
        """Choose the next token in these rows, one of text or of a picture's codes. Only ids leave the device, unless a
        sequence needs its logits here. ahead: the next token's work may begin now, as these are all rows."""
        texts = [self.texts[row] for row in rows]
        if len(kinds := dict.fromkeys(text.codes for text in texts)) > 1:
            for kind in kinds:
                own = [i for i, text in enumerate(texts) if text.codes == kind]
                self._take([rows[i] for i in own], logits[own])
            return
        V = min((text.tokenizer.text_V for text in texts if text.tokenizer), default=logits.shape[-1])
        first, V = (codes.start, codes.stop) if (codes := texts[0].codes) else (0, V)
        usual, copied = logits[:, first:V], False
        read = {
            i: logits[i].cpu().numpy()
            for i, text in enumerate(texts)
            if text.how.adjusts or text.how.logprobs is not None
        }
        for i, x in read.items():
            if (new := adjusted(x, texts[i])) is not x:
                usual, copied = usual if copied else usual.clone(), True
                usual[i].copy_(torch.from_numpy(new[first:V]))
        goes_on = (len(t.made) + 1 < t.how.tokens and len(t.ids) < self.engine.T for t in texts)
        ahead = ahead and not read and all(goes_on)
        plain = usual.device.type == "cpu" and not ahead
        given = usual.numpy() if plain else usual  # on a CPU numpy, which allocates no tensors
        ids = choose(given, [t.how for t in texts], [t.draw() for t in texts])
        ids = ids + first if first else ids
        ids = self.engine.read_ahead(ids) if ahead else ids.tolist()
        for i, (row, text, token) in enumerate(zip(rows, texts, ids, strict=True)):
            text.take(token, read.get(i) if text.how.logprobs is not None else None)
            if text.done:
                del self.texts[row]

    def drop(self, texts: Sequence[Text]) -> None:
        """Let sequences leave before they are done."""
        self.texts = {row: text for row, text in self.texts.items() if text not in texts}


def _longest(texts: Sequence[Text], T: int) -> int:
    return min(T, max(len(text.ids) for text in texts))


def write_all(engine: Engine, texts: Sequence[Text]) -> None:
    """Generate sequences to their ends, as many at a time as the cache has rows."""
    batch, waiting = Batch(engine), texts
    while waiting or batch.texts:
        batch.step()
        joining, waiting = waiting[: batch.room], waiting[batch.room :]
        batch.add(joining)


def open_document(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt that begins a document."""
    return [tokenizer.eot, *(int(i) for i in tokenizer.encode(prompt))]


def sample_text(
    engine: Engine, tokenizer: Tokenizer, prompt: str | Sequence[int], how: Sampling,
    check: Callable[[], None] = lambda: None,
) -> Iterator[str]:  # fmt: skip
    """Yield the pieces of text that follow `prompt` up to the document's end. It is text that begins a document, or ids
    of which some may stand for no text. `check` runs before each token."""
    ids = open_document(tokenizer, prompt) if isinstance(prompt, str) else prompt
    text, batch, sent = Text(ids, how, tokenizer), Batch(engine), 0
    while not text.done:
        check()
        batch.step() if text.made else batch.add([text])
        if len(text.text) > sent:
            yield text.text[sent:]
            sent = len(text.text)


class Conversation:
    """Questions and answers, in the words of a chat template. The oldest turns are forgotten, each a question with its
    answer, when the text would otherwise leave less than half of the model's T tokens, or `how.tokens`, for an answer.

    system: the instruction that stands before them. turns: the messages. forgotten: how many turns the last question
    made it forget.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: Template, system: str = "") -> None:
        self.engine, self.template, self.tokenizer = engine, template, template.ending(tokenizer)
        self.system, self.turns, self.forgotten = system, list[Message](), 0

    def ask(self, question: str, how: Sampling = DEFAULT) -> Generator[str, None, None]:
        """Pieces of the answer, which also becomes a part of the conversation, up to where the caller stops.

        ConfigError if the question alone is too long, or the template refuses it: then it is no part of it."""
        self.turns.append({"role": "user", "content": question})
        answer = ""
        try:
            ids = self._prompt(how.tokens)
            how = replace(how, tokens=min(how.tokens, self.engine.T - len(ids)))
            for piece in sample_text(self.engine, self.tokenizer, ids, how):
                answer += piece
                yield piece
        finally:
            if answer:
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns.pop()

    def _prompt(self, most: int) -> list[int]:
        T, turns = self.engine.T, self.turns
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            try:
                ids = self.template.prompt_ids([*first, *turns], self.tokenizer)
            except ValueError as error:
                raise ConfigError(f"this conversation {error}; change it.") from None
            if len(turns) == 1 and len(ids) >= T:
                said = f"the question has {len(ids)} tokens in its template, and the model reads fewer than {T}"
                raise ConfigError(f"{said}; ask a shorter one.")
            if len(turns) == 1 or len(ids) + min(most, T // 2) <= T:
                self.forgotten, self.turns = (len(self.turns) - len(turns)) // 2, turns
                return ids
            turns = turns[2:]


class Sampler:
    """Generates text with a run's newest checkpoint, or the one of `step`. It is loaded once. rows: prompts at a time.

    Raises ConfigError, CheckpointError."""

    def __init__(self, run_dir: Path | str, step: int | None = None, rows: int = 1) -> None:
        self.engine, self.tokenizer = Run(run_dir).load_engine(step, rows=rows)

    def text(self, prompt: str = "", how: Sampling = DEFAULT) -> Iterator[str]:
        """Pieces of the text that follows `prompt`. Raises ConfigError."""
        how.check()
        return sample_text(self.engine, self.tokenizer, prompt, how)

    def texts(self, prompts: Sequence[str], how: Sampling = DEFAULT) -> list[str]:
        """The text that follows each of the prompts, the i-th with seed + i. Raises ConfigError."""
        how.check()
        ids = [open_document(self.tokenizer, prompt) for prompt in prompts]
        texts = [Text(x, replace(how, seed=how.seed + i), self.tokenizer) for i, x in enumerate(ids)]
        write_all(self.engine, texts)
        return [text.text for text in texts]
