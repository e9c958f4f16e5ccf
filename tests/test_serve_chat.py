"""`/v1/chat/completions`: a real process and socket, asked by OpenAI's own client, with a model that knows answers."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_runs import inside, write_run
from serving import KEY, Browser, raw, serving
from talker import KNOWN, T, make_talker

from daybreak.generate import Sampling, Text, write_all
from daybreak.interop import Model, load_model

openai = pytest.importorskip("openai", reason="the dev extra installs openai")
torch.set_num_threads(1)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ASK: dict[str, Any] = {"model": "talk", "temperature": 0}


def user(text: Any, *before: dict[str, Any]) -> list[dict[str, Any]]:
    return [*before, {"role": "user", "content": text}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("serve-chat")
    make_talker(home)
    return home


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return load_model(home / "runs/talk")


@pytest.fixture(scope="module")
def port(home: Path) -> Iterator[int]:
    with serving(home, "runs/talk", "--rows", "3", DAYBREAK_KEY=KEY) as (_, port):
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)


def test_it_answers_and_stops_at_the_end_of_the_turn(client: Any) -> None:
    for question, answer in KNOWN.items():
        got = client.chat.completions.create(**ASK, messages=user(question))
        assert (got.object, got.model, len(got.choices)) == ("chat.completion", "talk", 1)
        assert got.id.startswith("chatcmpl-")
        choice = got.choices[0]
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", answer, "stop")


def test_a_stream_is_the_same(client: Any) -> None:
    ask = {**ASK, "messages": user("Name a colour."), "n": 2}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    last = chunks.pop()
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.delta.content for c in mine) == choice.message.content == KNOWN["Name a colour."]
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert all(c.usage is None for c in client.chat.completions.create(**ask, stream=True))


def test_greedy_tokens_are_those_of_transformers(client: Any, model: Model, home: Path) -> None:
    """Its rendering of the messages, its model of our export, and our own generation."""
    import transformers

    inside(home, "export", "runs/talk", "--to", "hf", "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(home / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "out")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    engine, own, template = model
    assert template is not None
    system = {"role": "system", "content": "Be of no help."}
    for messages in (user("Who are you?"), user("Where?", system), user("A mat λ?", system, *user("x"),
                     {"role": "assistant", "content": "y\n"})):  # fmt: skip
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        made = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=[end])[0].tolist()
        want = made[len(ids) :]
        text = Text(ids, Sampling(24, 0.0), template.ending(own))
        write_all(engine, [text])
        assert [t.id for t in text.made] == (want[:-1] if want[-1] == end else want)
        got = client.chat.completions.create(**ASK, messages=messages, max_tokens=24, logprobs=True, top_logprobs=2)
        choice = got.choices[0]
        assert choice.message.content == text.text
        assert choice.finish_reason == text.done == ("stop" if want[-1] == end else "length")
        assert got.usage.prompt_tokens == len(ids)
        assert got.usage.completion_tokens == len(text.made)
        assert got.usage.total_tokens == len(ids) + len(text.made)
        scored = choice.logprobs.content
        assert [bytes(t.bytes) for t in scored] == [own.token_bytes(t.id) for t in text.made]
        logits = theirs(torch.tensor([[*ids, *want]])).logits[0, len(ids) - 1 :].detach().double().log_softmax(-1)
        for i, token in enumerate(scored):
            assert token.logprob == pytest.approx(float(logits[i].max()), abs=1e-4)
            assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_lengths_stops_seeds(client: Any) -> None:
    create, ask = client.chat.completions.create, {**ASK, "messages": user("Who are you?")}
    for name in ("max_tokens", "max_completion_tokens"):
        cut = create(**ask, **{name: 2})
        assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)
        assert KNOWN["Who are you?"].startswith(cut.choices[0].message.content)
    stopped = create(**ask, stop=[" model"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("A small", "stop")
    warm = {**ask, "temperature": 3.0, "max_tokens": 12, "n": 3, "seed": 5, "top_p": 0.9}
    one, two = ([c.message.content for c in create(**warm).choices] for _ in range(2))
    assert one == two
    assert len(set(one)) == 3
    # Without a number, the answer has the room that the messages leave.
    free = create(model="talk", messages=user("Hm?"), temperature=30.0, extra_body={"top_k": 500}, logit_bias={})
    assert free.usage.total_tokens == T or free.choices[0].finish_reason == "stop"


def test_contents_in_parts(client: Any) -> None:
    parts = [{"type": "text", "text": "Do you"}, {"type": "text", "text": "sleep?"}]
    create = client.chat.completions.create
    one, two = (create(**ASK, messages=user(x), max_tokens=8) for x in (parts, "Do you\nsleep?"))
    assert (one.choices, one.usage) == (two.choices, two.usage)
    say = {"content": "Be short."}
    old, new = (create(**ASK, messages=user("x", {"role": r, **say}), max_tokens=8) for r in ("system", "developer"))
    assert (old.choices, old.usage) == (new.choices, new.usage)


def test_two_clients_at_once(client: Any) -> None:
    answers: dict[str, str] = {}

    def ask(question: str) -> None:
        chunks = client.chat.completions.create(**ASK, messages=user(question), stream=True)
        answers[question] = "".join(c.choices[0].delta.content for c in chunks)

    threads = [threading.Thread(target=ask, args=[question]) for question in KNOWN]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == KNOWN


def test_refusals(client: Any) -> None:
    hello = user("Hi")
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    for fields, said, param in (
        ({"messages": []}, "messages must be a list of objects with role and content, not empty", "messages"),
        ({"messages": "Hi"}, "messages must be a list", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"role = 'robot' is unknown; there are system, dev", None),
        ({"messages": [{"role": "user"}]}, "content must be a text, or a list of parts of the type text", None),
        ({"messages": user(image)}, "content must be a text, or a list", "messages[0]"),
        ({"messages": user([])}, "content must be a text, or a list", None),
        ({"messages": ["Hi"]}, "role = None is unknown", None),
        ({"messages": user("x " * T)}, rf"a prompt of \d+ tokens is more than the model's {T} tokens", "messages"),
        ({"messages": hello, "max_tokens": T}, rf"tokens of prompt \+ max_tokens = {T} must be at most", "max_tokens"),
        ({"messages": hello, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supp", "tools"),
        ({"messages": hello, "max_completion_tokens": -1}, "max_completion_tokens = -1 must", "max_completion_tokens"),
        ({"messages": hello, "logprobs": True, "top_logprobs": 21}, "top_logprobs = 21 must", "top_logprobs"),
        ({"messages": hello, "logprobs": 3}, "logprobs = 3 must be true or false", "logprobs"),
        ({"messages": hello, "temperature": -1}, "temperature = -1 must be", "temperature"),
        ({"messages": hello, "extra_body": {"prompt": "x"}}, "unknown field 'prompt'", "prompt"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=said) as error:
            client.chat.completions.create(**ASK | fields)
        assert error.value.type == "invalid_request_error"
        assert param is None or error.value.param == param
    with pytest.raises(openai.NotFoundError, match="use 'talk'"):
        client.chat.completions.create(model="gpt-4", messages=hello)
    assert client.chat.completions.create(**ASK, messages=user("Do you sleep?")).choices[0].message.content == "Never."


def test_fields_that_leave_the_text_as_it_is(client: Any) -> None:
    """OpenAI's own that only store, bill or hasten a request, and those that ask for text, as without them."""
    ask = {**ASK, "messages": user("Do you sleep?")}
    want = client.chat.completions.create(**ask)
    text = {"type": "text"}
    harmless: list[dict[str, Any]] = [
        {"store": False}, {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"parallel_tool_calls": False},
        {"response_format": text}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"function_call": "none"},
        {"modalities": ["text"]}, {"safety_identifier": "x"}, {"prompt_cache_key": "k"}, {"tools": []},
        {"prediction": {"type": "content", "content": "No."}},
    ]  # fmt: skip
    for more in [*harmless, {k: v for fields in harmless for k, v in fields.items()}]:
        got = client.chat.completions.create(**ask, **more)
        assert (got.choices, got.usage) == (want.choices, want.usage), more
    tool = {"type": "function", "function": {"name": "f"}}
    for field, value in (
        ("response_format", {"type": "json_object"}), ("tool_choice", "required"), ("tool_choice", tool),
        ("modalities", ["text", "audio"]), ("tools", [tool]), ("function_call", {"name": "f"}),
        ("audio", {"voice": "x"}),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=f"{field} is not supported; leave it out") as error:
            client.chat.completions.create(**ask, **{field: value})
        assert error.value.param == field


