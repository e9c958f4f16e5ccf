"""docs/first-run.ipynb runs from top to bottom in a real kernel (make test-notebook installs what that needs)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from patience import PATIENCE

nbformat = pytest.importorskip("nbformat", reason="make test-notebook installs nbclient, ipykernel and matplotlib")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]


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
