"""bench/kernels.py without a card: every case is made and launched once, small, through Triton's interpreter or the
reference kernels; only the clock, the card's limits and its name are made up."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import interpreter  # noqa: F401  # before the first launch: it mends the rounding of bf16 stores
import pytest
import torch

from daybreak.kernels import all_ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a card measures them itself")
BENCH = Path(__file__).parents[1] / "bench"
TINY = (2, 64, 32, 2, 128)  # B, T, C, NH, Vp
HERE = {"card": "a card", "driver": "1", "torch": "2", "triton": "3", "date": "2026-01-01", "commit": "abc"}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/kernels.py on a device that is the CPU, with 1 TB/s, 10 TFLOP/s and a millisecond for everything."""
    monkeypatch.syspath_prepend(str(BENCH))
    kernels = importlib.import_module("kernels")
    for path in ("timing.py", *BENCH.glob("kernel_*.py")):
        module = importlib.import_module(Path(path).stem)
        if hasattr(module, "DEVICE"):
            monkeypatch.setattr(module, "DEVICE", "cpu")
        if hasattr(module, "missing_backends"):
            monkeypatch.setattr(module, "missing_backends", lambda capability: {})
    for operation in all_ops("cuda").values():
        for vendor in {"quack", "cublaslt", "cudnn", "fa4"} & set(operation.impls):
            monkeypatch.setitem(operation.impls, vendor, operation.impls["torch"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernels, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(kernels, "passing", lambda ops: {op for op in ops if kernels.test_files(op)})
    monkeypatch.setattr(kernels, "seconds", lambda case: case.make()() or 1e-3)
    monkeypatch.setattr(kernels, "copy_rate", lambda: 1e12)
    monkeypatch.setattr(kernels, "product_rate", lambda: 1e13)
    monkeypatch.setattr(kernels, "machine", lambda: HERE)
    return kernels


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_case_runs_and_has_its_row(kernels: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "new" / "kernels.csv"
    assert kernels.main(["--shapes", "tiny", "--out", str(out)]) == 1  # a millisecond is far from 85 %
    found = rows(out)
    assert [*found[0]] == [*kernels.COLUMNS, "copy TB/s", "product TFLOP/s", *HERE]
    named = {row["op"] for row in found}
    assert named == {name for name, op in all_ops("cuda").items() if len(op.impls) > 1}
    for row in found:
        assert row["microseconds"] == "1000.0", row
        assert row["verdict"] == "below 85 %" or row["verdict"].startswith("exempt: "), row
        assert row["copy TB/s"] == "1.000"
        assert row["product TFLOP/s"] == "10"
        assert row["card"] == "a card"
        assert row["commit"] == "abc"
    norm = next(row for row in found if row["op"] == "global_norm")
    N = -(-(12 * (12 * 32 * 32 + 13 * 32) + (128 + 64 + 2) * 32) // 128) * 128
    assert norm["TB/s"] == f"{2 * N / 1e-3 / 1e12:.3f}"
    assert norm["percent"] == f"{100 * 2 * N / 1e12 / 1e-3:.1f}"


def test_what_was_measured_outlives_the_process(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is in the file before the next is measured; a kernel that fails has a row that says so."""
    out, seen = tmp_path / "kernels.csv", []

    def seconds(case: object) -> float:
        seen.append(len(rows(out)))
        if len(seen) == 2:
            raise RuntimeError("no such kernel\nand more")
        return 1e-12

    monkeypatch.setattr(kernels, "seconds", seconds)
    assert kernels.main(["--shapes", "tiny", "--groups", "classifier,guard", "--out", str(out)]) == 1
    assert seen == [0, 1, 2, 3, 4]
    assert [row["verdict"] for row in rows(out)][:2] == ["PASS", "RuntimeError: no such kernel"]
    assert rows(out)[1]["microseconds"] == ""
    assert kernels.main(["--shapes", "tiny", "--ops", "step_guard", "--out", str(out)]) == 0
    assert [row["op"] for row in rows(out)] == ["step_guard"]


def test_arguments(kernels: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, named in ((["--groups", "norms"], "no norms, only attention"), (["--shapes", "d48"], "no d48")):
        with pytest.raises(SystemExit):
            kernels.main(arguments)
        assert named in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
