"""`report` and `watch`: a page that runs nothing foreign, in a browser.

The browser is Chromium where it is installed; the tests that need it are skipped elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import EVIL, MadeRun, made_run
from patience import PATIENCE

import daybreak
from daybreak.cli.main import main
from daybreak.config import Config
from daybreak.report.page import page_data, render, to_json
from daybreak.report.series import Follower
from daybreak.report.watch import Watch

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return made_run(tmp_path / "made")


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_file_stands_alone_and_its_policy_fits(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made.path)]) == 0
    out = made.path / "report.html"
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(", re.sub(r"<script.*?</script>", "", text, flags=re.S))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 2
    for kind, blocks in (("script-src", scripts), ("style-src", re.findall(r"<style>(.*?)</style>", text, re.S))):
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in blocks]
        assert f"{kind} {' '.join(hashes)};" in policy
    assert "unsafe" not in policy
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["runs"][0]["samples"][0]["text"] == EVIL
    assert data["references"]["1558M"]["GPT-2"] == {"loss": 2.831273, "hellaswag": 0.488946}


def test_json_that_cannot_leave_its_element() -> None:
    assert "<" not in to_json({"text": "</script><!--"})
    assert (
        to_json({"text": "NaN", "loss": [float("nan"), -float("inf"), 2.5]}) == '{"text":"NaN","loss":[null,null,2.5]}'
    )


def dom(url: str, *flags: str) -> str:
    """The document after its scripts ran, in a real browser."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", *flags]
    return subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=PATIENCE).stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_report_in_a_browser(made: MadeRun, tmp_path: Path) -> None:
    (tmp_path / "main.log").write_text("s:0 tel:10.9500\ns:0 trl:10.9000 lr:0.000001 norm:20.00\n")
    out = tmp_path / "report.html"  # beside the first one's folder, whose own page stays
    assert main(["report", str(made.path), str(tmp_path / "main.log")]) == 0
    page = dom(f"file://{out}#x=dollars&logy=1&smooth=0.5&reference=124M")
    assert re.search(r"<title>made, test_the_report_in_a_browser\d* · daybreak</title>", page)  # nothing foreign ran
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions[:3] == ["Loss", "HellaSwag accuracy (llm.c's rules)", "Validation, bits per byte"]
    assert {"Temperature, °C", "Power, W", "Memory, MiB"} <= set(captions)
    assert "Utilisation (MFU)" not in captions  # unknown here
    assert page.count("<canvas") == page.count('role="img"') == len(captions)
    table = re.search(r'id="summary">(.*?)</table>', page)[1]
    head, first, second = (
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        for row in re.findall("<tr>(.*?)</tr>", table)
    )
    assert "MFU" not in head  # no run has it
    row = dict(zip(head, first, strict=True))
    assert (row["run"], row["state"], row["step"], row["of"]) == ("● made", "running", "5", "10")
    assert (row["tokens"], row["loss"], row["validation"], row["bits per byte"]) == ("5,000", "3", "5.500", "2")
    assert (row["time"], row["cost"], row["HellaSwag"], row["tok/s"]) == ("12 min", "$7.10", "0.25", "500")
    assert dict(zip(head, second, strict=True))["validation"] == "10.95"
    assert re.search(r"validation</span> <b>5.500</b>", page)  # the legend has the digits of the table
    assert "&lt;img src=x" in page  # the sample, as text
    assert "<img" not in page


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("tokens", "ended", "said"),
    [
        (64, None, "None yet."),
        (64, 0, "None."),
        (64, 75, "None."),
        (0, None, "None, because eval.sample_tokens is 0."),
        (0, 0, "None, because eval.sample_tokens is 0."),
    ],
)
def test_a_run_without_samples_says_whether_some_will_come(
    tmp_path: Path, tokens: int, ended: int | None, said: str
) -> None:
    run = MadeRun(tmp_path / "bare", **{"eval.sample_tokens": tokens})
    for step, loss in enumerate((3.7834, 3.4003, 1.61), 1):
        run.step(step, 100.0 * step, loss)
    if ended is not None:
        record = {"code": ended, "reason": "its end", "step": 3, "time": 300.0}
        (run.path / "exit.json").write_text(json.dumps(record))
    assert main(["report", str(run.path)]) == 0
    page = dom(f"file://{run.path / 'report.html'}")
    assert re.search(r'id="sample"[^>]*>([^<]*)<', page)[1] == said
    # a last digit that is 0 is shown, so that runs can be compared
    assert re.search(r"<dt>training loss</dt><dd>([^<]*)<", page)[1] == "1.610"


