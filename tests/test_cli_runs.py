"""The verbs on one small run, from `prepare` to `sample`: what they print, and where."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import ranks
from patience import PATIENCE

from daybreak.cli.main import main
from daybreak.config import resolve

SMALL = ["--model.L", "1", "--model.C", "16", "--model.NH", "2", "--model.max_T", "16", "--model.V", "257",
         "--data", "book", "--data.tokenizer", "bytes", "--batch.B", "2", "--eval.tokens", "64",
         "--eval.sample_tokens", "8", "--run.device", "cpu", "--schedule.final_frac", "0.1"]  # fmt: skip


class Said(NamedTuple):
    stdout: str
    stderr: str


def run_process(folder: Path, *argv: str) -> Said:
    """The output of `daybreak ARGV`, in a process that is forked."""
    out, err = folder / "out.txt", folder / "err.txt"
    code = ranks.Forked(ranks.daybreak, list(argv), folder, out, os.environ, err).wait(PATIENCE)
    assert code == 0, err.read_text()
    return Said(out.read_text(), err.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dataset `book` and a run `small` of four steps, made by processes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "book.txt").write_text("".join(f"{i} men went to mow a meadow.\n" for i in range(400)))
    run_process(folder, "prepare", "book.txt", "--name", "book", "--tokenizer", "bytes")
    run_process(folder, "train", "d12", "--name", "small", "--steps", "4", *SMALL)
    return folder


def test_train_resume_fork_and_sample(trained: Path) -> None:
    first = json.loads((trained / "runs/small/metrics.jsonl").read_text().splitlines()[-1])
    assert first["step"] == 4
    done = run_process(trained, "train", "runs/small", "--steps", "6", "--json")
    result = json.loads(done.stdout)
    assert list(result) == ["run", "step", "tokens", "loss", "val_loss", "val_bpb", "unigram_entropy"]
    assert 0 < result["unigram_entropy"] < 6
    assert (result["run"], result["step"], result["tokens"]) == ("runs/small", 6, 6 * 2 * 16)
    assert 0 < result["val_loss"] < 6
    assert "step    5/6 | loss " in done.stderr
    assert "\x1b" not in done.stderr
    saved = resolve(str(trained / "runs/small"))[0]
    assert saved.optim.horizon == 4  # --steps on resume leaves the schedule alone

    quiet = run_process(
        trained, "train", "runs/small", "--fork", "the other", "--optim.lr", "1e-5", "--steps", "8", "--quiet"
    )
    assert re.fullmatch(r"the schedule ended at step 4: .* --optim\.horizon 8\.\n", quiet.stderr)  # warnings stay
    assert quiet.stdout.splitlines()[-4:] == [
        "runs/the other: step 8, 256 tokens. Next:",
        "  daybreak sample 'runs/the other'  more text",
        "  daybreak report 'runs/the other'  its curves, as a page",
        "  daybreak serve 'runs/the other'   a prompt in a browser",
    ]
    assert resolve(str(trained / "runs/the other"))[0].optim.lr == 1e-5

    one = run_process(trained, "sample", "runs/small", "--tokens", "12", "--prompt", "men", "-n", "2", "--seed", "7")
    assert one.stdout.startswith("---\n")
    assert one.stdout.count("---\n") == 2
    two = run_process(trained, "sample", "runs/small", "--tokens", "12", "--prompt", "men", "--seed", "8")
    assert one.stdout.endswith("---\n" + two.stdout)  # sample i has seed + i


def test_the_name_of_a_fork(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    for flags, said in (
        (["small"], "run.name = 'small' is taken: runs/small exists; continue it with `daybreak train runs/small` or "
                    "choose another --fork."),
        (["one", "--name", "two"], "--fork one and --name two name the new run differently; leave out --name."),
    ):  # fmt: skip
        assert main(["train", "runs/small", "--steps", "9", "--fork", *flags]) == 2
        assert capsys.readouterr().err == f"daybreak: {said}\n"


def test_how_to_sample_is_said_on_the_command_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*flags: str) -> str:
        assert main(["sample", str(trained / "runs/small"), "--tokens", "40", "--prompt", "men", *flags]) == 0
        return capsys.readouterr().out

    plain, greedy = sample(), sample("--temperature", "0")
    assert len({plain, greedy, sample("--temperature", "0.5")}) == 3
    assert sample("--top-k", "1") == sample("--top-p", "1e-6") == sample("--min-p", "1") == greedy
    assert len({greedy, *(sample("--temperature", "0", f"--{kind}-penalty", "1.9")
                          for kind in ("repetition", "frequency", "presence"))}) >= 3  # fmt: skip
    assert len({plain, sample("--top-k", "3"), sample("--top-p", "0.5")}) == 3
    stop = plain.rstrip("\n")[10:12]
    assert sample("--stop", stop, "--stop", "never there") == plain[: plain.index(stop)] + "\n"


def test_sigterm_saves_and_is_exit_75(trained: Path) -> None:
    argv = [sys.executable, "-m", "daybreak", "train", "d12", "--name", "long", "--steps", "1000000", *SMALL]
    process = subprocess.Popen(
        argv, cwd=trained, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step    3/"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert err.splitlines()[-1].startswith("daybreak: stopped by SIGTERM after step ")
    assert err.endswith("saved; resume with: daybreak train runs/long\n")
    assert len(list((trained / "runs/long/checkpoints").glob("step-*"))) == 1
