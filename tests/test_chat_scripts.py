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
    """The words of every command of daybreak, without torchrun before it."""
    text = (ROOT / "scripts" / script).read_text().replace("\\\n", " ")
    lines = [line.partition("|| ")[2] or line for line in text.splitlines() if not line.startswith(("#", "echo"))]
    found = [re.search(r"(?:^|-m )daybreak +(.*)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_exist(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "scripts" / script], check=True)
    assert os.access(ROOT / "scripts" / script, os.X_OK)
    verbs = [words[0] for words in commands(script)]
    assert [verb for verb in verbs if verb != "chat"] == ["prepare", "train", "export", "prepare", "finetune"]
    for verb, *rest in commands(script):
        cli.commands[verb].make_context(verb, rest)


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
