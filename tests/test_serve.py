"""`daybreak serve`: a real process and socket, asked by OpenAI's own client; its texts against the engine's."""

from __future__ import annotations

import json
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cpu_seconds
from decoders import V, their_decoder
from interop_runs import MAX_T, daybreak, write_run
from patience import PATIENCE
from serving import KEY, serving

from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.engine import Engine
from daybreak.generate import Sampler, Sampling, Text, Token
from daybreak.serve.completions import FIELDS, Refused, parse
from daybreak.serve.writer import Job, News, Writer
from daybreak.state.run import Run

openai = pytest.importorskip("openai", reason="the dev extra installs openai")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[int, int]]:
    with serving(folder, "run", "--rows", "3", DAYBREAK_KEY=KEY) as (process, port):
        yield process.pid, port


@pytest.fixture(scope="module")
def server(served: tuple[int, int]) -> int:
    return served[0]


@pytest.fixture(scope="module")
def port(served: tuple[int, int]) -> int:
    return served[1]


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[Engine, Tokenizer]:
    return Run(folder / "run").load_engine()


def test_models(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["run"]
    assert client.models.retrieve("run").owned_by == "daybreak"
    with pytest.raises(openai.NotFoundError, match="use 'run'"):
        client.models.retrieve("gpt-4")


def test_a_model_of_text_draws_no_pictures(client: Any) -> None:
    said = "'run' has learned text only, and draws no pictures; use /v1/completions."
    with pytest.raises(openai.BadRequestError, match=said):
        client.images.generate(model="run", prompt="a dog")


def test_greedy_texts_are_the_engines(client: Any, folder: Path) -> None:
    prompts = ["The meaning of", "def f(x):", "", "naïve 漢字", "a b c d e f g h"]
    sampler = Sampler(folder / "run")
    want = ["".join(sampler.text(p, Sampling(20, 0.0))) for p in prompts]
    got = client.completions.create(model="run", prompt=prompts, max_tokens=20, temperature=0)
    assert [c.text for c in got.choices] == want
    assert [c.index for c in got.choices] == list(range(5))
    tok = sampler.tokenizer
    read = sum(1 + len(tok.encode(p)) for p in prompts)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (read, 5 * 20)
    ids = [tok.eot, *map(int, tok.encode(prompts[0]))]
    assert client.completions.create(model="run", prompt=ids, max_tokens=20, temperature=0).choices[0].text == want[0]


def test_seed_and_n(client: Any, folder: Path) -> None:
    ask = {"model": "run", "prompt": ["x", "y"], "max_tokens": 12, "n": 2, "temperature": 0.8, "top_p": 0.9}
    one, two = (client.completions.create(**ask, seed=5, extra_body={"top_k": 50}) for _ in range(2))
    assert [c.text for c in one.choices] == [c.text for c in two.choices]
    sampler = Sampler(folder / "run")
    want = ["".join(sampler.text("xxyy"[i], Sampling(12, 0.8, 50, 0.9, 5 + i))) for i in range(4)]
    assert [c.text for c in one.choices] == want
    assert len(set(want)) == 4
    free = [client.completions.create(model="run", prompt="x", max_tokens=20).choices[0].text for _ in range(2)]
    assert free[0] != free[1]


def test_penalties_and_biases(client: Any, folder: Path) -> None:
    sampler, ask = Sampler(folder / "run"), {"model": "run", "prompt": "The", "max_tokens": 30}
    penalties = {"frequency_penalty": 1.5, "presence_penalty": -0.5}
    others = {"min_p": 0.3, "repetition_penalty": 1.7}
    for how in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 4}):
        for fields in (penalties, others, {}):
            first = {name: value for name, value in fields.items() if name in penalties}
            extra = {name: value for name, value in fields.items() if name in others}
            got = client.completions.create(**ask, **how, **first, logit_bias={"7": 2.5, "300": 9}, extra_body=extra)
            want = Sampling(30, **how, **fields, logit_bias=((7, 2.5), (300, 9.0)))
            assert got.choices[0].text == "".join(sampler.text("The", want)), (how, fields)
    plain = "".join(sampler.text("The", Sampling(30, 0.0)))
    assert client.completions.create(**ask, temperature=0, frequency_penalty=2).choices[0].text != plain


