"""Chats: text, token ids and masks equal transformers'; records of every format; what is refused, and how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pytest

from daybreak.data.chat import Chat, ChatEncoder, Template, chat_of
from daybreak.data.formats import format_of
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import ConfigError, DataError

pytest.importorskip("tokenizers")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds é & <b>", "parameters": {"a": 1}}}
CASES: dict[str, list[dict[str, Any]]] = {
    "one turn": chats.conversation(1, 1),
    "three turns": chats.conversation(2, 3),
    "a system message": chats.conversation(3, 2, system=True),
    "spaces around": [{"role": "user", "content": "  a \n"}, {"role": "assistant", "content": " \n b  c \n\n"}],
    "names of tokens in a text": [
        {"role": "user", "content": "say <|im_end|> and <|eot|>"}, {"role": "assistant", "content": "</s> <s>"}],
    "an empty answer": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}],
    "a question at the end": [*chats.conversation(4, 1), {"role": "user", "content": "and then?"}],
    "thoughts": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "since"}],
    "parts": [{"role": "user", "content": "q"},
              {"role": "assistant", "content": [{"type": "text", "text": " of it "}, {"type": "image"}]}],
}  # fmt: skip


def both(folder: Path, template: str) -> tuple[ChatEncoder, Any]:
    """Our encoder, and transformers' tokenizer, of one folder."""
    transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
    file = chats.make_model(folder, template)
    return ChatEncoder(get_tokenizer(str(file)), folder, 10**6), transformers.AutoTokenizer.from_pretrained(folder)


def spans_of(learned: np.ndarray[Any, Any]) -> list[int]:
    return np.flatnonzero(learned).tolist()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", chats.TEMPLATES)
def test_text_ids_and_masks_equal_transformers(tmp_path: Path, name: str, case: str) -> None:
    """Also what is refused is the same. Masks are compared where the template marks answers."""
    ours, theirs = both(tmp_path, template := chats.TEMPLATES[name])
    assert ours.template is not None
    ours.template.special["date_string"] = "26 Jul 2024"  # theirs prints today's
    messages, how = CASES[case], {"date_string": "26 Jul 2024"}
    chat = chat_of({"messages": messages, "tools": [TOOL] if case == "three turns" else None})
    try:
        text = theirs.apply_chat_template(messages, tools=chat.tools, tokenize=False, **how)
    except Exception:
        with pytest.raises(ValueError, match="is refused by the chat template"):
            ours.template.prompt(chat.messages, chat.tools)
        return
    asks = theirs.apply_chat_template(messages, tools=chat.tools, tokenize=False, add_generation_prompt=True, **how)
    assert ours.template.prompt(chat.messages, chat.tools) == asks
    marked = "generation %}" in template
    found = theirs.apply_chat_template(
        messages, tools=chat.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked, **how
    )
    assert ours.tokenizer.encode_special(text)[0] == found["input_ids"]
    if marked:
        example, cut = ours({"messages": messages, "tools": chat.tools})
        assert ours.template.text(chat)[0] == text
        assert example.ids.tolist() == found["input_ids"]
        assert example.learned.astype(int).tolist() == found["assistant_masks"]
        assert not cut
        assert example.nbytes == sum(len(ours.tokenizer.token_bytes(i)) for i in found["input_ids"])


@pytest.mark.parametrize("name", ["chatml", "headers", "brackets"])
@pytest.mark.parametrize("case", ["one turn", "three turns", "a system message", "spaces around"])
def test_answers_are_found_without_marks(tmp_path: Path, name: str, case: str) -> None:
    """The learned tokens spell the answers and the end of each turn, and nothing of headers and questions."""
    ours, _ = both(tmp_path, chats.TEMPLATES[name])
    messages = [m for m in CASES[case] if m["role"] != "system" or name != "brackets"]
    example, _ = ours({"messages": messages})
    end = {"chatml": "<|im_end|>", "headers": "<|eot|>", "brackets": "</s>"}[name]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if name == "headers":
        answers = [answer.strip() for answer in answers]
    before = " " if name == "brackets" else ""
    decoded = ours.tokenizer.decode(example.ids[example.learned].tolist())
    assert decoded == "".join(f"{before}{answer}{end}" for answer in answers)
    assert ours.ends_turns(example)


