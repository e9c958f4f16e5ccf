"""OpenAI's completions: from a request's JSON to sequences, and from generated tokens to its JSON. Knows no network.

https://platform.openai.com/docs/api-reference/completions. It also understands `top_k`, `min_p` and
`repetition_penalty`, as other servers do. A prompt that is text begins a document, as in training. Token ids are used
as they are.
"""

from __future__ import annotations

import codecs
import math
import reprlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from uuid import uuid4

from daybreak.data.formats import without_surrogates
from daybreak.data.tokenizer import Tokenizer
from daybreak.errors import ConfigError
from daybreak.formatting import meant
from daybreak.generate import Sampling, Text, Token, open_document
from daybreak.serve.writer import News

MAX_TEXTS, MAX_STOPS, MAX_STOP, MAX_LOGPROBS, MAX_BIASES = 128, 16, 256, 20, 300  # MAX_STOP: characters of one
# Numbers that need not be whole: default, least, most.
FRACTIONS = {
    "temperature": (1.0, 0, 100), "top_p": (1.0, 0, 1), "min_p": (0.0, 0, 1), "frequency_penalty": (0.0, -2, 2),
    "presence_penalty": (0.0, -2, 2), "repetition_penalty": (1.0, 0, 100),
}  # fmt: skip
FIELDS = ("model", "prompt", "max_tokens", "top_k", "n", "best_of", "stop", "seed", "logprobs", "echo", "stream",
          "stream_options", "user", "suffix", "logit_bias", *FRACTIONS)  # fmt: skip


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
short = _short.repr  # a value of any size, as a message shows it


class Refused(Exception):
    """A request that is refused, with HTTP status, OpenAI's code, the wrong field, and a sentence."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients expect it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Prompt:
    """A prompt: its ids, how many of them were added in front of the client's, and its text."""

    ids: list[int]
    added: int
    text: str


@dataclass(frozen=True)
class Completion:
    """A request that can be served. Choice i is continuation i % n of prompt i // n."""

    prompts: list[Prompt]
    how: Sampling
    n: int
    echo: bool
    stream: bool
    usage: bool  # at the end of a stream too
    tokenizer: Tokenizer  # whose ends end the sequences

    def texts(self, adapter: str) -> list[Text]:
        """The sequences to generate with this adapter, choice i with seed + i."""
        pairs = [prompt for prompt in self.prompts for _ in range(self.n)]
        hows = [replace(self.how, seed=self.how.seed + i) for i in range(len(pairs))]
        return [Text(prompt.ids, how, self.tokenizer, adapter) for prompt, how in zip(pairs, hows, strict=True)]


def check_fields(body: Any, fields: Sequence[str]) -> None:
    """Refuse a request that is no object, or has other fields."""
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object.")
    for field in body:
        if field not in fields:
            hint = meant(field, fields, f"the fields are {', '.join(fields)}.")
            raise Refused(400, f"unknown field {short(field)}; {hint}", field[:80])


def check_model(body: dict[str, Any], *models: str) -> None:
    """Refuse a request for another model than these."""
    if body.get("model") not in models:
        said = f"model = {short(body.get('model'))} is not served here; use {' or '.join(map(repr, models))}."
        raise Refused(404, said, "model", "model_not_found")


