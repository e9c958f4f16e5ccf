"""The figures that bench/timeline.py reads from a trace: of the exchange's time, how much lies under computation."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def test_hidden_time_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    timeline = importlib.import_module("timeline")
    kernels = [  # name, begin and length in microseconds
        ("ncclDevKernel_AllGather_RING_LL", 1000, 500), ("_layernorm_forward_kernel", 1200, 200),
        ("quack_gemm", 2000, 1000), ("_adamw_kernel", 2900, 400), ("ncclDevKernel_ReduceScatter_Sum_bf16", 2500, 2000),
    ]  # fmt: skip
    events = [{"cat": "kernel", "name": name, "ts": begin, "dur": length} for name, begin, length in kernels]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [*events, {"cat": "cpu_op", "ts": 0, "dur": 9}]}))
    monkeypatch.setattr("sys.argv", ["timeline.py", str(tmp_path / "trace.json"), str(tmp_path / "out.svg")])
    timeline.main()
    out = capsys.readouterr().out
    assert "gather: 0.50 ms of 3.5, 0.20 of them (40%)" in out
    assert "reduce: 2.00 ms of 3.5, 0.80 of them (40%)" in out
    assert (tmp_path / "out.svg").read_text().startswith("<svg ")
    kinds = [timeline.kind_of(name) for name, _, _ in kernels]
    assert kinds == ["gather", "rest", "product", "update", "reduce"]
