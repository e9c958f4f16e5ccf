"""bench/fp8_gradients.py on a CPU: errors of gradients, within bounds that follow from the formats, rung by rung."""

from __future__ import annotations

import csv
import importlib
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import markov, write_shard
from torch import Tensor

from daybreak.engine import EngineSpec
from daybreak.engine.step import draw
from daybreak.kernels.operand import Operand
from daybreak.shapes import GPT2Config

BENCH = Path(__file__).parents[1] / "bench"
CFG, B, T = GPT2Config(L=3, C=64, NH=4, max_T=64, V=61), 2, 64
CPU = torch.device("cpu")
MATRICES = [f"h.{l}.{w}" for l in range(CFG.L) for w in ("qkvw", "attprojw", "fcw", "fcprojw")]
TOP = f"h.{CFG.L - 1}.fcprojw"  # nothing in fp8 lies between it and the loss


def rounding(bits: int) -> float:
    """The relative error (root mean square) of rounding to this many bits of fraction, where all fractions are equally
    likely on a logarithmic scale: 1 / sqrt(12) of the distance of two values, and 3 / (8 log 2) = mean of 1 / x^2."""
    return 2.0**-bits * math.sqrt(3 / (8 * math.log(2)) / 12)


E4M3, E5M2, BF16 = rounding(3), rounding(2), rounding(7)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    found = importlib.import_module("fp8_gradients")
    monkeypatch.setattr(found, "WARM", 1)
    return found


def drawn(silent: str = "") -> dict[str, Tensor]:
    """Weights of the small model in bf16. The block `silent` adds nothing to the residual stream."""
    found = {name: x.to(torch.bfloat16) for name, x in draw(EngineSpec(CFG, B=B, T=T), 1).items()}
    for name in (f"{silent}attprojw", f"{silent}fcprojw"):
        if silent:
            found[name].zero_()
    return found


def gradients(script: Any, compute: str, *rungs: str, silent: str = "") -> dict[str, Tensor]:
    """Those of two micro-batches of random tokens, after one that warms scales up."""
    data = torch.randint(CFG.V, (2, 1 + 2, B, T), generator=torch.Generator().manual_seed(0)).unbind()
    spec = EngineSpec(CFG, B=B, T=T, compute=compute)
    return {name: g.clone() for name, g in script.gradients(spec, CPU, drawn(silent), data, rungs)}


def test_rungs_lower_the_errors_that_they_should(script: Any) -> None:
    """Errors of independent roundings add up as their squares do. A gradient depends on 4 roundings to e5m2 and 8 to
    e4m3 in each block, and on 20 to 30 to bf16. The top matrix's weight gradient rounds one matrix in each format. The
    rest of its error comes from forward, where fc alone rounds two, and is what remains with the rung `weights`."""
    exact = gradients(script, "fp32")
    found = {
        "bf16": gradients(script, "bf16"),
        "fp8": gradients(script, "fp8"),
        **{rung: gradients(script, "fp8", rung) for rung in ("e4m3", "weights")},
    }
    of = {variant: script.compared(some.items(), exact) for variant, some in found.items()}
    errors = {variant: {name: error for name, (error, _) in some.items()} for variant, some in of.items()}
    most = math.sqrt(CFG.L * (4 * E5M2**2 + 8 * E4M3**2))
    narrow = math.sqrt(CFG.L * 12 * E4M3**2)
    for name in MATRICES:
        assert errors["bf16"][name] < BF16 * math.sqrt(CFG.L * 30) < E4M3
        assert math.hypot(E5M2, E4M3) / 2 < errors["fp8"][name] < most
        assert E4M3 / 2 < errors["e4m3"][name] < min(narrow, errors["fp8"][name])
        assert errors["bf16"][name] < errors["weights"][name] < errors["fp8"][name]
    forward = errors["weights"][TOP]
    assert forward > math.hypot(E4M3, E4M3)
    assert errors["fp8"][TOP] == pytest.approx(math.hypot(E5M2, E4M3, forward), rel=0.05)
    assert errors["e4m3"][TOP] == pytest.approx(math.hypot(E4M3, E4M3, forward), rel=0.05)
    for name in exact:  # weight gradients are what no other gradient depends on
        assert torch.equal(found["weights"][name], found["fp8"][name]) == (name not in MATRICES)
    for some in of.values():  # to second order, the cosine of two vectors of nearly the same length
        error, cosine = some["blocks"]
        assert 1 - cosine == pytest.approx(error**2 / 2, rel=0.3)


