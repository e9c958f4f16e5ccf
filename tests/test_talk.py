"""`daybreak chat`: a real conversation in a real terminal, and through a pipe, with a model that knows some answers."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import HEADERS
from commands import commands
from interop_runs import ROOT, inside, write_run
from patience import PATIENCE, until
from talker import KNOWN, T, make_talker

from daybreak.cli.chat import _answer, _Interrupts, _lines
from daybreak.data.chat import Template
from daybreak.errors import ConfigError
from daybreak.generate import Conversation, Sampling
from daybreak.interop import load_model

torch.set_num_threads(1)
MAIN = "import sys; from daybreak.cli.main import main; sys.exit(main(sys.argv[1:]))"
Piped = Callable[..., "subprocess.CompletedProcess[str]"]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("talk")
    make_talker(home)
    return home


@pytest.fixture
def talk(home: Path) -> Conversation:
    engine, tokenizer, template = load_model(home / "runs/talk")
    assert template is not None
    return Conversation(engine, tokenizer, template)


@pytest.fixture(scope="module")
def piped(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Piped]:
    """The answer of `daybreak chat runs/talk ARGS` to a text that comes through a pipe."""
    with commands(tmp_path_factory.mktemp("commands")) as functions:

        def chat(said: str, *argv: str) -> subprocess.CompletedProcess[str]:
            line = ["bash", "-c", f'{functions}daybreak chat runs/talk "$@"', "chat", *argv]
            return subprocess.run(line, cwd=home, input=said, text=True, capture_output=True, timeout=PATIENCE)

        yield chat


def test_a_line_is_a_question(piped: Piped) -> None:
    """Answers come alone and in order. Each ends at its turn's end, a token that no file of the model lists."""
    lines = "\n/reset\n\n".join(KNOWN)
    done = piped(lines, "--temperature", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"{answer}\n" for answer in KNOWN.values())


def test_the_history_is_read_and_reset(talk: Conversation) -> None:
    """The prompt is the template's text of all turns, under the instruction."""
    asked: list[list[int]] = []
    prefill = talk.engine.prefill
    talk.engine.prefill = lambda row, ids: asked.append(list(ids[0])) or prefill(row, ids)  # type: ignore[method-assign,func-returns-value]
    first, second = list(KNOWN)[:2]
    assert "".join(talk.ask(first, GREEDY)) == KNOWN[first]
    talk.system = "Be brief."
    list(talk.ask(second, Sampling(3, 0.0)))
    whole = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": first},
             {"role": "assistant", "content": KNOWN[first]}, {"role": "user", "content": second}]  # fmt: skip
    assert talk.tokenizer.decode(asked[1]) == talk.template.prompt(whole)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in talk.template.prompt(whole)
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2


def test_the_oldest_turns_are_forgotten_whole(talk: Conversation, piped: Piped) -> None:
    """An answer has `tokens`, or half of T, whichever is less."""
    read: list[int] = []
    prefill = talk.engine.prefill
    talk.engine.prefill = lambda row, ids: read.append(len(ids[0])) or prefill(row, ids)  # type: ignore[method-assign,func-returns-value]
    for _ in range(4):
        list(talk.ask("Do you sleep?", Sampling(30, 0.0)))
    assert talk.forgotten
    assert max(read) <= T - 30
    assert len(talk.turns) % 2 == 0
    kept = talk.turns[:-2]
    longer = talk.template.prompt_ids([*kept, *kept[:2], *talk.turns[-2:-1]], talk.tokenizer)
    assert len(longer) > T - 30  # no more was forgotten than had to be
    with pytest.raises(ConfigError, match=rf"the question has \d+ tokens in its template, .*{T}; ask a shorter one"):
        list(talk.ask("word " * T, GREEDY))
    assert talk.turns[-1]["role"] == "assistant"  # the question is no part of it
    done = piped("Do you sleep?\n" * 4, "--tokens", "30")
    assert f"(forgot the 1 oldest turn: the model reads {T} tokens)" in done.stderr


def test_an_answer_that_is_cut_stays_in_the_history(talk: Conversation) -> None:
    question = "Name a colour."
    pieces = talk.ask(question, GREEDY)
    said = next(pieces) + next(pieces)
    pieces.close()
    assert [turn["content"] for turn in talk.turns] == [question, said]
    assert KNOWN[question].startswith(said)
    assert said != KNOWN[question]


def test_the_template_may_refuse(home: Path, piped: Piped) -> None:
    done = piped("/system Hm\nHi", "--tokens", "3")
    assert done.returncode == 0
    engine, tokenizer, _ = load_model(home / "runs/talk")
    template = Template("{{ raise_exception('no ' + messages[0].role) }}", {}, "x.jinja")
    with pytest.raises(ConfigError, match=r"refused by the chat template x.jinja \(no user\); change it"):
        list(Conversation(engine, tokenizer, template).ask("Hi"))


