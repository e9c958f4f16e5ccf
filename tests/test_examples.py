"""examples/loop.py equals `daybreak train tiny`, and the page beside it changes the activation as it says."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import markov, write_shard

import daybreak
from daybreak.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
LOOP, PAGE = ROOT / "examples/loop.py", (ROOT / "docs/activation.md").read_text()
(CHECK,), DIFFS = (re.findall(rf"^```{kind} text\n(.*?)^```$", PAGE, re.M | re.S) for kind in ("python", "diff"))
REFUSED = """
from pathlib import Path
from types import SimpleNamespace

from daybreak.errors import ConfigError
from daybreak.interop.families import family_of
from daybreak.interop.llmc_files import write_checkpoint
from daybreak.kernels import choose

for export in (
    lambda: family_of(shape, "Hugging Face's format"),
    lambda: family_of(shape, "GGUF"),
    lambda: write_checkpoint(Path("out"), SimpleNamespace(model=shape)),
):
    try:
        export()
    except ConfigError as error:
        print("refused" if "cannot hold this shape" in str(error) and "act=relu2" in str(error) else error)
print(choose("cuda", torch.bfloat16)["smear_forward"])
"""


def test_the_loop_is_daybreak_train_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, weights and the sample, bit for bit: of one micro-step, then of steps of two."""
    assert len(LOOP.read_text().splitlines()) <= 80
    monkeypatch.chdir(tmp_path)
    for split, tokens in (("train", 40_000), ("val", 3_000)):
        write_shard(tmp_path / f"x_{split}_000000.bin", markov(tokens, len(split)))
    keys = {"data.train": "*train*", "data.val": "*val*", "data.tokenizer": "bytes", "run.device": "cpu"}
    keys |= {"run.steps": "3", "batch.ramp": "[[1, 2048]]", "eval.sample_tokens": "20"}
    engine, losses, text = runpy.run_path(str(LOOP))["train"](*(f"{key}={value}" for key, value in keys.items()))
    assert main(["train", "tiny", *(word for key in keys for word in (f"--{key}", keys[key]))]) == 0
    run = daybreak.load("runs/tiny")
    assert losses == [record["loss"] for record in run.metrics("step")]
    assert text == run.metrics("sample")[-1]["text"]
    weights = load_file(run.checkpoints[0] / "model.safetensors")
    assert weights.keys() == set(engine.names())
    assert all(torch.equal(weights[name], engine.param(name)) for name in weights)


def changed_copy(folder: Path, diff: str) -> None:
    """A copy of the package in `folder` with the hunks of one of the page's diffs. `@@` lines begin with a file."""
    shutil.copytree(ROOT / "daybreak", folder / "daybreak", ignore=shutil.ignore_patterns("__pycache__"))
    for name, hunk in re.findall(r"^@@ (\S+)[^\n]*\n(.*?)(?=^@@|\Z)", diff, re.M | re.S):
        path = folder / name
        old, new = ("".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in sign) for sign in ("- ", "+ "))
        text = path.read_text()
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new))


def test_the_activation_is_changed_as_the_page_says(tmp_path: Path) -> None:
    """The page's edits, made in a copy, pass the page's check of gradients; a factor left out does not."""
    changed_copy(tmp_path, DIFFS[0])
    path = tmp_path / "daybreak/kernels/matmul.py"
    text = path.read_text()
    assert not re.search(r"aten\.gelu", text)
    for changed, code in ((text, 0), (text.replace(".mul_(2)", ""), 1)):
        path.write_text(changed)
        done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "recompute 0: " in done.stderr


def test_an_activation_is_a_key_as_the_page_says(tmp_path: Path) -> None:
    """The second edits pass the same check with the key. No export takes the key for GELU, and without its file in
    kernels/cuda an operation is planned for a GPU in torch."""
    changed_copy(tmp_path, DIFFS[1])
    (tmp_path / "daybreak/kernels/cuda/smear.py").unlink()
    check = CHECK.replace("V=61)", 'V=61, act="relu2")') + REFUSED
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every gradient is right\nrefused\nrefused\nrefused\ntorch\n"
