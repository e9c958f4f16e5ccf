"""OpenAI's chat completions: from messages to a prompt, and from generated tokens to messages. Knows no network.

https://platform.openai.com/docs/api-reference/chat. The model's template writes the messages as text. A message's
content is a text, or a list of parts that are texts, which a line end joins. The answer ends at the end of its turn.
"""

from __future__ import annotations

from typing import Any

from daybreak.data.chat import Message, Template
from daybreak.data.tokenizer import Tokenizer
from daybreak.generate import Token
from daybreak.serve import completions
from daybreak.serve.completions import Answer, Completion, Refused, check_fields, check_model, number, short
from daybreak.serve.writer import News

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that ask for another answer than text. They are refused, unless they are empty or ask for text.
OTHERS = {"tools": (), "tool_choice": ("none", "auto"), "functions": (), "function_call": ("none", "auto"),
          "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": ()}  # fmt: skip
# Fields that leave the answer as it is: how requests are kept, billed or hastened.
IGNORED = ("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
           "safety_identifier", "service_tier", "store")  # fmt: skip
SHARED = [field for field in completions.FIELDS if field not in ("prompt", "best_of", "echo", "suffix", "logprobs")]
FIELDS = ("messages", "max_completion_tokens", "logprobs", "top_logprobs", *SHARED, *OTHERS, *IGNORED)


def parse_chat(body: Any, model: str, tokenizer: Tokenizer, template: Template | None, T: int, V: int) -> Completion:
    """The request in a JSON value, for a model with sequences of T tokens and V ids. Without another number, the answer
    has as many tokens as the messages leave of T. Raises Refused."""
    check_fields(body, FIELDS)
    check_model(body, model)
    if template is None:
        said = f"{model!r} does not chat, since it has no chat template; use /v1/completions."
        raise Refused(400, said, "model")
    if odd := next((field for field, plain in OTHERS.items() if body.get(field) and body[field] not in plain), None):
        raise Refused(400, f"{odd} is not supported; leave it out.", odd)
    messages, tokenizer = _messages(body.get("messages")), template.ending(tokenizer)
    try:
        ids = template.prompt_ids(messages, tokenizer)
    except ValueError as error:
        said = str(error).replace(f" {template.where}", "")  # a file of the server's
        raise Refused(400, f"the conversation {said}.", "messages") from None
    given = {field: body[field] for field in SHARED if field in body} | {"prompt": ids}
    if body.get("max_completion_tokens") is not None:
        given["max_tokens"] = number(body, "max_completion_tokens", 1, 0)
    elif body.get("max_tokens") is None:
        given["max_tokens"] = max(1, T - len(ids))
    if not isinstance(wanted := body.get("logprobs") or False, bool):
        raise Refused(400, f"logprobs = {short(wanted)} must be true or false.", "logprobs")
    if wanted:
        given["logprobs"] = number(body, "top_logprobs", 0, 0, completions.MAX_LOGPROBS)
    try:
        return completions.parse(given, model, tokenizer, T, V)
    except Refused as error:
        error.param = "messages" if error.param == "prompt" else error.param
        raise


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise Refused(400, "messages must be a list of objects with role and content, not empty.", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(given)]


def _message(message: Any, where: str) -> Message:
    """A message as templates read it."""
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(400, f"{where}: role = {short(role)} is unknown; there are {', '.join(ROLES)}.", where)
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part["text"] for part in content if part.get("type") == "text" and isinstance(part.get("text"), str)]
        content = "\n".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str):
        raise Refused(400, f"{where}: content must be a text, or a list of parts of the type text.", where)
    return {"role": ROLES[role], "content": content}


class ChatAnswer(Answer):
    """The answer to a request for a chat."""

    PREFIX, OBJECT = "chatcmpl-", "chat.completion.chunk"

    def chunk(self, news: News) -> dict[str, Any]:
        """A chunk with the new part of one choice, which is also added to the whole answer."""
        scores = {"content": [self._scored(token) for token in news.tokens], "refusal": None}
        logprobs = None if self.request.how.logprobs is None else scores
        delta, done = {"content": news.text}, news.done or None
        if news.choice not in self.choices:
            delta["role"] = "assistant"
            message = {"role": "assistant", "content": "", "refusal": None}
            began = logprobs and {**logprobs, "content": list[Any]()}
            self.choices[news.choice] = {"index": news.choice, "message": message, "logprobs": began}
        whole = self.choices[news.choice]
        whole["message"]["content"] += news.text
        whole["finish_reason"] = done
        if logprobs is not None:
            whole["logprobs"]["content"] += scores["content"]
        self.completion_tokens += len(news.tokens)
        piece = {"index": news.choice, "delta": delta, "logprobs": logprobs, "finish_reason": done}
        return {**self.head, "choices": [piece]}

    def whole(self) -> dict[str, Any]:
        """The answer to a request without a stream."""
        return {**super().whole(), "object": "chat.completion"}

    def _scored(self, token: Token) -> dict[str, Any]:
        top = [self._score(i, x) for i, x in token.top]
        return {**self._score(token.id, token.logprob), "top_logprobs": top}

    def _score(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token) if token < self.tokenizer.V else b""
        return {"token": self._name(token), "logprob": logprob, "bytes": list(data)}