def drawn(page: str) -> dict[str, dict[str, str]]:
    """Title of a chart -> what it says of itself, and the names in its legend."""
    found = {}
    for attributes, title, body in re.findall(
        r"<figure([^>]*)><figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.S
    ):
        found[title] = dict(re.findall(r'data-(\w+)="([^"]*)"', attributes))
        found[title]["lines"] = ",".join(re.findall(r'class="u-label"[^>]*>([^<]*)<', body))
        found[title]["said"] = re.search(r'aria-label="([^"]*)"', body)[1]
    return found


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_what_is_drawn(made: MadeRun, tmp_path: Path) -> None:
    """A restart, a dot each for the skipped update and the outlier; the choices change scales, lines and values."""
    out = tmp_path / "page.html"
    assert main(["report", str(made.path), "-o", str(out)]) == 0
    plain = drawn(dom(f"file://{out}#reference="))
    said = "Loss against step. training: from 6 to 3. validation: from 5.5 to 5.5."
    assert plain["Loss"] == {
        "marks": "1 2", "scales": "1 1", "last": "3,5.5", "lines": "training,validation", "said": said
    }  # fmt: skip
    chosen = drawn(dom(f"file://{out}#logx=1&logy=1&smooth=0.5&reference=124M"))
    loss = chosen["Loss"]
    assert (loss["scales"], loss["marks"], loss["lines"]) == ("3 3", "1 2", "training,validation")
    # nothing at step 4; the raw line behind has no name
    want = (3 / 2 + 4 / 4 + 5 / 8 + 6 / 16) / (15 / 16)
    assert [float(x) for x in loss["last"].split(",")] == pytest.approx([want, 5.5])
    assert chosen["Learning rate"]["scales"] == "3 1"  # not on the loss's scale, nor smoothed


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_gpt2s_loss_stands_beside_gpt2s_vocabulary_only(made: MadeRun, tmp_path: Path) -> None:
    out, found = tmp_path / "page.html", {}
    for tokenizer in ("gpt2", "gpt2-1024"):
        keys = {"run.steps": 10, "data.tokenizer": tokenizer, "optim.lr": 0.25}
        (made.path / "config.toml").write_text(Config().override(keys).to_toml())
        assert main(["report", str(made.path), "-o", str(out)]) == 0
        page = dom(f"file://{out}#reference=124M")
        found[tokenizer] = drawn(page)["Loss"]["lines"]
    assert found == {"gpt2": "training,validation,OpenAI's GPT-2 124M", "gpt2-1024": "training,validation"}
    # one run's page: title, state, headline, and the settings that are not the defaults'
    assert '<h1 id="title">made</h1>' in page
    assert re.search(r'class="pill running"[^>]*>running<', page)
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>([^<]*)", page))
    assert facts == {"step": "5", "validation loss": "5.500", "bits per byte": "2", "training loss": "3",
                     "HellaSwag": "0.25", "tokens": "5,000", "time": "12 min"}  # fmt: skip
    rows = re.findall(r"<tr>(.*?)</tr>", re.search(r'id="config">(.*?)</table>', page)[1])
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows[1:]]
    default = Config().optim.lr
    assert cells == [["data.tokenizer", "gpt2-1024", ""], ["optim.lr", "0.25", f"{default:g}"]]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_one_point_has_axes_around_it(tmp_path: Path) -> None:
    """The first step of a run: ticks near its loss, whole steps, nothing that runs to 100."""
    run = MadeRun(tmp_path / "young")
    run.step(1, 1.0, 10.95)
    out = tmp_path / "page.html"
    assert main(["report", str(run.path), "-o", str(out)]) == 0
    text = out.read_text()
    script = re.findall(r"<script>(.*?)</script>", text, re.S)[1]
    ask = "const s = charts[0].scales; document.body.dataset.ends = [s.x.min, s.x.max, s.y.min, s.y.max];"
    out.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace(script, f"{script}setTimeout(() => {{{ask}}})"))
    ends = [float(x) for x in re.search(r'data-ends="([^"]*)"', dom(f"file://{out}"))[1].split(",")]
    assert ends == pytest.approx([0, 2, 10.95 * 0.8, 10.95 * 1.2])


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_several_runs_in_one_watch(made: MadeRun, tmp_path: Path) -> None:
    other = MadeRun(tmp_path / "other")
    other.step(1, 1.0, 8.0)
    other.step(2, 2.0, 7.0)
    for watch in serving(Watch([str(made.path), str(other.path)])):
        page = dom(watch.url + "#reference=")
    assert "<title>made, other · daybreak</title>" in page
    loss = drawn(page)["Loss"]
    want = ("made training,made validation,other training", "3,5.5,7", "1 2")
    assert (loss["lines"], loss["last"], loss["marks"]) == want


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_million_steps_in_a_browser(tmp_path: Path, full: bool, figures: dict[str, object]) -> None:
    """The page of a million steps is drawn, its last value and an extreme on it (make test-recovery)."""
    if not full:
        pytest.skip("writing, reading and drawing a million steps: with --full")
    run = MadeRun(tmp_path / "long")
    with open(run.path / "metrics.jsonl", "a") as file:
        for i in range(1, 1_000_001):
            file.write(f'{{"v":1,"kind":"step","step":{i},"tokens":{i}000,"t":{i}.0,"loss":{2 + i % 7}.5,"norm":0.5,'
                       '"lr":0.001,"ms":2.0,"tok_s":500.0,"mem_mib":10,"skipped":false,"epoch":0}\n')  # fmt: skip
    out = tmp_path / "long.html"
    assert main(["report", str(run.path), "-o", str(out)]) == 0
    began = time.perf_counter()
    loss = drawn(dom(f"file://{out}#reference=&smooth=0"))["Loss"]
    figures["page of a million steps: seconds to draw it"] = round(time.perf_counter() - began, 1)
    assert (loss["lines"], float(loss["last"])) == ("training", 2 + 1_000_000 % 7 + 0.5)


