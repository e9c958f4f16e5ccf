"""README's examples run as they stand: fences labelled `ci`, in order, in one empty folder. Its tree is real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def fences(label: str) -> list[tuple[str, str]]:
    """(language, text) of the code fences with this label."""
    return re.findall(rf"^```(\w+) {label}\n(.*?)^```$", README, re.M | re.S)


def test_every_runnable_fence_is_labelled() -> None:
    opened = re.findall(r"^```(\S+.*)$", README, re.M)
    assert opened
    assert {re.split(r" ", x)[-1] for x in opened} <= {"ci", "gpu", "network", "text"}


def test_the_examples_run(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")))
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "daybreak").write_text(f'#!/bin/sh\nexec {sys.executable} -m daybreak "$@"\n')
    (bin_ / "daybreak").chmod(0o755)
    env = os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = 0
    for language, text in fences("ci"):
        command = {"bash": ["bash", "-euc", text], "python": [sys.executable, "-c", text]}[language]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ran += 1
    assert ran >= 2
    assert (
        "runs/mine: step 150,"
        in subprocess.run(
            ["daybreak", "train", "runs/mine"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        ).stdout
    )


def test_the_file_tree_names_what_exists() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    for line in tree.splitlines()[2:]:
        name = line.split()[0]
        where = ROOT / "daybreak" / name if line.startswith("  ") else ROOT / name
        assert where.exists(), name
    listed = set(re.findall(r"^  (\w+)", tree, re.M))
    real = {p.stem for p in (ROOT / "daybreak").iterdir() if not p.name.startswith(("_", ".")) and p.suffix != ".typed"}
    assert listed == real
