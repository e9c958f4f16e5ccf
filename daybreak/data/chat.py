"""Chats as tokens: records of the usual formats, the model's own chat template, and which tokens are learned.

    record of a file --`chat_of`--> messages --`Template.text`--> text and spans --`ChatEncoder`--> ids, learned or not

`chat_of` reads five formats by the keys that a record has:

    messages                    [{"role": "user", "content": "..."}, ...], as OpenAI writes them
    conversations               [{"from": "human", "value": "..."}, ...], as ShareGPT does
    instruction, output         and perhaps input, system and history, as Alpaca does
    prompt, completion          or prompt, response or question, answer: two texts, or two lists of messages
    two texts                   no template: the tokens of both, and an end of text

A template says by `{% generation %}` what an assistant wrote. Of others, the text of a conversation up to an answer and
the template's beginning of an answer must be the start of the text that includes it. The tokens between the two are
learned, without spaces behind it. Some templates write earlier answers otherwise than the last, as Qwen 3 does without
their thoughts. There the answers are marked in the messages, and learned with the special token behind them.

Templates come from strangers. They run in jinja2's sandbox, as transformers runs them: text and masks are equal. But
the date is always 26 July 2024, so that the same files give the same tokens on every day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daybreak.config import run_config
from daybreak.data.formats import extra, format_of
from daybreak.data.packing import Example
from daybreak.data.tokenizer import Tokenizer
from daybreak.errors import ConfigError, DataError, Error
from daybreak.manifest import is_run, kept_files

Message = dict[str, Any]
Span = tuple[int, int]
TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
         "assistant": "assistant", "model": "assistant", "function_call": "assistant", "system": "system",
         "tool": "tool", "observation": "tool", "function_response": "tool"}  # fmt: skip
REASONING = ("reasoning_content", "thinking", "reasoning")  # what programs call it; templates read the first
OPEN, CLOSE = "\x02", "\x03"  # around what an assistant wrote, while a text is rendered
ROW_TOKENS = 1024  # of a row, if nothing else is asked for
FEW = 8  # tokens, at most, of an answer that may be empty
LONGEST = 1 << 26  # characters of a template's text
DATE = datetime(2024, 7, 26)  # Llama 3's own, where nobody gives one


class Chat(NamedTuple):
    """A conversation: its messages, and the descriptions of tools. Of two plain texts, only `pair`."""

    messages: list[Message]
    tools: list[Any] | None = None
    pair: tuple[str, str] | None = None


def chat_of(record: Any) -> Chat:
    """The conversation of a record. ValueError with the reason if it has none."""
    found = format_of(record)
    if not found:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"is no chat (it has: {keys})")
    if found == "chosen, rejected":
        raise ValueError("has preferences (chosen, rejected), from which daybreak does not learn")
    try:
        return _chat(record, found)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"has {found} of another form than chats have ({error})") from None


def _chat(record: dict[str, Any], found: str) -> Chat:
    """The conversation of a record in the format `found`. Another form may raise anything."""
    if found == "messages":
        messages = record["messages"]
    elif found == "conversations":
        messages = [_turn(turn) for turn in record["conversations"]]
    elif found == "instruction, output":
        more = record.get("input")
        asked = f"{record['instruction']}\n{more}" if more else record["instruction"]
        pairs = [*(record.get("history") or []), (asked, record["output"])]
        messages = [m for q, a in pairs for m in (_message("user", q), _message("assistant", a))]
    else:
        asked, answer = (record[key] for key in found.split(", "))
        if isinstance(asked, str) and isinstance(answer, str):
            return Chat([], pair=(asked, answer))
        messages = [{**m, "weight": 0} for m in _turns("user", asked)] + _turns("assistant", answer)
    if isinstance(system := record.get("system"), str) and system:
        messages = [_message("system", system), *messages]
    tools = record.get("tools") or None
    return Chat([_checked(m) for m in messages], json.loads(tools) if isinstance(tools, str) else tools)


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _turns(role: str, said: Any) -> list[Message]:
    """A text as a message of this role, or a list of messages."""
    return [_message(role, said)] if isinstance(said, str) else list(said)


def _turn(turn: Any) -> Any:
    """A turn of ShareGPT's, or a message in its place."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # `_checked` says what is wrong with it, if anything is
    if (role := ROLES.get(turn["from"])) is None:
        raise ValueError(f"has a turn from {turn['from']!r}, and known are {', '.join(ROLES)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**_message(role, turn.get("value")), **rest}


def _checked(message: Any) -> Message:
    """A message as templates read it: reasoning also by the name that they know."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"has the message {str(message)[:60]!r}, which is no object with a role")
    if not isinstance(message.get("content"), str | list) and "tool_calls" not in message:
        raise ValueError(f"has a message of {message['role']} whose content is no text")
    thought = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if thought is None else {"thinking": thought, **message, REASONING[0]: thought}


def template_text(kept: Mapping[str, str]) -> str:
    """How chats are written, of the files that a model keeps; empty if none says it."""
    said = json.loads(kept.get(CONFIG_FILE, "{}")).get("chat_template")
    if isinstance(said, list):  # several by name
        said = next((one.get("template") for one in said if isinstance(one, dict) and one.get("name") == "default"), "")
    return kept.get(TEMPLATE_FILE) or (said if isinstance(said, str) else "")


def special_names(kept: Mapping[str, str]) -> dict[str, str]:
    """The texts of special tokens, by keys such as bos_token, as the files that a model keeps name them."""
    files = [json.loads(kept.get(name, "{}")) for name in ("special_tokens_map.json", CONFIG_FILE)]  # the old one, too
    said = [(k, v.get("content") if isinstance(v, dict) else v) for file in files for k, v in file.items()]
    return {key: value for key, value in said if key.endswith("_token") and isinstance(value, str)}


class Template:
    """A chat template. special: texts such as bos_token, by name. where: its file, for messages."""

    def __init__(self, source: str, special: Mapping[str, str], where: str) -> None:
        self.source, self.special, self.where = source, dict(special), where
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer | None = None) -> Template | None:
        """The template in the folder of a model, a run or a packed set, as `of` finds it."""
        return cls.of(kept_files(folder), folder, tokenizer)

    @classmethod
    def of(cls, kept: Mapping[str, str], folder: Path, tokenizer: Tokenizer | None = None) -> Template | None:
        """The template among the texts of files, by name: one of its own, else that of tokenizer_config.json. None if
        there is none. Where nothing says what the special tokens are called, they are the tokenizer's."""
        if not (source := template_text(kept)):
            return None
        special = special_names(kept)
        where = folder / (TEMPLATE_FILE if kept.get(TEMPLATE_FILE) else CONFIG_FILE)
        if not (special or json.loads(kept.get(CONFIG_FILE, "{}"))) and tokenizer is not None:
            ids = {"bos_token": tokenizer.eot, "eos_token": tokenizer.ends[0]}
            special = {key: tokenizer.token_bytes(i).decode() for key, i in ids.items()}
        return cls(source, special, str(where))

    @cached_property
    def _compiled(self) -> Any:
        jinja2 = extra("jinja2", "data", "a chat template")
        sandbox, ext = (extra(f"jinja2.{name}", "data", "a chat template") for name in ("sandbox", "ext"))
        jinja2.utils = extra("jinja2.utils", "data", "a chat template")

        class Generation(ext.Extension):  # type: ignore[misc, name-defined]  # an optional package has no types
            """`{% generation %} ... {% endgeneration %}` is what an assistant wrote."""

            tags = {"generation"}  # noqa: RUF012  # jinja2 wants it so

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
                return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

            def _marked(self, caller: Any) -> str:
                return f"{OPEN}{caller()}{CLOSE}"

        class Namespace(jinja2.utils.Namespace):  # type: ignore[misc, name-defined]
            """No names of Python's insides in it."""

            def __setitem__(self, name: str, value: Any) -> None:
                if name.startswith("_"):
                    raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")
                super().__setitem__(name, value)

        def refuse(said: str) -> None:
            raise jinja2.exceptions.TemplateError(said)

        def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
                   sort_keys: bool = False) -> str:  # fmt: skip
            return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": refuse, "strftime_now": DATE.strftime, "namespace": Namespace,
                                "dict": lambda *pairs, **named: dict(*pairs, **named)}  # fmt: skip
        try:
            return environment.from_string(self.source)
        except jinja2.exceptions.TemplateError as error:
            raise DataError(f"{self.where} is no chat template for jinja2 ({error}); copy it again.") from None

    def _rendered(self, messages: Sequence[Message], tools: Any, prompt: bool) -> str:
        """The text, with marks around what an assistant wrote. ValueError with what the template refuses."""
        given = {"messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": prompt}
        pieces, size = list[str](), 0
        try:
            for piece in self._compiled.generate(**self.special, **given):
                pieces.append(piece)
                if (size := size + len(piece)) > LONGEST:
                    raise ValueError(f"it makes more than {LONGEST:,} characters")
        except DataError:
            raise
        except Exception as error:  # a template may fail in any way
            raise ValueError(f"is refused by the chat template {self.where} ({error})") from None
        return "".join(pieces)

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """The text of a conversation, and the beginning of the assistant's answer. ValueError."""
        return _unmarked(self._rendered(messages, tools, True))[0]

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The token ids of `prompt`. ValueError."""
        return tokenizer.encode_special(self.prompt(messages))[0]

    def end_of_turn(self, tokenizer: Tokenizer) -> int | None:
        """The special token that follows an answer; None if another token does, or the template cannot write one."""
        answer = "Yes, indeed."
        try:
            text = self._rendered([_message("user", "Is it?"), _message("assistant", answer)], None, False)
        except (ValueError, DataError):
            return None
        behind = tokenizer.encode_special(_unmarked(text)[0].rpartition(answer)[2].lstrip())[0][:1]
        return behind[0] if behind and behind[0] in tokenizer.special else None

    def ending(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer of answers: the end of a turn ends a text too."""
        end = self.end_of_turn(tokenizer)
        return tokenizer if end is None else tokenizer.ending((*tokenizer.ends, end))

    def text(self, chat: Chat, special: Collection[str] = ()) -> tuple[str, list[Span]]:
        """The text of a conversation, and the characters of it that are learned. special: the special tokens.
        ValueError with the reason."""
        messages, tools = chat.messages, chat.tools
        said = json.dumps([messages, tools], ensure_ascii=False).replace(r"\\", "")  # in JSON, one backslash is two
        if r"\u0002" in said or r"\u0003" in said:
            raise ValueError("has one of the characters U+0002 and U+0003, which mark what is learned")
        text, spans = _unmarked(self._rendered(messages, tools, False))
        own = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not self.marks:
            spans = self._by_prompts(chat, text, own) or self._by_contents(chat, text, own, special)
            if len(spans) < len(own):
                why = f"is written otherwise by {self.where} when a message follows, so its answers cannot be found"
                raise ValueError(why + "; mark answers there with {% generation %} and {% endgeneration %}")
        if any("weight" in messages[i] for i in own):
            if len(spans) != len(own):
                raise ValueError(f"has weights, and {len(spans)} texts for {len(own)} messages of the assistant")
            spans = [span for i, span in zip(own, spans, strict=True) if messages[i].get("weight", 1)]
        return text, spans

    def _by_prompts(self, chat: Chat, text: str, own: Sequence[int]) -> list[Span]:
        """Where the answers lie that are messages `own`: each behind its prompt. [] if one text does not continue the
        other."""
        spans = list[Span]()
        for i in own:
            prompt = self._rendered(chat.messages[:i], chat.tools, True)
            upto = self._rendered(chat.messages[: i + 1], chat.tools, False)
            if not (upto.startswith(prompt) and text.startswith(upto)):
                return []
            spans.append((len(prompt), max(len(prompt), len(upto.rstrip()))))
        return spans

    def _by_contents(self, chat: Chat, text: str, own: Sequence[int], special: Collection[str]) -> list[Span]:
        """The same for templates that write earlier answers otherwise: each with the special token behind it. [] if the
        text is another with marks in it, or has thoughts."""
        messages = list(chat.messages)
        for i in own:
            content = messages[i].get("content")
            if not isinstance(content, str) or REASONING[0] in messages[i]:
                return []
            whole = re.fullmatch(r"(\s*)(.*?)(\s*)", content, re.S)
            before, core, after = whole.groups() if whole else ("", "", "")
            messages[i] = {**messages[i], "content": f"{before}{OPEN}{core}{CLOSE}{after}"}
        found, spans = _unmarked(self._rendered(messages, chat.tools, False))
        end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})")
        ends = [end.match(text, stop) for _, stop in spans]
        if found != text or len(spans) != len(own) or not special:
            return []
        return [(start, match.end()) for (start, _), match in zip(spans, ends, strict=True) if match]