# --------------------------------------------------------------------------------------------------------- the server


@pytest.fixture
def server(made: MadeRun) -> Iterator[Watch]:
    yield from serving(Watch([str(made.path)]))


def serving(watch: Watch) -> Iterator[Watch]:
    thread = threading.Thread(target=watch.serve_forever, args=(0.02,))
    thread.start()
    yield watch
    watch.shutdown()
    watch.server_close()
    thread.join()


def get(watch: Watch, path: str, host: str | None = None, method: str = "GET") -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", watch.server_port, timeout=PATIENCE)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{watch.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_what_the_server_answers(server: Watch, made: MadeRun) -> None:
    status, page, headers = get(server, "/")
    assert status == 200
    assert '<h1 id="title">daybreak</h1>' in page  # the script puts the run's name there
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers
    status, body, headers = get(server, "/data")
    data = json.loads(body)
    assert data["live"] is True
    assert headers["Content-Security-Policy"] == "default-src 'none'"
    assert get(server, f"/data?v={data['version']}")[:2] == (204, "")
    (made.path / "exit.json").write_text('{"code": 0, "reason": "done"}')  # no new line, but news
    data = json.loads(get(server, f"/data?v={data['version']}")[1])
    assert data["runs"][0]["state"] == "finished"
    assert get(server, f"/data?v={data['version']}")[:2] == (204, "")
    made.step(6, 5000.0, 2.0)
    status, body, _ = get(server, f"/data?v={data['version']}")
    assert (status, json.loads(body)["runs"][0]["train"]["loss"][-1]) == (200, 2.0)
    for path in ("/metrics.jsonl", "/../config.toml", "/data/x", "/%2e%2e/exit.json"):
        assert get(server, path)[0] == 404
    assert get(server, "/", method="POST")[0] == 501


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}"]
)
def test_another_host_s_name_gets_nothing(server: Watch, host: str) -> None:
    status, body, _ = get(server, "/data", host.format(port=server.server_port))
    assert (status, body) == (403, "this is not the host that you asked for\n")
    for own in (f"localhost:{server.server_port}", "127.0.0.1", "[::1]:9000"):  # another port: a tunnel's
        assert get(server, "/data", own)[0] == 200