def test_marks_and_their_absence_give_one_mask(tmp_path: Path) -> None:
    """The same format with and without marks; the line end behind a turn is learned by neither."""
    plain = chats.CHATML[chats.CHATML.index("{%- for") :]
    a, b = both(tmp_path / "a", plain)[0], both(tmp_path / "b", chats.MARKED)[0]
    for i in range(20):
        record = {"messages": chats.conversation(i, 1 + i % 3, system=i % 2 == 0)}
        (one, _), (two, _) = a(record), b(record)
        assert one.ids.tolist() == two.ids.tolist()
        assert one.learned.tolist() == two.learned.tolist()


def test_a_template_that_writes_earlier_answers_otherwise(tmp_path: Path) -> None:
    """The last answer has a thought before it, and the others have none. Each is learned with its end of turn."""
    ours, _ = both(tmp_path, chats.THINKING)
    one, _ = ours({"messages": chats.conversation(1, 1)})
    learned = ours.tokenizer.decode(one.ids[one.learned].tolist())
    assert learned == "<think>\n\n</think>\n\n" + chats.conversation(1, 1)[1]["content"] + "<|im_end|>"
    messages = chats.conversation(1, 3)
    messages[3]["content"] = "\n\nlines around \n"
    example, _ = ours({"messages": messages})
    said = [m["content"].lstrip() + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert ours.tokenizer.decode(example.ids[example.learned].tolist()) == "".join(said)
    for wrong in ({"reasoning_content": "since"}, {"content": [{"type": "text", "text": "a"}]}):
        with pytest.raises(
            ValueError, match=r"its answers cannot be found; mark answers|is refused by the chat template"
        ):
            ours({"messages": [*messages[:-1], {**messages[-1], **wrong}]})


def test_weights_choose_the_answers_that_are_learned(tmp_path: Path) -> None:
    for name in ("chatml", "marked"):
        ours, _ = both(tmp_path / name, chats.TEMPLATES[name])
        messages = chats.conversation(5, 3, system=True)
        whole, _ = ours({"messages": messages})
        messages[2]["weight"], messages[4]["weight"] = 0, 1
        some, _ = ours({"messages": messages})
        text = ours.tokenizer.decode(some.ids[some.learned].tolist())
        assert text == messages[4]["content"] + "<|im_end|>" + messages[6]["content"] + "<|im_end|>"
        assert some.learned.sum() < whole.learned.sum()


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RECORDS: list[tuple[str, dict[str, Any], Chat]] = [
    ("messages", {"messages": [U, A], "id": 7}, Chat([U, A])),
    ("messages", {"messages": [U, A], "tools": json.dumps([TOOL])}, Chat([U, A], [TOOL])),
    ("conversations", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     Chat([U, A])),
    ("conversations", {"conversations": [{"from": "system", "value": "s"}, {"from": "observation", "value": "o"},
                                         {"from": "function_call", "value": "{}", "weight": 0}]},
     Chat([{"role": "system", "content": "s"}, {"role": "tool", "content": "o"},
           {"role": "assistant", "content": "{}", "weight": 0}])),
    ("conversations", {"conversations": [U, A], "system": "s"}, Chat([{"role": "system", "content": "s"}, U, A])),
    ("instruction, output", {"instruction": "q", "input": "", "output": "a"}, Chat([U, A])),
    ("instruction, output", {"instruction": "q", "input": "x", "output": "a", "history": [["h", "i"]], "system": "s"},
     Chat([{"role": "system", "content": "s"}, {"role": "user", "content": "h"}, {"role": "assistant", "content": "i"},
           {"role": "user", "content": "q\nx"}, A])),
    ("prompt, completion", {"prompt": "q", "completion": "a"}, Chat([], pair=("q", "a"))),
    ("prompt, response", {"prompt": "q", "response": "a"}, Chat([], pair=("q", "a"))),
    ("question, answer", {"question": "q", "answer": "a", "n": 1}, Chat([], pair=("q", "a"))),
    ("prompt, completion", {"prompt": [U, A, U], "completion": [A]},
     Chat([{**U, "weight": 0}, {**A, "weight": 0}, {**U, "weight": 0}, A])),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record", "chat"), RECORDS)
def test_records_of_every_format(kind: str, record: dict[str, Any], chat: Chat) -> None:
    assert format_of(record) == kind
    assert chat_of(record) == chat


WRONG: list[tuple[Any, str]] = [
    ({"text": "a"}, "is no chat (it has: 'text')"),
    ([1], "is no chat (it has: list)"),
    ({"messages": "a"}, "is no chat (it has: 'messages')"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "has preferences (chosen, rejected)"),
    ({"messages": [{"content": "a"}]}, "which is no object with a role"),
    ({"messages": ["a"]}, "has the message 'a', which is no object with a role"),
    ({"messages": [{"role": "user", "content": 5}]}, "has a message of user whose content is no text"),
    ({"conversations": [{"from": "robot", "value": "a"}]}, "has a turn from 'robot', and known are human, user"),
    ({"instruction": 5, "output": "a"}, "has a message of user whose content is no text"),
    ({"messages": [U, {**A, "content": "\x02"}]}, "has one of the characters U+0002 and U+0003"),
]


@pytest.mark.parametrize(("record", "said"), WRONG, ids=range(len(WRONG)))
def test_wrong_records_are_refused_with_the_reason(tmp_path: Path, record: Any, said: str) -> None:
    file = chats.make_model(tmp_path)
    with pytest.raises(ValueError, match=re.escape(said)):
        ChatEncoder(get_tokenizer(str(file)), tmp_path, 100)(record)


def test_two_texts_need_no_template(tmp_path: Path) -> None:
    """The tokens of both, and an end of text, which is learned."""
    own = get_tokenizer("gpt2-600")
    example, _ = ChatEncoder(own, None, 100)({"prompt": "one two", "completion": " three"})
    asked, answer = own.encode("one two").tolist(), own.encode(" three").tolist()
    assert example.ids.tolist() == [own.eot, *asked, *answer, own.eot]
    assert spans_of(example.learned) == list(range(1 + len(asked), len(example.ids)))
    file = chats.make_model(tmp_path)
    theirs = get_tokenizer(str(file))
    example, _ = ChatEncoder(theirs, tmp_path, 100)({"question": "one two <|im_end|>", "answer": " three"})
    assert example.ids.tolist() == [*theirs.encode("one two <|im_end|>"), *theirs.encode(" three"), theirs.ends[0]]
    with pytest.raises(ConfigError, match=r"no chat template; put the model's chat_template\.jinja beside"):
        ChatEncoder(own, None, 100)({"messages": [U, A]})


def test_an_example_is_cut_at_the_length_of_a_row(tmp_path: Path) -> None:
    file = chats.make_model(tmp_path, chats.MARKED)
    whole, _ = ChatEncoder(get_tokenizer(str(file)), tmp_path, 10**6)({"messages": chats.conversation(1, 2)})
    n, first = len(whole.ids), int(np.flatnonzero(whole.learned)[0])
    for T, was in ((n, ""), (n - 1, "cut"), (first + 1, "cut"), (first, "lost"), (2, "lost")):
        example, cut = ChatEncoder(get_tokenizer(str(file)), tmp_path, T)({"messages": chats.conversation(1, 2)})
        assert (example.ids.tolist(), example.learned.tolist()) == (whole.ids[:T].tolist(), whole.learned[:T].tolist())
        assert cut == was


def test_a_typed_escape_is_text(tmp_path: Path) -> None:
    """Chats about JSON have backslashes before u0002. Only the two characters themselves are refused."""
    encoder = ChatEncoder(get_tokenizer(str(chats.make_model(tmp_path))), tmp_path, 10**6)
    for answer in (r"It is \u0002.", r"\\u0003 and \\\u0002", "\\", '"\\u0003"'):
        example, _ = encoder({"messages": [U, {**A, "content": answer}]})
        assert encoder.tokenizer.decode(example.ids[example.learned]) == f"{answer}<|im_end|>"
    tools = [{**TOOL, "name": "\x03"}]
    for answer, more in (("\x02", None), ("\\\x03", None), ("\\\\\x02u0002", None), ("fine", tools)):
        with pytest.raises(ValueError, match=r"has one of the characters U\+0002 and U\+0003"):
            encoder({"messages": [U, {**A, "content": answer}], "tools": more})


def test_empty_answers_are_found(tmp_path: Path) -> None:
    """Also one among others, and one of blanks. A call of a tool without words, and `weight` 0, are none."""
    encoder = ChatEncoder(get_tokenizer(str(chats.make_model(tmp_path))), tmp_path, 10**6)
    none, blank = {**A, "content": ""}, {**A, "content": " \n"}
    for messages, empty in (
        ([U, A], False), ([U, none], True), ([U, A, U, none, U, A], True), ([U, blank], True),
        ([U, {**A, "content": "x"}], False), ([U, {**none, "weight": 0}, U, {**A, "weight": 1}], False),
    ):  # fmt: skip
        example, _ = encoder({"messages": messages})
        assert encoder.empty_answer(example) is empty, messages
    assert encoder.empty_answer(encoder({"prompt": "q", "completion": ""})[0])
    assert not encoder.empty_answer(encoder({"prompt": "q", "completion": "a"})[0])


def test_our_own_tokenizers_find_their_end_of_text(tmp_path: Path) -> None:
    """Places of characters in a text of several bytes each, where tokens end inside of characters."""
    each = "{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}"
    template = "{% for m in messages %}" + each + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    for name in ("gpt2-600", "bytes"):
        tokenizer = get_tokenizer(name)
        encoder = ChatEncoder(tokenizer, tmp_path, 1000)
        for content in ("日本 🙂 é", "x", "<|endoftext|> no"):
            messages = [{"role": "user", "content": "é日"}, {"role": "assistant", "content": content}]
            example, _ = encoder({"messages": messages})
            assert tokenizer.decode(example.ids.tolist()) == f"user: é日assistant: {content}<|endoftext|>"
            learned = tokenizer.decode(example.ids[example.learned].tolist())
            assert learned == f"{content}<|endoftext|>" if name == "bytes" else learned.endswith("<|endoftext|>")
            assert example.ids[-1] == tokenizer.eot
            assert encoder.ends_turns(example)
            assert not learned.startswith("assistant")


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    """A file of its own wins over tokenizer_config.json, which may list several by name."""
    assert Template.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one {{ bos_token }}", "bos_token": {"content": "<s>"},
                                  "eos_token": None, "add_bos_token": True}))  # fmt: skip
    found = Template.load(tmp_path)
    assert found is not None
    assert found.special == {"bos_token": "<s>"}
    assert found.prompt([]) == "one <s>"
    several = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": several}))
    found = Template.load(tmp_path)
    assert found is not None
    assert found.prompt([]) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    found = Template.load(tmp_path)
    assert found is not None
    assert found.prompt([]) == "four"


EVIL = {
    "{{ messages.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ ''.__class__ }}": "",
    "{{ messages.append(1) }}": "unsafe",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}": "may not set",
    "{% for i in range(1000000) %}{% endfor %}": "Range too big",
    "{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}": "more than 67,108,864 characters",
    "{{ cycler.__init__.__globals__.os.popen('echo hi').read() }}": "unsafe",
    "{{ dict.fromkeys }}": "",
    "{{ raise_exception('no') }}": "no",
}


@pytest.mark.parametrize("source", EVIL)
def test_templates_run_in_a_sandbox(source: str) -> None:
    template = Template(source, {}, "x/chat_template.jinja")
    if not EVIL[source]:
        assert template.prompt([U]) == ""
        return
    with pytest.raises(ValueError, match=r"is refused by the chat template x/chat_template\.jinja") as raised:
        template.prompt([U])
    assert EVIL[source] in str(raised.value)


def test_a_template_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}")
    found = Template.load(tmp_path)
    assert found is not None
    with pytest.raises(DataError, match=r"chat_template\.jinja is no chat template for jinja2 \("):
        found.prompt([U])