def test_what_the_template_refuses(home: Path) -> None:
    """A sentence with the template's own words, and without a path of the server's."""
    run = home / "runs/talk"
    (run / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    try:
        with serving(home, "runs/talk", DAYBREAK_KEY=KEY) as (_, port):
            body = b'{"model": "talk", "messages": [{"role": "system", "content": "x"}]}'
            status, answer, _ = raw(port, "POST", "/v1/chat/completions", body)
            assert status == 400
            said = "the conversation is refused by the chat template (System role not supported)."
            assert answer["error"]["message"] == said
            assert raw(port, "GET", "/v1/models")[1]["data"][0]["chat"] is True
    finally:
        from chats import CHATML

        (run / "chat_template.jinja").write_text(CHATML)


def test_a_base_model_does_not_chat(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with serving(tmp_path, "run", DAYBREAK_KEY=KEY) as (_, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
        said = "'run' does not chat, since it has no chat template; use /v1/completions."
        with pytest.raises(openai.BadRequestError, match=said):
            client.chat.completions.create(model="run", messages=user("Hi"))
        assert client.completions.create(model="run", prompt="x", max_tokens=2).usage.completion_tokens == 2
        assert client.models.list().data[0].chat is False


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_chats(port: int, tmp_path: Path) -> None:
    """Questions and answers stream into a conversation that forgets its oldest turns; the old page is a click away."""
    assert BROWSER
    browser = Browser(BROWSER, tmp_path)
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        browser.until("typeof at === 'function' && at('key').className === 'asked'")
        browser.run(f"at('secret').value = '{KEY}', at('secret').dispatchEvent(new Event('change'))")
        browser.until("document.title === 'talk · daybreak' && document.body.className === 'chat'")
        browser.run("at('temperature').value = 0, at('max_tokens').value = 30")
        said = "[...at('log').children].map(each => each.className + ': ' + each.textContent)"
        want: list[str] = []
        for question in ("Where is the cat?", "Do you sleep?", "Who are you?", "Do you <b>sleep</b>?"):
            browser.run(f"at('prompt').value = '{question}', at('form').requestSubmit()")
            browser.until("!running && at('state').textContent.includes('token')")
            if not want:
                assert browser.run(said) == [f"user: {question}", f"assistant: {KNOWN[question]}"]
            want.append(f"user: {question}")
            assert [line for line in browser.run(said) if line.startswith("user")] == want
        assert f"note: Earlier turns are forgotten: the model reads {T} tokens." in browser.run(said)
        assert browser.run("turns.length") < 8
        assert browser.run("document.documentElement.scrollWidth") == 390
        browser.run(f"at('prompt').value = '{'word ' * T}', at('form').requestSubmit()")
        browser.until("!running && at('error').textContent.includes('tokens')")
        assert browser.run("at('prompt').value").startswith("word")  # it can be mended
        assert [line for line in browser.run(said) if line.startswith("user")] == want
        browser.run("at('reset').click(), at('system').value = 'Be brief.', at('prompt').value = 'Do you sleep?'")
        assert browser.run(said) == []
        browser.run("at('form').requestSubmit()")
        browser.until("!running && at('state').textContent.includes('token')")
        browser.run("at('plain').click(), at('prompt').value = 'Once', at('form').requestSubmit()")
        browser.until(
            "!running && at('text').textContent.startsWith('Once') && at('state').textContent.includes('token')"
        )
        assert browser.run("getComputedStyle(at('log')).display") == "none"
    finally:
        browser.close()
