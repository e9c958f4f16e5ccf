"""Drawings of bench/plot_curves.py: round ticks, means of neighbours, and points of our metrics and an llm.c log."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("plot_curves")


def test_ticks_and_means_by_hand(curves: ModuleType) -> None:
    assert curves.ticks(1.0, 7.0, 6) == [1, 2, 3, 4, 5, 6, 7]
    assert curves.ticks(0.0, 2.4576, 8) == [0, 0.5, 1, 1.5, 2]
    points = [(float(i), float(y)) for i, y in enumerate((9, 3, 6, 0, 3))]
    assert curves.smooth(points, 0.4) == [(0, 9), (1, 6), (2, 3), (3, 3), (4, 3)]


def test_an_llm_c_log_as_a_picture(curves: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = tmp_path / "main.log", tmp_path / "out.svg"
    log.write_text("s:0 tel:7.0000\ns:0 trl:7.0 lr:0.1 norm:1.0\ns:1 trl:5.0 lr:0.1 norm:1.0\ns:2 tel:4.0000\n")
    argv = ["plot_curves.py", str(out), f"a & b={log}", "--tokens-per-step", "500000", "--line", "5.5=half & half"]
    monkeypatch.setattr("sys.argv", argv)
    curves.main()
    svg = out.read_text()
    assert svg.startswith("<svg ")
    assert "a &amp; b: 4.000 at the end" in svg
    assert "half &amp; half" in svg
    top, bottom, left, right = curves.TOP, curves.HEIGHT - curves.BOTTOM, curves.LEFT, curves.WIDTH - curves.RIGHT
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)  # at 0 and a million tokens; the axis is 7 to 4
    assert [tuple(map(float, dot)) for dot in dots] == [(left, top), (right, bottom)]
    assert f"M{left} {(top + bottom) / 2:.1f}H{right}" in svg  # 5.5 is half way