def parse(body: Any, model: str, tokenizer: Tokenizer, T: int, V: int) -> Completion:
    """The request in a JSON value, for a model with sequences of T tokens and V ids. Raises Refused."""
    check_fields(body, FIELDS)
    if body.get("suffix"):
        raise Refused(400, "suffix is not supported; leave it out.", "suffix")
    check_model(body, model)
    n, options = int(number(body, "n", 1, 1, MAX_TEXTS)), body.get("stream_options") or {}
    if body.get("best_of") not in (None, n):
        raise Refused(400, "best_of is not supported; leave it out, or make it n.", "best_of")
    flags = {field: body.get(field) or False for field in ("echo", "stream")}
    for field, value in flags.items():
        if not isinstance(value, bool):
            raise Refused(400, f"{field} = {short(value)} must be true or false.", field)
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object.", "stream_options")
    how = _sampling(body, V)
    asked = _prompts(body.get("prompt"))
    if len(asked) * n > MAX_TEXTS:
        raise Refused(400, f"{len(asked)} prompts x n = {n} must be at most {MAX_TEXTS} texts.", "n")
    prompts = [_prompt(given, tokenizer, T, V) for given in asked]
    if (longest := max(len(p.ids) for p in prompts)) + how.tokens > T:
        said = f"{longest} tokens of prompt + max_tokens = {how.tokens} must be at most the model's {T}."
        raise Refused(400, said, "max_tokens", "context_length_exceeded")
    usage = bool(options.get("include_usage"))
    return Completion(prompts, how, n, flags["echo"], flags["stream"], usage, tokenizer)


def _sampling(body: dict[str, Any], V: int) -> Sampling:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise Refused(400, f"stop must be a text, or up to {MAX_STOPS} of them, none empty.", "stop")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP:
        raise Refused(400, f"stop has {longest} characters; it must be at most {MAX_STOP}.", "stop")
    logprobs = body.get("logprobs")
    how = Sampling(
        tokens=int(number(body, "max_tokens", 16, 0)),
        top_k=int(number(body, "top_k", 0, 0)),
        logit_bias=_biases(body.get("logit_bias") or {}, V),
        seed=int(number(body, "seed", secrets.randbits(31), 0)),
        stop=tuple(stops),
        logprobs=None if logprobs is None else int(number(body, "logprobs", 0, 0, MAX_LOGPROBS)),
        **{name: number(body, name, *limits, whole=False) for name, limits in FRACTIONS.items()},
    )
    try:
        how.check()
    except ConfigError as error:
        raise Refused(400, str(error)) from None
    return how


def _biases(given: Any, V: int) -> tuple[tuple[int, float], ...]:
    ids = {str(i): i for i in range(V)} if given else {}
    if not isinstance(given, dict) or len(given) > MAX_BIASES or not given.keys() <= ids.keys():
        said = f"logit_bias must be an object of up to {MAX_BIASES} token ids, from 0 to {V - 1}, and their biases."
        raise Refused(400, said, "logit_bias")
    named = {f"logit_bias[{key}]": bias for key, bias in given.items()}
    biases = (number(named, field, 0.0, -100, 100, whole=False) for field in named)
    return tuple(zip((ids[key] for key in given), biases, strict=True))


def number(
    body: dict[str, Any], field: str, default: float, low: float, high: float = 2**63 - 1, whole: bool = True
) -> float:
    """The number in a field, `default` if there is none. Raises Refused for other values, and beyond the limits."""
    value = default if body.get(field) is None else body[field]
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        limits = f"from {low} to {high}" if high < 2**62 else f"{low} or more"
        raise Refused(400, f"{field} = {short(value)} must be a {'whole ' * whole}number, {limits}.", field)
    return value


