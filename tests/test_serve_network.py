"""`daybreak serve` and strangers on the network: names, keys, limits, patience; and its page in a browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from interop_runs import MAX_T, ROOT, write_run
from patience import PATIENCE
from serving import KEY, Browser, raw, serving

from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import Error
from daybreak.generate import Sampler, Sampling
from daybreak.interop import Model
from daybreak.serve import app as app_module
from daybreak.serve.app import Service, serve
from daybreak.serve.network import listen
from daybreak.state.run import Run

openai = pytest.importorskip("openai", reason="the dev extra installs openai")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ASK = json.dumps({"model": "run", "prompt": "x", "max_tokens": 1}).encode()
IMPATIENT = "import daybreak.serve.network as n; n.PATIENCE = 1; import daybreak.serve.app as a; a.PATIENCE = 1"
FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """With a key."""
    with serving(folder, "run", DAYBREAK_KEY=KEY) as (_, port):
        yield port


@pytest.fixture
def model(folder: Path) -> tuple[Engine, Tokenizer]:
    return Run(folder / "run").load_engine()


def head(length: int, *more: str) -> bytes:
    """The start of a request for a completion."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def read(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_the_network_rules(port: int) -> None:
    assert raw(port, "POST", "/v1/completions", ASK)[0] == 200
    assert raw(port, "POST", "/v1/completions", ASK, Content_Type="text/plain")[0] == 415
    assert raw(port, "POST", "/v1/completions", b"{")[0] == 400
    assert raw(port, "POST", "/v1/completions", b"[" * 100_000)[0] == 400
    assert raw(port, "POST", "/v1/completions", b'{"n": ' + b"1" * 100_000 + b"}")[0] == 400
    assert raw(port, "POST", "/v1/completions", b" " * ((1 << 20) + 1))[0] == 413
    for path in ("/v1/models", "/v1/completions"):
        method = "GET" if "models" in path else "POST"
        for key in ("", "Bearer", "Bearer wrong", KEY):
            status, body, headers = raw(port, method, path, ASK, Authorization=key)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong").models.list()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="run", prompt="x", n=0)
    assert caught.value.param == "n"


def test_with_a_key_the_server_has_any_name(port: int) -> None:
    for name in ("gpu-box.example", "192.0.2.7:8000", "[2001:db8::1]:8000", "localhost"):
        assert raw(port, "POST", "/v1/completions", ASK, Host=name)[0] == 200
        assert raw(port, "POST", "/v1/completions", ASK, Host=name, Authorization="")[0] == 401