def test_beyond_loopback_only_with_a_key(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("", "short"):
        monkeypatch.setenv("DAYBREAK_KEY", key)
        with pytest.raises(daybreak.Error, match=r"--host 0\.0\.0\.0 lets others in: set DAYBREAK_KEY") as error:
            Watch([str(made.path)], "0.0.0.0")
        assert error.value.exit_code == 2
    monkeypatch.setenv("DAYBREAK_KEY", "k" * 32)
    for watch in serving(Watch([str(made.path)], "0.0.0.0")):
        assert get(watch, "/data")[0] == get(watch, "/?key=wrong")[0] == 401
        assert get(watch, "/data?key=" + "k" * 32)[0] == 200
        assert get(watch, "/data?key=" + "k" * 32, "gpu-box.example:80")[0] == 200  # any name, with the key
        assert get(watch, "/data", "gpu-box.example:80")[0] == 401
        assert f"//{socket.gethostname()}:" in watch.url
        assert watch.url.endswith("/?key=" + "k" * 32)


def test_a_key_and_further_names_on_this_machine(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAYBREAK_API_KEY", raising=False)
    for key in ("", "a+b&c=d/e?f#g%2Bh"):
        monkeypatch.setenv("DAYBREAK_KEY", key)
        for watch in serving(Watch([str(made.path)], "::1", 0, ["Gpu-Box.example"])):
            assert watch.url.startswith(f"http://[::1]:{watch.server_port}/")
            with urllib.request.urlopen(watch.url) as answer:
                assert answer.status == 200
            assert key or urllib.request.urlopen(
                urllib.request.Request(watch.url, headers={"Host": "gpu-box.example"})
            ).status == 200  # fmt: skip
    monkeypatch.setenv("DAYBREAK_KEY", "short")
    with pytest.raises(daybreak.Error, match="DAYBREAK_KEY is too short: set DAYBREAK_KEY to a secret of 16 or more"):
        Watch([str(made.path)])


def test_idle_and_rude_clients_of_watch(
    server: Watch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Idle connections end, so that others get in; a reset while sending costs no line; no answer waits in a buffer."""
    monkeypatch.setattr("daybreak.report.watch.MOST_OPEN", 8)
    place = ("127.0.0.1", server.server_port)
    idle = [socket.create_connection(place, timeout=PATIENCE) for _ in range(12)]
    assert get(server, "/data")[0] == 200
    assert idle[0].recv(1) == b""  # the oldest ones had to go
    idle[-1].sendall(b"GET /data HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert idle[-1].recv(12) == b"HTTP/1.0 200"
    assert len(server.open) <= 8
    assert {s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for s in [*server.open]} == {1}
    rude = idle[-2]
    rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing sends a reset
    rude.sendall(b"GET /data HT")
    rude.close()
    monkeypatch.setattr("daybreak.report.watch.PATIENCE", 0)
    assert idle[-3].recv(1) == b""  # time is up
    for sock in idle:
        sock.close()
    monkeypatch.undo()
    assert get(server, "/[")[0] == get(server, "//[")[0] == 404
    assert capfd.readouterr().err == ""


def test_a_port_in_use_and_no_run(
    server: Watch, made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(made.path), "--port", str(server.server_port)]) == 2
    said = f"cannot listen on 127.0.0.1:{server.server_port} (Address already in use); try another --port."
    assert said in capsys.readouterr().err
    for verb in ("watch", "report"):
        assert main([verb, str(tmp_path / "none")]) == 2
        assert "none is not a run; give a folder that daybreak train made" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_watching_in_a_browser(server: Watch, made: MadeRun) -> None:
    """The page that was served polls: a step written after it was made is in it."""
    first = get(server, "/")[1]
    made.step(6, 5000.0, 2.0)
    assert '"version"' in first
    page = dom(server.url)
    assert re.search(r'<p id="made"[^>]*>Live\. daybreak ', page)
    assert "<title>made · daybreak</title>" in page
    assert "<dt>step</dt><dd>6<" in page


def test_what_is_rendered_changes_with_nothing_but_the_data(made: MadeRun) -> None:
    run = Follower(made.path)
    run.update()
    assert render(page_data([run]))[1] == render(page_data([run], live=True))[1]