def test_the_end_of_a_turn_is_the_templates(home: Path) -> None:
    _, tokenizer, template = load_model(home / "runs/talk")
    assert template is not None
    name = lambda t: [t.token_bytes(i).decode() for i in t.ends]  # noqa: E731
    assert name(tokenizer) == ["<|endoftext|>"]
    assert name(template.ending(tokenizer)) == ["<|endoftext|>", "<|im_end|>"]
    headers = Template(HEADERS, {"bos_token": "<s>"}, "x")
    assert name(headers.ending(tokenizer)) == ["<|endoftext|>", "<|eot|>"]
    assert Template("{{ messages[-1].content }}!", {}, "x").ending(tokenizer) is tokenizer


def test_a_base_model_says_that_it_does_not_chat(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    done = inside(tmp_path, "chat", "run", code=2)
    assert done.stderr.startswith("daybreak: run does not chat, since it has no chat template: daybreak sample run ")
    assert "docs/finetune.md" in done.stderr
    assert done.stderr.count("\n") == 1


@contextmanager
def terminal(folder: Path, *argv: str) -> Iterator[tuple[Any, Any, Any]]:
    """The program in a pseudo-terminal: type a text, wait for one on the screen ("": for anything), its process.

    A text is typed when the program sleeps, as it does where it reads. Python shows the prompt a moment before, and a
    Ctrl-C of that moment waits for the next key.
    """
    process, screen = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        os.execv(sys.executable, [sys.executable, "-c", MAIN, "chat", *argv])
    seen = bytearray()

    def asleep() -> bool:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] == "S"

    def type_(text: str) -> None:
        until(asleep)
        os.write(screen, text.encode())

    def wait(text: str) -> None:
        def there() -> bool:
            if (not seen or text.encode() not in seen) and select.select([screen], [], [], 1)[0]:
                seen.extend(os.read(screen, 4096))
            return bool(seen) and text.encode() in seen

        until(there, why=lambda: seen.decode(errors="replace"))
        del seen[: seen.index(text.encode()) + len(text.encode())]

    try:
        yield type_, wait, process
    finally:
        os.close(screen)


def test_in_a_terminal(home: Path) -> None:
    """Ctrl-C stops the answer and not the program; Ctrl-D ends it with code 0."""
    with terminal(home, "runs/talk", "--temperature", "0") as (type_, wait, process):
        wait("Ctrl-D ends.")
        wait("> ")
        type_("Who are you?\n")
        wait("A small model.\r\n")
        wait("> ")
        type_("/nothing\n")
        wait("(/nothing is unknown: /reset starts over,")
        wait("> ")
        type_("\x03")
        wait("(Ctrl-D ends)")
        wait("> ")
        type_("Do you sleep?\n")
        wait("Never.\r\n")
        wait("> ")
        type_("\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_ctrl_c_stops_an_answer(home: Path) -> None:
    """A warm model that hardly ends: its answer is stopped, and the next question is answered."""
    with terminal(home, "model", "--temperature", "9", "--tokens", "90") as (type_, wait, process):
        wait("> ")
        for _ in range(2):
            type_("Go on.\n")
            wait("Go on.\r\n")
            wait("")  # the answer has begun
            os.kill(process, signal.SIGINT)
            wait("(stopped)")
            wait("> ")
        type_("\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_ctrl_c_between_enter_and_the_answer(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stops that answer after its first piece, as later ones are stopped, and the next question is answered."""
    typed = "Say it twice.\nWho are you?\n/system\nDo you sleep?\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    before = signal.getsignal(signal.SIGINT)
    with _Interrupts(True) as interrupts:
        lines = _lines(True, interrupts)

        def answer(presses: int = 0) -> str:
            line = next(lines)
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            capsys.readouterr()
            _answer(talk, line, GREEDY, True, interrupts)
            return capsys.readouterr().out

        first = answer(1)
        assert first.endswith(" (stopped)\n\n")
        assert KNOWN["Say it twice."].startswith(first.removesuffix(" (stopped)\n\n"))
        assert len(first) < len(KNOWN["Say it twice."])
        talk.turns.clear()
        assert answer() == "A small model.\n\n"
        signal.raise_signal(signal.SIGINT)  # the answer has just ended: nothing is left to stop
        assert next(lines) == "/system"
        with pytest.raises(KeyboardInterrupt):
            answer(2)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_pipe(home: Path, number: signal.Signals) -> None:
    env, pipe = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    command = [sys.executable, "-c", MAIN, "chat", "runs/talk"]
    with subprocess.Popen(command, cwd=home, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("Do you sleep?\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(number)
        assert process.wait(PATIENCE) == (-signal.SIGTERM if number == signal.SIGTERM else 130)