def test_streams_add_up(client: Any) -> None:
    ask = {"model": "run", "prompt": "The", "max_tokens": 25, "n": 2, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**ask)
    ask |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.completions.with_raw_response.create(**ask)
    assert answer.headers["X-Accel-Buffering"] == "no"  # so nginx passes each event on at once
    chunks = list(answer.parse())
    assert chunks.pop().usage == whole.usage
    assert len(chunks) > 20
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(c.logprobs, key) for c in mine]
            assert [x for part in parts for x in part] == getattr(choice.logprobs, key)


def test_a_stop_string_ends_the_text_before_it(client: Any) -> None:
    ask = {"model": "run", "prompt": "The", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text
    stop = text[10:13]
    cut = client.completions.create(**ask, stop=[stop, "never"], logprobs=0).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")
    assert all(at < len(cut.text) for at in cut.logprobs.text_offset)
    found = cut.logprobs
    assert found.top_logprobs == [{t: x} for t, x in zip(found.tokens, found.token_logprobs, strict=True)]
    parts = client.completions.create(**ask, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in parts) == cut.text


def test_echo_and_log_probabilities(client: Any, model: tuple[Engine, Tokenizer]) -> None:
    """As lm-evaluation-harness asks: prompt tokens scored, with the likeliest beside each."""
    engine, tok = model
    ids = [int(i) for i in tok.encode("The meaning of life, naïve")]
    got = client.completions.create(
        model="run", prompt=[ids, [tok.eot, *ids]], max_tokens=1, temperature=0, echo=True, logprobs=3
    )
    for given, choice in zip(([*ids], [tok.eot, *ids]), got.choices, strict=True):
        found, logits = choice.logprobs, engine.logits(torch.tensor([given]))[0].double()
        logprobs = torch.log_softmax(logits, 1)
        made = int(logits[-1].argmax())
        assert choice.text == tok.decode([*given, made])
        want = [logprobs[i, t].item() for i, t in enumerate([*given[1:], made])]
        assert found.token_logprobs == [None, *(pytest.approx(x, rel=1e-4) for x in want)]
        assert found.top_logprobs[0] is None
        for i, top in enumerate(found.top_logprobs[1:]):
            likeliest = {int(t) for t in logprobs[i].topk(3).indices} | {[*given[1:], made][i]}
            values = sorted(logprobs[i, t].item() for t in likeliest)  # the token itself too, as OpenAI does
            assert sorted(top.values()) == pytest.approx(values, rel=1e-4)
            assert found.tokens[i + 1] in top
        assert len(found.tokens) == len(found.text_offset) == len(given) + 1
        ends = [*found.text_offset[1:], len(choice.text)]
        for token, a, b in zip(found.tokens, found.text_offset, ends, strict=True):
            assert token.startswith("bytes:") or choice.text[a:b] == token
    only = client.completions.create(model="run", prompt="The end", max_tokens=0, echo=True, logprobs=1).choices[0]
    assert (only.text, only.finish_reason) == ("The end", "length")
    assert "".join(only.logprobs.tokens) == "The end"
    assert all(math.isfinite(x) for x in only.logprobs.token_logprobs)  # of text: the document's start is before it


LONGEST = max(len(get_tokenizer("gpt2-1024").token_bytes(i)) for i in range(1024))
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-4"}, 404, "model = 'gpt-4' is not served here; use 'run'."),
    ({"max_tokens": MAX_T}, 400, f"2 tokens of prompt + max_tokens = {MAX_T} must be at most the model's {MAX_T}."),
    ({"max_tokens": -1}, 400, "max_tokens = -1 must be a whole number, 0 or more."),
    ({"max_tokens": 1.5}, 400, "max_tokens = 1.5 must be a whole number, 0 or more."),
    ({"n": 129}, 400, "n = 129 must be a whole number, from 1 to 128."),
    ({"n": 65, "prompt": ["a", "b"]}, 400, "2 prompts x n = 65 must be at most 128 texts."),
    ({"temperature": True}, 400, "temperature = True must be a number, from 0 to 100."),
    ({"top_p": 0}, 400, "top_p = 0 must be above 0 and at most 1."),
    ({"logprobs": 21}, 400, "logprobs = 21 must be a whole number, from 0 to 20."),
    ({"stop": ["a", ""]}, 400, "stop must be a text, or up to 16 of them, none empty."),
    ({"prompt": []}, 400, "prompt must be a text, a list of token ids, or a list of either, not empty."),
    ({"prompt": [[]]}, 400, "prompt: token ids must be whole numbers from 0 to 1024, at least one."),
    ({"prompt": [1025]}, 400, "prompt: token ids must be whole numbers from 0 to 1024, at least one."),
    ({"prompt": ["a", 5]}, 400, "prompt: token ids must be whole numbers from 0 to 1024, at least one."),
    ({"suffix": "x"}, 400, "suffix is not supported; leave it out."),
    ({"presence_penalty": 3}, 400, "presence_penalty = 3 must be a number, from -2 to 2."),
    ({"frequency_penalty": "1"}, 400, "frequency_penalty = '1' must be a number, from -2 to 2."),
    ({"repetition_penalty": 0}, 400, "repetition_penalty = 0 must be finite and above 0."),
    ({"min_p": 1.5}, 400, "min_p = 1.5 must be a number, from 0 to 1."),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias[5] = 101 must be a number, from -100 to 100."),
    *[
        (
            {"logit_bias": bad},
            400,
            "logit_bias must be an object of up to 300 token ids, from 0 to 1024, and their biases.",
        )
        for bad in ({"1025": 1}, {"x" * 100_000: 1}, [1], {str(i): 1 for i in range(301)})
    ],
    ({"best_of": 3}, 400, "best_of is not supported; leave it out, or make it n."),
    ({"echo": 1}, 400, "echo = 1 must be true or false."),
    ({"stop": "x" * 900_000}, 400, "stop has 900000 characters; it must be at most 256."),
    ({"prompt": ["x"] * 190_000}, 400, "190000 prompts x n = 1 must be at most 128 texts."),
    (
        {"prompt": " " * 1_000_000 + "\u00a0"},
        400,
        f"a prompt of 1000001 characters is more than the model's {MAX_T} tokens can hold ({MAX_T * LONGEST}).",
    ),
    (
        {"prompt": [7] * 400_000},
        400,
        f"a prompt of 400000 tokens is more than the model's {MAX_T} tokens can hold ({MAX_T}).",
    ),
    ({"x" * 1_000_000: 3}, 400, f"unknown field '{'x' * 37}...{'x' * 38}'; the fields are {', '.join(FIELDS)}."),
    (
        {"temperature": "y" * 1_000_000},
        400,
        f"temperature = '{'y' * 37}...{'y' * 38}' must be a number, from 0 to 100.",
    ),
    ({"model": ["z"] * 300_000}, 404, "model = ['z', 'z', 'z', 'z', 'z', 'z', ...] is not served here; use 'run'."),
    ({"max_token": 3}, 400, "unknown field 'max_token'; did you mean 'max_tokens'?"),
]