def test_the_pattern_leaves_the_ends_in_bf16(script: Any) -> None:
    """The block between them is silent: it changes neither the residual stream nor its gradient, whatever its format.
    So all gradients but its own have the bits of bf16, though weights, activations and gradients of it are rounded."""
    bf16, ends, fp8 = (
        gradients(script, compute, *rungs, silent="h.1.")
        for compute, rungs in (("bf16", ()), ("fp8", script.VARIANTS["ends"]), ("fp8", ()))
    )
    for name in bf16:
        if name not in MATRICES or not name.startswith("h.1."):
            assert torch.equal(ends[name], bf16[name]), name
    for name in ("h.1.attprojw", "h.1.fcprojw"):  # behind them are as many roundings as behind the top matrix
        error = script.compared([(name, ends[name])], {name: bf16[name].float()})["all"][0]
        assert error == pytest.approx(math.hypot(E5M2, E4M3, E4M3, E4M3), rel=0.15)
    assert not any(torch.equal(fp8[name], bf16[name]) for name in MATRICES if name[:3] in ("h.0", "h.2"))


def test_slow_accumulation_reaches_every_matmul_in_fp8(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the keys of cuBLASLt's matmuls. Without the rung, only weight gradients are slow."""
    pytest.importorskip("triton")
    from daybreak.kernels.cuda import cublaslt, fp8

    def operand(format: Any, rows: int, columns: int) -> Operand:
        parts = {p: torch.empty(s, dtype=d, device="meta") for p, (s, d) in format.parts(rows, columns).items()}
        return Operand(format, scale=torch.empty((), device="meta"), **parts)

    n, I, O = 32, 48, 64
    x, w, dout = operand(script.E4M3, n, I), operand(script.E4M3, O, I), operand(script.formats.E5M2, n, O)
    out, dx, dw = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((n, O), (n, I), (O, I)))

    def step() -> None:
        fp8.matmul_forward(out, x, w, scratch=list)
        fp8.matmul_backward_input(dx, dout, w, scratch=list)
        fp8.matmul_backward_weight(dw, dout, x, accumulate=True, scratch=list)

    assert [key.dtype for key in cublaslt.listed(step)] == ["e4m3", "e5m2", "e5m2slow"]
    for change in script.REPLACED["slow"]:
        monkeypatch.setattr(*change)
    assert [key.dtype for key in cublaslt.listed(step)] == ["e4m3slow", "e5m2slow", "e5m2slow"]


def test_a_training_is_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command: the table's numbers are those of the file, and the weights are trained between the steps."""
    variants = {v: rungs for v, rungs in script.VARIANTS.items() if v in ("bf16", "fp8", "slow", "all")}
    monkeypatch.setattr(script, "VARIANTS", variants)
    for kind in ("train", "val"):
        write_shard(tmp_path / f"x_{kind}_000000.bin", markov(3000, 1))
    shape = {"L": 3, "C": 32, "NH": 2, "max_T": 16, "V": 257}
    flags = " ".join(f"--model.{key} {value}" for key, value in shape.items())
    data = f"--data.train {tmp_path}/*train* --data.val {tmp_path}/*val* --data.tokenizer bytes --run.device cpu"
    out = tmp_path / "errors.csv"
    monkeypatch.setattr("sys.argv", ["x", "tiny", *f"--steps 1,2 --B 2 --micro 1 --out {out} {flags} {data}".split()])
    script.main()
    rows = list(csv.DictReader(out.open(newline="")))
    assert [*dict.fromkeys(row["variant"] for row in rows)] == ["bf16", "fp8", "all"]  # and no "slow" on a CPU
    at = {(row["step"], row["variant"], row["tensor"]): float(row["relative error"]) for row in rows}
    assert len(at) == len(rows) == 2 * 3 * (2 + 12 * 3 + 2 + 2)
    assert at["1", "fp8", "h.0.qkvw"] != at["2", "fp8", "h.0.qkvw"]
    lines = {tuple(text.split()[:2]): text for text in capsys.readouterr().out.splitlines()}
    for step, variant in {key[:2] for key in at}:
        fcw = [at[step, variant, f"h.{l}.fcw"] for l in range(3)]
        text = lines[step, variant]
        assert f"  fcw {statistics.median(fcw):.4f} {max(fcw):.4f}  " in text
        assert f"  all {at[step, variant, 'all']:.4f} cosine " in text
