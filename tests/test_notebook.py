"""The notebook of docs/ and those of the course run in a real kernel (make test-notebook installs what that needs)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

nbformat = pytest.importorskip("nbformat", reason="make test-notebook installs nbclient, ipykernel and matplotlib")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "docs/learn").glob("[0-9]*.md"))


def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    book = nbformat.read(ROOT / "docs/first-run.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in book.cells for out in cell.get("outputs", [])]
    text = "".join(out.get("text", "") for out in outputs)
    losses = [float(line.rpartition(" ")[2]) for line in text.splitlines() if "validation loss" in line]
    assert len(losses) == 4
    assert losses[-1] < 4.5 < losses[0]
    assert "now at step 400 in runs/notebook" in text
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert (tmp_path / "runs/notebook/exit.json").is_file()


def printed(book: Any) -> list[str]:
    """The output of each cell; a kernel may send it in pieces."""
    return ["".join(out.get("text", "no text") for out in cell.get("outputs", [])) for cell in book.cells]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_s_notebook_prints_what_its_page_shows(
    chapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made as `make notebooks` makes it. Every link leads to a file, and every cell prints what it says."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    subprocess.run([sys.executable, ROOT / "scripts/learn_notebooks.py", tmp_path], check=True)
    book = nbformat.read(tmp_path / f"{chapter}.ipynb", as_version=4)
    nbformat.validate(book)
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [x for x in links if x and not x.startswith("http") and not (tmp_path / x).exists()] == []
    assert "<!-- code" not in text
    wanted = printed(book)
    assert any(wanted)
    nbclient.NotebookClient(book, timeout=PATIENCE, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert printed(book) == wanted
