"""The scripts from text to a chat: that of GPUs has commands that exist, with settings that fit; `make chat` runs the
other one whole."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from interop_runs import ROOT, inside

from daybreak.cli.main import cli

SCRIPTS = ("chat.sh", "speedrun.sh")


def commands(script: str) -> list[list[str]]:
    """The words of every command of daybreak, also of those that speedrun's `learn NAME` carries out."""
    text = (ROOT / "scripts" / script).read_text().replace("\\\n", " ")
    text = re.sub(r"\$\{[A-Z]+:-(.*?)\}", r"\1", text)  # a variable that is not set
    lines = [line.partition("|| ")[2] or line for line in text.splitlines() if not line.startswith(("#", "echo"))]
    found = [re.search(r"^(?:daybreak|learn \w+) +(.*)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_exist(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "scripts" / script], check=True)
    assert os.access(ROOT / "scripts" / script, os.X_OK)
    verbs = [words[0] for words in commands(script)]
    assert [verb for verb in verbs if verb != "chat"] == ["prepare", "train", "export", "prepare", "finetune"]
    for verb, *rest in commands(script):
        cli.commands[verb].make_context(verb, rest)


def stand_in(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def test_speedrun_goes_on_after_a_stop(tmp_path: Path) -> None:
    """With programs in place of daybreak and torchrun that note their words: each run is begun once, then resumed. The
    second torchrun fails the first time, as if the machine had been lost."""
    made = tmp_path / "bin"
    made.mkdir()
    stand_in(made / "python3", 'case "$1" in -c) echo "${GPUS:-8}";; esac')
    prepared = 's="$*"; s=${s#*--name }; mkdir -p "data/${s%% *}"'
    stand_in(made / "daybreak", f'echo "$@" >> ../said; case $1 in prepare) {prepared};; export) mkdir base-hf;; esac')
    stand_in(made / "torchrun", 'echo "$@" >> ../said; [[ "$*" == *finetune* ]] && { mkdir -p runs/chat; '
             'touch runs/chat/config.toml; exit 1; }; mkdir -p runs/base; touch runs/base/config.toml')  # fmt: skip
    env = {**os.environ, "PATH": f"{made}:/usr/bin:/bin"}
    speedrun = ["bash", ROOT / "scripts/speedrun.sh", "it"]
    assert subprocess.run(speedrun, cwd=tmp_path, env=env).returncode == 1
    first = (tmp_path / "said").read_text().splitlines()
    assert [line.split("-m daybreak ")[-1].split()[0] for line in first] == [
        "prepare", "train", "export", "prepare", "finetune",
    ]  # fmt: skip
    assert all("--nproc-per-node 8" in line for line in first if "daybreak" in line)
    assert subprocess.run(speedrun, cwd=tmp_path, env=env).returncode == 0
    again = (tmp_path / "said").read_text().splitlines()[5:]
    assert [line.split("-m daybreak ")[-1] for line in again] == [
        "train runs/base",
        "train runs/chat",
        "chat runs/chat",
    ]
    said = ["TEXT=/shards --name x", "DIALOGUES=/chats.jsonl", "PRETRAIN=--steps 9", "FINETUNE=--epochs 3", "GPUS=2"]
    subprocess.run([*speedrun[:2], "own"], cwd=tmp_path, env={**env, **dict(x.split("=") for x in said)})
    text, base, _, chats, chat = (line.split() for line in (tmp_path / "said").read_text().splitlines()[8:])
    assert text == ["prepare", "/shards", "--name", "x", "--name", "fineweb-edu"]
    assert chats[-1] == "/chats.jsonl"
    assert "hf:" not in " ".join(text + chats)
    assert (base[-2:], chat[-2:]) == (["--steps", "9"], ["--epochs", "3"])
    assert all(" --nproc-per-node 2 " in " ".join(run) for run in (base, chat))
    none = subprocess.run([*speedrun[:2], "no"], cwd=tmp_path, env={**env, "GPUS": "0"}, capture_output=True, text=True)
    assert (none.returncode, none.stderr) == (2, "torch finds no GPU here; scripts/chat.sh is for a CPU.\n")
    assert not (tmp_path / "no").exists()


def test_settings_fit(tmp_path: Path) -> None:
    """train and finetune print their whole configuration, for a small base model and few dialogues."""
    inside(ROOT, "prepare", "stdlib", "--tokenizer", "gpt2-1024", "--data-dir", str(tmp_path / "data"))
    small = ["--model.L", "1", "--model.C", "32", "--model.NH", "2", "--steps", "1", "--eval.tokens", "1024"]
    inside(tmp_path, "train", "tiny", "--name", "base", "--data", "stdlib-gpt2-1024", "--model.max_T", "128", *small)
    inside(tmp_path, "export", "runs/base", "--to", "hf", "base-hf")
    subprocess.run(["python", ROOT / "scripts/dialogues.py", "template", "base-hf"], cwd=tmp_path, check=True)
    chat = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    (tmp_path / "few.jsonl").write_text(chat * 3000)
    prepared = ["--name", "dialogues", "--tokenizer", "base-hf/tokenizer.json", "--row-tokens", "128"]
    inside(tmp_path, "prepare", "few.jsonl", *prepared)
    for script in SCRIPTS:
        train, finetune = (
            [*words, "--print-config"] for words in commands(script) if words[0] in ("train", "finetune")
        )
        assert 'name = "base"' in inside(tmp_path, *train).stdout
        said = inside(tmp_path, *finetune).stdout
        assert "packed = true" in said
        assert "T = 128" in said
        assert 'name = "dialogues"' in said