def test_without_a_key_its_own_names_only(folder: Path) -> None:
    with serving(folder, "run", "--allow-host", "Gpu-Box.example", DAYBREAK_KEY="", DAYBREAK_API_KEY="") as (_, port):
        for name in ("localhost", f"127.0.0.1:{port}", "[::1]:80", "gpu-box.example:9", "GPU-BOX.example"):
            assert raw(port, "POST", "/v1/completions", ASK, Host=name)[0] == 200, name
        for name in ("evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "[::1].evil.example"):
            for path in ("/", "/health", "/v1/models", "/v1/completions", "/nothing"):
                status, body, _ = raw(port, "GET", path, Host=name)
                assert (status, body["error"]["type"]) == (400, "invalid_request_error"), (name, path)
                assert repr(name) in body["error"]["message"]


def test_the_key_has_one_name_and_its_old_one(
    folder: Path, model: tuple[Engine, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DAYBREAK_KEY", "DAYBREAK_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Error, match=r"--host 0\.0\.0\.0 lets others in: set DAYBREAK_KEY to a secret of 16") as caught:
        serve(Model(*model), "run", host="0.0.0.0", port=0)
    assert caught.value.exit_code == 2
    for name in ("DAYBREAK_API_KEY", "DAYBREAK_KEY"):  # the second one counts where both are set
        monkeypatch.setenv(name, "fifteen-letters")
        with pytest.raises(Error, match=f"{name} is too short: set {name} to a secret of 16 or more") as caught:
            serve(Model(*model), "run", host="127.0.0.1", port=0)
        assert caught.value.exit_code == 2
    with serving(folder, "run", "--host", "0.0.0.0", DAYBREAK_KEY="", DAYBREAK_API_KEY=KEY) as (_, port):
        assert raw(port, "GET", "/v1/models", Host=socket.gethostname())[0] == 200
        assert raw(port, "GET", "/v1/models", Host=socket.gethostname(), Authorization="")[0] == 401


def test_health_needs_no_key(port: int) -> None:
    status, body, _ = raw(port, "GET", "/health", Authorization="")
    assert (status, body) == (200, {"status": "ok"})


def test_every_error_is_json(port: int, model: tuple[Engine, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
        found, body, headers = raw(port, method, path)
        assert (found, body["error"]["type"]) == (status, "invalid_request_error")
        assert ("Allow" in headers) == (status == 405)
    for nonsense in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost : b\r\n\r\n", b"GET /" + b"x" * 70_000):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
            sock.sendall(nonsense)
            answer, _, body = read(sock).partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    service = Service(Model(*model), "run")
    monkeypatch.setattr(service.writer, "submit", None)  # a bug of ours

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(service.app("", ["localhost"]), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", content=ASK, headers={"Content-Type": "application/json"})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert answer.headers["Content-Security-Policy"] == "default-src 'none'"


def test_a_full_queue_says_when_to_come_back(folder: Path) -> None:
    with serving(folder, "run", "--queue", "2", "--rows", "1") as (_, port):
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="any", max_retries=0)
        ask: dict[str, Any] = {"model": "run", "prompt": "x", "max_tokens": 60, "n": 100, "stream": True}
        streams = [client.completions.create(**ask) for _ in range(2)]
        assert all(next(stream) for stream in streams)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**ask)
        assert caught.value.response.headers["Retry-After"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        streams[0].close()
        patient = client.with_options(max_retries=50)  # a slot is freed when a client disconnects
        assert next(patient.completions.create(**ask)).choices[0].index == 0


def test_idle_connections_lock_nobody_out(folder: Path) -> None:
    """300 of them at a process that may open 200 files; some have asked already, some have begun to."""
    with serving(folder, "run", before=FEW_FILES) as (process, port):
        idle = []
        for i in range(300):
            sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            idle.append(sock)
            if i % 3:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"\r\n" * (i % 2))
        for _ in range(3):
            assert raw(port, "POST", "/v1/completions", ASK)[0] == 200
        for sock in idle:
            sock.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_headers_and_bodies_that_do_not_come(folder: Path) -> None:
    """A client that sends no whole request is answered 408, though bytes drip in. Neither it nor a client that leaves
    while sending or reading costs a line on stderr."""
    body = json.dumps({"model": "run", "prompt": "x", "max_tokens": 60, "stream": True}).encode()
    starts = (b"POST /v1/completions HT", head(1000) + b'{"model"', b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
    with serving(folder, "run", before=IMPATIENT) as (process, port):
        for start in starts:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
                sock.sendall(start)
                while not select.select([sock], [], [], 0.05)[0]:
                    sock.sendall(b"x")
                answer = sock.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert b"no whole request came within 1 seconds." in answer
        for sent in (head(1000) + b"{", head(1000), head(len(body)) + body, head(len(body))[:30]):
            for reset in (False, True):
                with socket.create_connection(("127.0.0.1", port)) as sock:
                    if reset:  # closing sends a reset
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    sock.sendall(sent)
        assert raw(port, "POST", "/v1/completions", ASK)[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_nothing_is_generated_for_a_client_that_has_gone(
    model: tuple[Engine, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a request without a stream too, while tokens come all the time."""
    monkeypatch.setattr(app_module, "POLL", 0.0)
    service, sent = Service(Model(*model), "run"), list[dict[str, Any]]()
    body = json.dumps({"model": "run", "prompt": "x", "max_tokens": 60, "n": 128}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1",
             "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}  # fmt: skip

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        await service.app("", ["localhost"])(scope, receive, send)
        await asyncio.to_thread(service.writer.stop)

    service.writer.start()
    asyncio.run(ask())
    assert sent[0]["status"] == 499
    assert not service.writer.batch.texts


def test_a_signal_right_after_the_address_counts(folder: Path) -> None:
    script = (
        "import os, signal\nfrom daybreak.serve.app import serve\nfrom daybreak.interop import load_model\n"
        "stop = lambda url: os.kill(os.getpid(), signal.SIGTERM)\n"
        "serve(load_model('run'), 'run', host='127.0.0.1', port=0, ready=stop)\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=PATIENCE)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_small_answer_is_sent_at_once() -> None:
    """Without TCP_NODELAY the second packet of an answer waits 40 ms for the first one's receipt."""
    with listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        accepted.close()


def test_the_page_is_one_file_that_its_policy_fits(port: int) -> None:
    page = (ROOT / "daybreak/serve/page.html").read_text()
    assert len(page.splitlines()) < 300
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", page)
    for path in ("/", "/v1"):
        status, data, headers = raw(port, "GET", path, Authorization="")
        assert (status, data.decode()) == (200, page)
        assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        block = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)
        assert block
        digest = base64.b64encode(hashlib.sha256(block[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_in_a_browser(folder: Path, port: int, tmp_path: Path) -> None:
    """A prompt is written and the text streams in; the key is asked for; a wrong request shows its sentence."""
    assert BROWSER
    browser = Browser(BROWSER, tmp_path)
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        browser.until("typeof at === 'function' && at('error').textContent.includes('API key is missing')")
        assert browser.run("at('key').className") == "asked"
        browser.run(f"at('secret').value = '{KEY}', at('secret').dispatchEvent(new Event('change'))")
        browser.until("document.title === 'run · daybreak'")
        assert browser.run("at('error').textContent") == ""
        prompt = "The <b>meaning</b> of"
        browser.run(f"at('temperature').value = 0, at('max_tokens').value = 12, at('prompt').value = '{prompt}'")
        browser.run("at('form').requestSubmit()")
        browser.until("at('state').textContent.startsWith('12 tokens') && !at('more').disabled")
        made = "".join(Sampler(folder / "run").text(prompt, Sampling(12, 0.0)))
        assert browser.run("at('text').textContent") == prompt + made
        assert browser.run("at('text').children.length") == 1  # the prompt is text, not HTML
        browser.run("at('more').click()")
        browser.until("!running && at('state').textContent.includes('token')")
        assert browser.run("at('text').textContent").startswith(prompt + made)
        browser.run(f"at('max_tokens').value = {MAX_T}, at('form').requestSubmit()")
        browser.until("at('error').textContent.includes('must be at most')")
        assert browser.run("document.documentElement.scrollWidth") == 390
    finally:
        browser.close()
