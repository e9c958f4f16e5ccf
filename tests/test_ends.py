"""How programs end when the system refuses: a name, a place, a console. One sentence, never "a bug in daybreak"."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interop_runs import write_run
from recovery import make_shards

from daybreak import llmc
from daybreak.cli.ends import ending
from daybreak.cli.main import main
from daybreak.errors import DataError, explained, os_error
from daybreak.interop import huggingface
from daybreak.interop.source import Export
from daybreak.state.run import Run

LONG = "n" * 300
NOWHERE = "/proc/daybreak"  # a place where nobody may write, root neither


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a run, a model of transformers and shards."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "book.txt").write_text("a b c\n" * 2000)
    write_run(folder / "run", "bytes", max_T=16)
    huggingface.export(Export(Run(folder / "run").checkpoint()), folder / "hf", "fp32")
    make_shards(folder / "data")
    return folder


NAMES = [
    "prepare {}", "prepare book.txt --name {}", "plan {}", "train {}", "train d12 --name {}", "eval {} --tasks piqa",
    "eval run --hellaswag {}", "sample {}", "serve {}", "import {}", "import hf --name {}", "export {} --to hf out",
    "export run --to hf {}", "export run --to gguf {}", "export run --to llmc {}", "report {}", "report run -o {}",
    "watch {}", "doctor {}", "bench {}", "llmc -i {} -j {} -e d6", "llmc -e {}.bin",
    "llmc -o {} -y 1 -e d6 -i data/*train* -j data/*val* -x 1 -b 1 -t 16",
]  # fmt: skip


@pytest.mark.parametrize("place", [LONG, f"{NOWHERE}/x"], ids=["300 characters", "unwritable"])
@pytest.mark.parametrize("line", NAMES)
def test_a_name_that_cannot_be_is_one_sentence(world, monkeypatch, capfd, line, place):
    monkeypatch.chdir(world)
    if line in ("plan {}", "bench {}", "prepare book.txt --name {}", "train d12 --name {}") and place != LONG:
        pytest.skip("a name here, no path")
    verb, *rest = line.format(place, place).split()
    code = llmc.main(rest) if verb == "llmc" else main([verb, *rest])
    _, err = capfd.readouterr()
    assert code in (1, 2, 4, 5), err
    last = err.strip().splitlines()[-1]
    assert last.startswith("daybreak"), err
    assert place in last
    assert "Traceback" not in err
    assert "bug in daybreak" not in err
    assert not [p for p in world.rglob("*") if p.name.startswith(".out") or p.name.startswith(".nnn")]


def test_the_sentence_names_path_and_reason_and_the_code_says_what_helps():
    said = os_error(PermissionError(errno.EACCES, "Permission denied", "/a/b"))
    assert str(said) == "/a/b cannot be used (Permission denied); fix its name or permissions, or give another one."
    assert said.exit_code == 2
    said = os_error(OSError(errno.EROFS, "Read-only file system", "/a/b"))
    assert str(said) == "/a/b cannot be used (Read-only file system); mount its disk for writing, or use another disk."
    assert said.exit_code == 2
    said = os_error(OSError(errno.ENOSPC, "No space left on device", b"/a", None, "/b"))
    assert str(said).startswith("/a -> /b failed (No space left on device); free space or repair the disk, then run")
    assert said.exit_code == 1
    assert str(os_error(OSError("only words"))).startswith("a file or the console failed (only words); ")


def test_a_sentence_of_its_own_names_the_path_once(tmp_path):
    path = tmp_path / "none"
    with pytest.raises(DataError) as said, explained(DataError, "a copy failed", "try again"):
        path.read_bytes()
    assert str(said.value) == f"a copy failed (No such file or directory: {path}); try again."
    with pytest.raises(DataError) as said, explained(DataError, f"cannot read {path}"):
        path.read_bytes()
    assert str(said.value) == f"cannot read {path} (No such file or directory)."


@pytest.mark.parametrize("module", ["daybreak", "daybreak.llmc"])
def test_a_full_output_is_one_sentence(module):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", module, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"{module}: standard output failed (No space left on device); free space or repair the disk, then run "
        "the same command again.\n"
    )


@pytest.mark.parametrize("module", ["daybreak", "daybreak.llmc"])
def test_a_reader_that_leaves_is_no_error_message(module):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_console_that_lacks_characters_shows_their_numbers(monkeypatch):
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding="latin-1", write_through=True))
    assert ending("x", lambda: print("é 漢")) == 0
    assert main(["train", "漢字"]) == 2
    said = raw.getvalue().decode("latin-1")
    assert said.startswith("é \\u6f22\ndaybreak: unknown target '\\u6f22\\u5b57'; none has this name.")


def test_a_latin_1_terminal():
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "daybreak", "train", "tiny", "--eval.prompt", "漢é", "--print-config"]
    done = subprocess.run(command, capture_output=True, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert 'prompt = "\\u6f22é"'.encode("latin-1") in done.stdout


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import typing_of_torch", "No module named 'typing_of_torch'"),
        ("from os import nothing_of_torch", "cannot import name 'nothing_of_torch' from 'os'"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open shared"),
        ("import ctypes\nctypes.CDLL('libtorch_x.so')", "libtorch_x.so: cannot open shared object file"),
    ],
)
def test_a_broken_torch_is_not_our_bug(tmp_path, body, reason):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(body)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    done = subprocess.run([sys.executable, "-m", "daybreak", "doctor"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"daybreak: torch's installation is incomplete ({reason}")
    assert done.stderr.endswith("); install it again with pip install -e .\n")


def test_sample_shows_the_prompt_on_a_terminal_only(world):
    command = [sys.executable, "-m", "daybreak", "sample", "run", "--prompt", "Once upon", "--tokens", "3"]
    piped = subprocess.run(command, cwd=world, capture_output=True, text=True, check=True).stdout
    terminal, end = os.openpty()
    subprocess.run(command, cwd=world, stdout=end, stderr=subprocess.DEVNULL, check=True)
    os.close(end)
    shown = os.read(terminal, 1000).decode(errors="replace")
    os.close(terminal)
    assert not piped.startswith("Once")
    assert shown.startswith("Once upon")