def _prompts(given: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if given is None or isinstance(given, str):
        return [given or ""]
    if isinstance(given, list) and given:
        return [given] if isinstance(given[0], int) else given
    raise Refused(400, "prompt must be a text, a list of token ids, or a list of either, not empty.", "prompt")


@cache
def _longest(tokenizer: Tokenizer) -> int:
    return int(tokenizer.lengths(tokenizer.V).max())


def _prompt(given: Any, tokenizer: Tokenizer, T: int, V: int) -> Prompt:
    """A prompt. Its length is checked before anything is done with it, that of text by the longest token's bytes."""
    most = T * _longest(tokenizer) if isinstance(given, str) else T
    if isinstance(given, str | list) and len(given) > most:
        kind = "characters" if isinstance(given, str) else "tokens"
        said = f"a prompt of {len(given)} {kind} is more than the model's {T} tokens can hold ({most})."
        raise Refused(400, said, "prompt", "context_length_exceeded")
    if isinstance(given, str):
        text = without_surrogates(given)
        return Prompt(open_document(tokenizer, text), 1, text)
    if not isinstance(given, list) or not given or not all(type(i) is int and 0 <= i < V for i in given):
        raise Refused(400, f"prompt: token ids must be whole numbers from 0 to {V - 1}, at least one.", "prompt")
    return Prompt(given, 0, "".join(_spelt(tokenizer, given)))


def _spelt(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = [decoder.decode(tokenizer.token_bytes(i) if i < tokenizer.V else b"") for i in ids]
    return [*pieces[:-1], pieces[-1] + decoder.decode(b"", final=True)]


class Answer:
    """The answer to a request, as JSON: in a stream's chunks, or whole."""

    PREFIX, OBJECT = "cmpl-", "text_completion"

    def __init__(self, request: Completion, model: str) -> None:
        self.request, self.tokenizer = request, request.tokenizer
        head = {"id": f"{self.PREFIX}{uuid4().hex}", "object": self.OBJECT, "created": int(time.time())}
        self.head: dict[str, Any] = {**head, "model": model}
        self.choices: dict[int, dict[str, Any]] = {}
        self.completion_tokens = 0

    def chunk(self, news: News) -> dict[str, Any]:
        """A chunk with the new part of one choice, which is also added to the whole answer."""
        request, prompt = self.request, self.request.prompts[news.choice // self.request.n]
        text, tokens, starts, first = news.text, list(news.tokens), list(news.starts), news.choice not in self.choices
        if request.echo:
            starts = [len(prompt.text) + at for at in starts]
        if request.echo and first:
            text = prompt.text + text
            pieces = _spelt(self.tokenizer, prompt.ids[prompt.added :] or [self.tokenizer.eot])
            scored = [Token(prompt.ids[0]), *news.prompt][prompt.added :]
            starts = [sum(map(len, pieces[:i])) for i in range(len(scored))] + starts
            tokens = scored + tokens
        self.completion_tokens += len(news.tokens)
        logprobs = None if request.how.logprobs is None else self._logprobs(tokens, starts)
        piece = {"index": news.choice, "text": text, "logprobs": logprobs, "finish_reason": news.done or None}
        if first:
            self.choices[news.choice] = {**piece, "logprobs": logprobs and {k: list(v) for k, v in logprobs.items()}}
        else:
            whole = self.choices[news.choice]
            whole["text"], whole["finish_reason"] = whole["text"] + text, piece["finish_reason"]
            for key, values in (logprobs or {}).items():
                whole["logprobs"][key] += values
        return {**self.head, "choices": [piece]}

    def whole(self) -> dict[str, Any]:
        """The answer to a request without a stream."""
        return {**self.head, "choices": [self.choices[i] for i in sorted(self.choices)], **self.usage()}

    def usage(self) -> dict[str, Any]:
        """The numbers of tokens in prompts and in completions."""
        read = sum(len(prompt.ids) for prompt in self.request.prompts)
        parts = {"prompt_tokens": read, "completion_tokens": self.completion_tokens}
        return {"usage": {**parts, "total_tokens": sum(parts.values())}}

    def _logprobs(self, tokens: list[Token], starts: list[int]) -> dict[str, list[Any]]:
        # As with OpenAI, the token itself is included, though it may not be among the likeliest.
        top = [
            None if math.isnan(t.logprob) else {self._name(i): x for i, x in (*t.top, (t.id, t.logprob))}
            for t in tokens
        ]
        return {
            "tokens": [self._name(t.id) for t in tokens],
            "token_logprobs": [None if math.isnan(t.logprob) else t.logprob for t in tokens],
            "top_logprobs": top,
            "text_offset": starts,
        }

    def _name(self, token: int) -> str:
        """A token's text, or its bytes, as OpenAI writes them, if they are not whole characters."""
        data = self.tokenizer.token_bytes(token) if token < self.tokenizer.V else b""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