@pytest.mark.parametrize(("field", "status", "sentence"), REFUSED, ids=[str(case[0])[:40] for case in REFUSED])
def test_what_is_refused(field: dict[str, Any], status: int, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        parse({"model": "run", "prompt": "x"} | field, "run", get_tokenizer("gpt2-1024"), MAX_T, 1025)
    assert (caught.value.status, str(caught.value)) == (status, sentence)
    assert len(json.dumps(caught.value.body())) < 500


def test_lengths_and_counts_are_bounded_before_any_work() -> None:
    """Text that is too much is never tokenized, and a long stop string is not compared with more than there is."""
    seen = list[int]()

    class Counting(Tokenizer):
        def encode(self, text: str) -> Any:
            seen.append(len(text))
            return super().encode(text)

    tok = Counting("bytes", [bytes([value]) for value in range(256)], "")
    most = MAX_T * len("<|endoftext|>")
    for prompt in (["x"] * 129, "x" * (most + 1), ["y" * (most + 1)] * 128, [7] * (MAX_T + 1)):
        with pytest.raises(Refused):
            parse({"model": "run", "prompt": prompt}, "run", tok, MAX_T, 257)
    assert seen == []
    with pytest.raises(Refused, match=f"{MAX_T + 1} tokens of prompt"):
        parse({"model": "run", "prompt": "x" * MAX_T}, "run", tok, MAX_T, 257)
    assert seen == [MAX_T]

    class Sliced(str):
        def __getitem__(self, key: Any) -> str:
            seen.append(1)
            return super().__getitem__(key)

    seen.clear()
    text = Text([tok.eot], Sampling(3, 0.0, stop=(Sliced("b" * 900_000),)), tok)
    for token in b"abb":
        text.take(token)
    assert (text.text, text.done) == ("abb", "length")
    assert len(seen) <= 1 + 1 + 2


def test_half_a_surrogate_pair_is_a_character_that_is_unknown() -> None:
    tok = get_tokenizer("gpt2-1024")
    asked = parse({"model": "run", "prompt": "a\ud800", "echo": True}, "run", tok, MAX_T, 1025)
    assert asked.prompts[0].text == "a\ufffd"
    with pytest.raises(Refused) as caught:
        parse({"\ud800": 1}, "run", tok, MAX_T, 1025)
    assert json.dumps(caught.value.body()).isascii()


def test_a_short_request_does_not_wait_for_a_long_one(client: Any) -> None:
    """40 texts in 3 rows are under way; a single one takes its turn, and many at once all get their own answer."""
    ended, begun = dict[str, float](), threading.Event()

    def ask(name: str, n: int) -> None:
        for _ in client.completions.create(model="run", prompt="x", max_tokens=40, n=n, stream=True):
            begun.set()
        ended[name] = time.monotonic()

    long = threading.Thread(target=ask, args=("long", 40))
    long.start()
    assert begun.wait(PATIENCE)
    ask("short", 1)
    long.join()
    assert ended["short"] < ended["long"]
    texts: dict[int, str] = {}

    def greedy(i: int) -> None:
        made = client.completions.create(model="run", prompt=f"{i} x", max_tokens=15, temperature=0, echo=True)
        texts[i] = made.choices[0].text

    threads = [threading.Thread(target=greedy, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(texts[i].startswith(f"{i} x") for i in range(10))


def test_who_hangs_up_is_written_for_no_longer(server: int, port: int, client: Any) -> None:
    body = json.dumps({"model": "run", "prompt": "x", "max_tokens": 60, "n": 40}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    begun = cpu_seconds(server)
    client.completions.create(model="run", prompt="x", max_tokens=60, n=40)
    alone = cpu_seconds(server) - begun
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(head.encode() + body)
            time.sleep(0.05)
    begun = cpu_seconds(server)
    client.completions.create(model="run", prompt="x", max_tokens=60, n=3)
    assert cpu_seconds(server) - begun < 2.5 * alone  # five requests at their full length are 5 times as much


def await_news(told: list[Any], count: int) -> None:
    for _ in range(400):
        if len(told) >= count:
            return
        time.sleep(0.05)


def test_turns(model: tuple[Engine, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go to the requests in turn, and a failure reaches every client."""
    engine, tok = model
    writer, told = Writer(engine), list[tuple[str, News]]()

    def job(name: str, n: int) -> Job:
        texts = [Text([tok.eot], Sampling(2, seed=i), tok) for i in range(n)]
        return Job(texts, lambda news: told.append((name, news)))

    for name, n in (("a", 3), ("b", 1), ("c", 2)):
        assert writer.submit(job(name, n))
    while joining := writer._next():
        writer._write(joining)
        writer._write([])
        if sum(bool(news.done) for _, news in told) == 6:
            break
    assert [name for name, news in told if news.done] == ["a", "b", "c", "a", "c", "a"]
    assert all(writer.submit(job("x", 1)) for _ in range(64))
    assert not writer.submit(job("x", 1))
    told.clear()
    with monkeypatch.context() as broken:
        broken.setattr(engine, "prefill", None)
        writer.start()
        await_news(told, 64)
        assert {news.done for _, news in told} == {"error"}
    assert writer.submit(job("y", 1))  # it goes on
    await_news(told, 66)
    assert [news.done for _, news in told[64:]] == ["", "length"]
    writer.stop()


def test_a_tokens_news_waits_until_its_text_is_certain() -> None:
    tok, told = get_tokenizer("bytes"), list[News]()
    text = Text([tok.eot], Sampling(9, 0.0, stop=("xy",)), tok)
    job = Job([text], told.append)
    for token in b"axxy":
        text.take(token)
        job.report(0)
    assert [(news.text, [t.id for t in news.tokens], news.done) for news in told] == [
        ("a", [97], ""), ("x", [120], ""), ("", [], "stop")]  # fmt: skip
    assert isinstance(told[0].tokens[0], Token)
    assert job.over


def test_sigterm_lets_requests_end(folder: Path) -> None:
    with serving(folder, "run") as (process, port):
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model="run", prompt="x", max_tokens=60, stream=True, seed=1)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert first.choices[0].text or rest
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_hugging_face_folder_and_a_taken_port(folder: Path) -> None:
    daybreak(folder, "export", "run", "--to", "hf", "hf")
    ask = {"prompt": "The meaning of", "max_tokens": 15, "temperature": 0}
    want = "".join(Sampler(folder / "run").text("The meaning of", Sampling(15, 0.0)))
    with serving(folder, "hf") as (_, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any")
        assert client.completions.create(model="hf", **ask).choices[0].text == want
        done = daybreak(folder, "serve", "hf", "--port", str(port), code=2)
        assert f"--port {port} cannot be used (Address already in use); choose others." in done.stderr


def test_each_end_that_generation_config_lists_ends_an_answer(tmp_path: Path) -> None:
    """As transformers' own generation with the same list of ends does, whole and as a stream."""
    theirs, count = their_decoder("llama", tmp_path / "m"), 24
    prompts = [[256, *f"Question {i}".encode()] for i in range(8)]
    how = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    how["suppress_tokens"] = list(range(257, V))  # ids without a token

    def made(prompt: list[int], ends: list[int]) -> list[int]:
        tokens = torch.tensor([prompt])
        found = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), eos_token_id=ends, **how)
        return list(map(int, found[0, len(prompt) :]))

    free = [made(prompt, [256]) for prompt in prompts]
    ends = list(dict.fromkeys(ids[5 + i] for i, ids in enumerate(free[:3])))  # 256, which starts a document, ends too
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    want, tok = [made(prompt, [*ends, 256]) for prompt in prompts], get_tokenizer("bytes")
    assert {ids[-1] for ids in want if len(ids) < count} == set(ends)
    assert len(ends) == 3
    assert any(not {*ids} & {*ends} for ids in want)
    with serving(tmp_path, "m") as (_, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
        ask = {"model": "m", "prompt": prompts, "max_tokens": count, "temperature": 0}
        got = client.completions.create(**ask)
        pieces = list(client.completions.create(**ask, stream=True))
    for i, (ids, choice) in enumerate(zip(want, got.choices, strict=True)):
        text, reason = (tok.decode(ids[:-1]), "stop") if ids[-1] in ends else (tok.decode(ids), "length")
        assert (choice.text, choice.finish_reason) == (text, reason)
        mine = [piece.choices[0] for piece in pieces if piece.choices[0].index == i]
        assert "".join(piece.text for piece in mine) == choice.text
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    assert got.usage.completion_tokens == sum(len(ids) - (ids[-1] in ends) for ids in want)
