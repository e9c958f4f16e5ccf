"""The speed that `plan` predicts for the Llama family: what is stored, and what follows from it."""

from __future__ import annotations

import csv
from datetime import date
from functools import cache
from pathlib import Path

import pytest

from daybreak.config import resolve
from daybreak.report.gpus import MEASURED, Measured
from daybreak.report.plan import Plan, figures, plan
from daybreak.shapes import SHAPES
from daybreak.state.throughput import peak_flops

STORED = [m for m in MEASURED if SHAPES[m.shape].arch == "llama"]
SOURCE = "bench/results/decoder_step.csv"
ROWS = [r for r in csv.DictReader((Path(__file__).resolve().parents[1] / SOURCE).open()) if "daybreak" in r["system"]]
MIB = 1 << 20


@cache
def on(target: str, gpu: str = "h200", gpus: int = 1, **keys: object) -> Plan:
    values = {"data.dir": "nowhere"} | {k.replace("__", "."): v for k, v in keys.items()}
    return plan(resolve(target)[0].override(values), gpu=gpu, gpus=gpus)


def of(shape: str, B: int, T: int, tokens: int, **keys: object) -> Plan:
    return on(shape, batch__B=B, batch__T=T, batch__total_tokens=tokens, batch__recompute=0, **keys)


def where(m: Measured) -> str:
    rows = f"B {m.B}" if m.T == 1024 else f"B {m.B} x T {m.T}"
    return f"{m.shape} {rows}, recompute 0 on one NVIDIA H200 ({m.source})"


def test_stored_speeds_are_those_of_the_results_file() -> None:
    """The last row of each shape, B and T in bf16 on an H200. Its memory is that of a plan without recomputation."""
    last = {(r["model"], int(r["B"]), int(r["T"]), r["card"]): r for r in ROWS if r["system"] == "daybreak"}
    assert {(m.shape, m.B, m.T, m.gpu) for m in STORED} == last.keys()
    assert len(STORED) == len(last)
    for m in STORED:
        row, p = last[m.shape, m.B, m.T, m.gpu], of(m.shape, m.B, m.T, m.tokens)
        day = date.fromisoformat(row["date"])
        assert (float(row["tok_s"]), int(row["tokens"]), m.recompute) == (m.tok_s, m.tokens, 0)
        assert row["precision"] == "fp32 weights and moments"
        assert m.mfu == round(m.tok_s * p.flops_per_token / peak_flops(m.gpu), 4)
        assert m.source == f"{SOURCE}, {day.day} {day:%b %Y}"
        assert (p.nbytes + p.outside) / MIB == pytest.approx(int(row["memory_mib"]), rel=0.02)


@pytest.mark.parametrize("m", STORED, ids=lambda m: f"{m.shape}-{m.B}")
def test_a_speed_is_measured_only_with_the_settings_that_were_measured(m: Measured) -> None:
    assert of(m.shape, m.B, m.T, m.tokens).tok_s == (m.tok_s, f"measured {where(m)}")
    for p in (of(m.shape, m.B, m.T, 4 * m.tokens), of(m.shape, m.B, m.T, m.tokens, optim__name="muon"),
              on(m.shape, batch__B=m.B, batch__T=m.T, batch__total_tokens=m.tokens, batch__recompute=1)):  # fmt: skip
        assert p.tok_s == (m.tok_s, f"modelled, from {where(m)}")
    p = on(m.shape, batch__B=m.B, batch__T=3 * m.T // 4, batch__recompute=0)  # attention has other FLOPs
    rate, basis = p.tok_s
    assert rate == pytest.approx(m.mfu * peak_flops("NVIDIA H200") / p.flops_per_token)
    assert basis == f"modelled: {m.mfu:.1%} of its peak, as {where(m)}"


def test_recipes_and_other_gpus_reach_the_same_share_of_their_peak() -> None:
    for target, shape, B in (("llama-1B", "llama3.2-1b", 8), ("smollm-135M", "smollm2-135m", 16)):
        m = next(m for m in STORED if (m.shape, m.B) == (shape, B))
        p = on(target, "h100")
        assert p.tok_s[0] == pytest.approx(m.mfu * 988.8e12 / p.flops_per_token)
        assert p.tok_s[1] == f"modelled: {m.mfu:.1%} of its peak, as {where(m)}"
        assert p.hours == pytest.approx(p.tokens / p.tok_s[0] / 3600)
        several = on(target, "h100", 8).tok_s
        assert several == (pytest.approx(8 * 0.98 * p.tok_s[0]), f"{p.tok_s[1]}; times 8 x 0.98, measured on 4")
    small = on("tiny", "h100", model__arch="llama", model__NKV=2)
    assert small.tok_s[1].endswith(", but so small a model reaches less")


def test_fp8_is_near_the_rows_that_were_measured() -> None:
    """By the gains of GPT-2's shapes: 1 % off for Llama-3.2-1B, and 5 % for Qwen2.5-1.5B."""
    rows = [r for r in ROWS if r["system"] == "daybreak in fp8"]
    assert {r["model"]: r["tok_s"] for r in rows} == {"llama3.2-1b": "95571", "qwen2.5-1.5b": "79921"}
    for row, ratio in zip(rows, (1.0035, 1.0488), strict=True):
        p = of(row["model"], int(row["B"]), int(row["T"]), int(row["tokens"]), precision__compute="fp8")
        assert p.tok_s[0] / float(row["tok_s"]) == pytest.approx(ratio, abs=0.002)
        assert p.tok_s[1].startswith("modelled, from ")


def test_wide_heads_have_no_figure() -> None:
    """Gemma's attention takes kernels that were never timed."""
    for shape in ("gemma3-270m", "gemma3-1b"):
        p = on(shape, batch__T=1024, run__steps=10)
        assert (p.tok_s, p.hours) == (None, None)
        said = {what: (value, basis) for what, value, basis in figures(p)}
        assert said["speed"] == ("n/a", "no figure for this family, head size, GPU, precision, kernels or "
                                        "adapters; daybreak bench measures it there")  # fmt: skip
    assert on("qwen3-0.6b", batch__T=1024).tok_s is not None  # heads of 128
