"""Examples of README and of the pages run as they stand: fences labelled `ci`, in order, in one empty folder. The file
tree, the exit codes and the places that are written to are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import commands

from daybreak.errors import Error

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
(FILES,) = (ROOT / "docs").rglob("files.md")


def fences(label: str, text: str = README) -> list[tuple[str, str]]:
    """(language, text) of the code fences with this label."""
    return re.findall(rf"^```(\w+) {label}\n(.*?)^```$", text, re.M | re.S)


TESTED = [  # each in a test of its own
    *(ROOT / "docs/operations").glob("*.md"), *(ROOT / "docs/learn").glob("*.md"), ROOT / "docs/interop.md"
]  # fmt: skip
PAGES = [p for p in (ROOT / "docs").rglob("*.md") if p not in TESTED and fences("ci", p.read_text())]


def test_every_runnable_fence_is_labelled() -> None:
    opened = re.findall(r"^```(\S+.*)$", README, re.M)
    assert opened
    assert {re.split(r" ", x)[-1] for x in opened} <= {"ci", "gpu", "network", "text"}


def test_the_examples_run_and_write_where_it_is_said(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path, home = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("home")
    (tmp_path / "my.txt").write_text("".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")))
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "daybreak").write_text(f'#!/bin/sh\nexec {sys.executable} -m daybreak "$@"\n')
    (bin_ / "daybreak").chmod(0o755)
    env = os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    ran = 0
    for language, text in fences("ci"):
        command = {"bash": ["bash", "-euc", text], "python": [sys.executable, "-c", text]}[language]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ran += 1
    assert ran >= 1
    again = subprocess.run(["daybreak", "train", "runs/mine"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr.startswith("nothing to do: runs/mine has made its 150 steps;")
    assert {path.name for path in tmp_path.iterdir()} == {"my.txt", "bin", "data", "runs"}
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with commands(tmp_path_factory.mktemp("commands")) as functions:
        yield functions


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda p: p.stem)
def test_a_page_s_examples_run(page: Path, tmp_path: Path, shell: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for language, text in fences("ci", page.read_text()):
        line = f"python -c {shlex.quote(text)}" if language == "python" else text
        script = f'{shell}python3() {{ {sys.executable} "$@"; }}\n{line}'
        done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_run_is_trained_by_one_page_only() -> None:
    """A reader who comes from another page would else be told that the name is taken."""
    pages = [README, *(page.read_text() for page in (ROOT / "docs").rglob("*.md"))]
    trained = [
        set(re.findall(r"daybreak train (?!runs/)[^\n]*--name ([\w.-]+)", text.replace("\\\n", " ")))
        for text in ("".join(fence for _, fence in fences("ci", page)) for page in pages)
    ]
    names = [name for page in trained for name in page]
    assert {"mine", "first", "book"} <= set(names)
    assert sorted(names) == sorted(set(names))


def test_every_place_that_is_written_to_is_named() -> None:
    said = FILES.read_text().rpartition("## ")[2]
    code = "".join(path.read_text() for path in (ROOT / "daybreak").rglob("*.py"))
    ours = re.findall(r'environ.get\("(\w*CACHE\w*)"\)', code)
    for variable in ("HF_HOME", "TRITON_CACHE_DIR", "WANDB_CACHE_DIR", *ours):
        assert f"`{variable}`" in said
    for option in ("data.dir", "--data-dir", "run.dir", "-o", "--tune"):
        assert option in said


def test_the_exit_codes_are_the_errors() -> None:
    said = re.findall(r"^\| (\d+) \|", FILES.read_text(), re.M)
    assert list(map(int, said)) == sorted({0, 1, *(kind.exit_code for kind in Error.__subclasses__())})


def test_the_file_tree_names_what_exists() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("```")[1]
    for line in tree.splitlines()[2:]:
        name = line.split()[0]
        where = ROOT / "daybreak" / name if line.startswith("  ") else ROOT / name
        assert where.exists(), name
    listed = set(re.findall(r"^  (\w+)", tree, re.M))
    real = {p.stem for p in (ROOT / "daybreak").iterdir() if not p.name.startswith(("_", ".")) and p.suffix != ".typed"}
    assert listed == real