def _unmarked(rendered: str) -> tuple[str, list[Span]]:
    """The text without marks, and what was between them."""
    text, spans, start = "", list[Span](), 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", rendered):
        if piece == OPEN:
            start = len(text)
        elif piece == CLOSE:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, spans


def _longest(folder: Path) -> int:
    """The most tokens that the model or run in this folder reads; 0 if nothing there says it."""
    try:
        if is_run(folder):
            return run_config(folder).model.max_T
        config = json.loads((folder / "config.json").read_text("utf-8"))
        found = next(config[key] for key in ("n_positions", "max_position_embeddings") if key in config)
        return found if isinstance(found, int) else 0
    except (Error, OSError, ValueError, TypeError, StopIteration):
        return 0


class ChatEncoder:
    """Records as examples of at most T tokens. folder: has the template, beside the tokenizer's file. T: 0 stands for
    ROW_TOKENS, or what the model there reads, if that is less.

    longest: what it reads, 0 if unknown. joined: two texts were read, for which the template is not asked."""

    def __init__(self, tokenizer: Tokenizer, folder: Path | None, T: int) -> None:
        self.longest, self.joined = _longest(folder) if folder else 0, False
        self.tokenizer, self.folder = tokenizer, folder
        self.T = T or min(ROW_TOKENS, self.longest or ROW_TOKENS)
        self.template = Template.load(folder, tokenizer) if folder is not None else None
        self._lengths = tokenizer.lengths(tokenizer.V)
        self._special = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.special]

    def __call__(self, record: Any) -> tuple[Example, str]:
        """The example, and what became of it if it was longer than T: "cut", or "lost" if all that is learned lay
        behind T; else "". ValueError with the reason, as a verb."""
        chat = chat_of(record)
        self.joined |= chat.pair is not None
        ids, learned = self._pair(*chat.pair) if chat.pair is not None else self._chat(chat)
        learned[:1] = False  # nothing comes before it
        lost, cut = learned.any() and not learned[: self.T].any(), len(ids) > self.T
        ids, learned = ids[: self.T], learned[: self.T]
        return Example(ids, learned, int(self._lengths[ids].sum())), "lost" if lost else "cut" * cut

    def _pair(self, asked: str, answer: str) -> tuple[Any, Any]:
        t = self.tokenizer
        before, after = t.around[0] if t.source else [t.eot], [t.ends[0]]
        parts = [np.array(before, np.int64), t.encode(asked), t.encode(answer), np.array(after, np.int64)]
        ids = np.concatenate(parts).astype(np.int64)
        return ids, np.arange(len(ids)) >= len(before) + len(parts[1])

    def _chat(self, chat: Chat) -> tuple[Any, Any]:
        if self.template is None:
            where = f"{self.folder} has no chat template" if self.folder else "the tokenizer has no chat template"
            fix = f"put the model's {TEMPLATE_FILE} beside its tokenizer.json and give that file as --tokenizer"
            own = "daybreak export RUN --to hf makes that file of a run, and docs/data.md has a template"
            raise ConfigError(f"{where}; {fix} ({own}).")
        text, spans = self.template.text(chat, self._special)
        ids, token_at = self.tokenizer.encode_special(text)
        learned = np.zeros(len(ids), bool)
        for start, stop in spans:
            if stop > start and (first := token_at(start)) is not None:
                last = token_at(stop - 1)
                learned[first : last + 1 if last else len(ids)] = True
        return np.array(ids, np.int64), learned

    def empty_answer(self, example: Example) -> bool:
        """Whether one of the answers has special tokens and blanks alone."""
        ids, learned = example.ids, example.learned
        answers = np.flatnonzero(np.diff(learned, prepend=False, append=False)).reshape(-1, 2)
        plain = ([i for i in ids[a:b] if i not in self.tokenizer.special] for a, b in answers if b - a <= FEW)
        return any(not self.tokenizer.decode(said).strip() for said in plain)

    def ends_turns(self, example: Example) -> bool:
        """Whether the last learned token is one of those that stand for no text, as an end of turn does."""
        last = int(example.ids[np.flatnonzero(example.learned)[-1]])
        return last in self.tokenizer.special
