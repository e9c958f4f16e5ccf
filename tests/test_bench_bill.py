"""The bill of bench/bill.py for measured steps, rows of bench/bill_step.py, and the verdict of bench/fp8_loss.py."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from daybreak.config import Config

ROOT = Path(__file__).parents[1]
COLUMNS = "recipe,precision,ranks,ms,update_ms,share,share8,tok_s,mib,card,date,commit"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("bill")


def test_steps_follow_nanochat_s_rules(bench: ModuleType) -> None:
    """Of the shipped recipe, and of depth 22 with 49,152 ids: 9.4 x 592,577,964 tokens, 2^20 a step."""
    config, d24, d22 = Config.from_target("nanochat-d24"), bench.RECIPES["d24"], bench.RECIPES["d22"]
    assert (d24.steps, d24.step_tokens) == (config.run.steps, config.batch.total_tokens) == (5568, 1 << 20)
    assert math.isclose(d24.weight_decay, config.optim.muon_weight_decay, rel_tol=1e-8)
    assert d24.parameters(12) == 110_100_912
    assert (d22.steps, d22.step_tokens, d22.parameters(22)) == (5312, 1 << 20, 592_577_964)


def test_the_model_by_hand(bench: ModuleType) -> None:
    """Alone 1,000 ms of compute and 100 of update, of which 20 do not shrink; on N ranks 60 (N - 1) / N are exposed."""

    def row(ranks: int) -> object:
        update = 20 + 80 / ranks
        ms = 1000 + update + 60 * (ranks - 1) / ranks
        return bench.Row(ranks, ms, update, 1 / ranks, 1 / 8, 0.0, 0, "", "", "")

    for many, ranks in ((2, 4), (4, 8), (2, 8)):
        step = bench.modelled(row(1), row(many), ranks, 1 / ranks)
        want = (1000, 20 + 80 / ranks, 60 * (ranks - 1) / ranks)
        assert (step.compute, step.update, step.exposed) == pytest.approx(want)
        assert step.ms == pytest.approx(row(ranks).ms)
    uneven = bench.modelled(row(1), row(4), 8, 0.2)  # a rank with more of Muon than others
    assert uneven.update == pytest.approx(36)


def test_the_tables(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(
        f"{COLUMNS}\n"
        "d24,fp8,4,9999,40,.25,.125,1,1,NVIDIA H200,2026-11-30,aaaaaaabbb\n"
        "d24,fp8,1,1100,100,1,.125,119156.4,59000,NVIDIA H200,2026-11-30,aaaaaaabbb\n"
        "d24,fp8,2,1090,60,.5,.125,240500.9,57000,NVIDIA H200,2026-11-30,aaaaaaabbb\n"
        "d24,fp8,4,1085,40,.25,.125,483214.7,54000,NVIDIA H200,2026-11-30,aaaaaaabbb\n"
        "d22,bf16,1,1000,90,1,.145,131072,59000,NVIDIA H200,2026-11-30,aaaaaaabbb\n"
    )
    monkeypatch.setattr("sys.argv", ["bill.py", str(rows), "--price", "24"])
    bench.main()
    out = capsys.readouterr().out
    first, second, third, lacking, machine, said = out.strip().split("\n\n")
    # 1,000 of compute, 100 - 80 x .875 = 30 of update, and 45 x (7/8) / (3/4) = 52.5 exposed; x 5,568 / 60,000
    name = "nanochat's merged recipe (a825e63), d24 | fp8"
    bill = f"| {name} | 5,568 | 1,100.0 | 1,085.0 on 4 | 1,082.5 | 30.0, 52.5 | 100.5 | 40.18 | 99.0 |"
    assert first.splitlines()[2:] == [bill]
    # from 1 and 2: 1,000, 40 and 30 x 1.5
    assert second.splitlines()[2:] == [f"| {name} | 1,085.0 | 1,085.0 | +0.00 % |"]
    assert len(third.splitlines()) == 2 + 4
    assert f"| {name} | 2 | 1,090.0 | 60.0 | 120,250 | 57,000 |" in third
    assert machine == "Measured on NVIDIA H200, 2026-11-30, commit aaaaaaa. 24 dollars an hour for 8 GPUs."
    unmerged = "nanochat's unmerged change #830, d22"
    assert lacking == f"No bill of {unmerged} in bf16: it needs rows of 1 and of 2 or 4 GPUs."
    assert said.startswith("Nothing was run on 8 GPUs. Nothing was run on an H100. An H200 has")

    # rows of an H100, and of one number of GPUs alone: no bill, and no sentence that is not true
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[0], lines[2].replace("H200", "H100 80GB HBM3")]) + "\n")
    bench.main()
    third, lacking, machine, said = capsys.readouterr().out.strip().split("\n\n")
    assert third.splitlines()[2:] == [f"| {name} | 1 | 1,100.0 | 100.0 | 119,156 | 59,000 |"]
    assert lacking.startswith("No bill of nanochat's merged recipe (a825e63), d24 in fp8: it needs rows")
    assert machine.startswith("Measured on NVIDIA H100 80GB HBM3, 2026-11-30")
    assert said.startswith("Nothing was run on 8 GPUs. The steps are those after which")

    monkeypatch.setattr("sys.argv", ["bill.py", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "none.csv is no file; bench/bill_step.py writes one" in capsys.readouterr().err


def test_ranks_of_a_toy_agree(bench: ModuleType, tmp_path: Path) -> None:
    """Two ranks together, and each alone: the same tokens have the same losses, and Muon's work is halved."""
    out, code = tmp_path / "rows.csv", ROOT / "bench/bill_step.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(code),
        str(out),
    ]
    command += ["--recipes", "toy", "--precisions", "bf16", "--ranks", "2,1", "--warm", "1", "--timed", "2"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with out.open(newline="") as file:
        two, one = csv.DictReader(file)
    assert (two["ranks"], one["ranks"]) == ("2", "1")
    assert (two["tokens"], one["tokens"]) == ("1024", "512")
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), abs=2e-3)
    assert (float(two["share"]), float(one["share"])) == (0.5, 1)
    assert len(one["each_ms"].split()) == 2
    read = bench.read(out)["toy", "bf16"]
    assert read[1].ms >= read[1].update_ms > 0


def run_of(folder: Path, losses: list[float], val: float) -> Path:
    folder.mkdir()
    lines = [{"kind": "run", "step": 0}, {"kind": "val", "step": 0, "loss": 9.0}]
    lines += [{"kind": "step", "step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    lines += [{"kind": "val", "step": len(losses), "loss": val}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(("train", "val", "code"), [(4.02, 5.03, 0), (4.021, 5.0, 1), (3.979, 5.0, 1), (4.0, 5.031, 1)])
def test_how_far_fp8_may_be(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: float, val: float, code: int
) -> None:
    """The control is 0.01 away in training and 0.015 in validation, so fp8 may be 0.02 and 0.03 away."""
    fp8_loss = importlib.import_module("fp8_loss")
    assert fp8_loss.gaps(4.0, 4.001, 4.004) == pytest.approx((0.001, 0.004, 0.005))
    far = [7.0] * 18  # no other step counts
    ends = {"bf16": ([4.0, 4.0], 5.0), "control": ([3.98, 4.0], 5.015), "fp8": ([train - 1, train + 1], val - 1e-9)}
    runs = [run_of(tmp_path / name, far + end, last) for name, (end, last) in ends.items()]
    runs[0] /= "metrics.jsonl"  # a folder or its file
    monkeypatch.setattr("sys.argv", ["fp8_loss.py", *map(str, runs), "--out", str(tmp_path / "out.csv")])
    with pytest.raises(SystemExit) as stopped:
        fp8_loss.main()
    assert stopped.value.code == code
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(i) for i in range(21)]
    assert rows[20]["control validation"] == "5.015000"
    assert rows[19]["control training"] == "3.980000"
    assert rows[19]["fp8 validation"] == ""


def test_the_verdict_on_the_committed_losses(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is that of the runs that the CSV is of, and its means are those of the pages and of the log beside it."""
    fp8_loss = importlib.import_module("fp8_loss")
    results, said = ROOT / "bench/results", {}
    for name in ("h200", "d48_h200", "qwen_h200", "qwen_seed_2_h200", "lora"):
        name = "lora_fp8_loss_h200" if name == "lora" else f"fp8_loss_{name}"
        monkeypatch.setattr("sys.argv", ["fp8_loss.py", str(results / f"{name}.csv")])
        with pytest.raises(SystemExit):
            fp8_loss.main()
        said[name] = [
            re.findall(r"(?:bf16|control|fp8) ([\d.]+)", line) for line in capsys.readouterr().out.splitlines()
        ]
    (bf16, control, fp8), ends = said["fp8_loss_h200"]
    log, page = (results / "fp8_h200.txt").read_text(), (ROOT / "docs/benchmarks.md").read_text()
    assert f"last 76 steps {control} (bf16 with B = 16 {bf16}); validation at the end {ends[1]} ({ends[0]})" in log
    assert f"validation loss of {ends[2]} beside {ends[0]} (7057a97), and bf16 with B = 8 with {ends[1]}" in page
    assert f"are {fp8}, {bf16} and {control}." in page
    tuning = " ".join((ROOT / "docs/tuning.md").read_text().split())
    for name, last in (("qwen_h200", 30), ("qwen_seed_2_h200", 30), ("d48_h200", 122)):
        (bf16, control, fp8), ends = said[f"fp8_loss_{name}"]
        words = f"{ends[2]} beside {ends[0]} and {ends[1]}, last {last} training losses {fp8}, {bf16} and {control}"
        assert words in page, name
    for a, b, c in ([float(x) for x in said[name][1]] for name in said if name.startswith("fp8")):
        assert f"| {a:.3f} | {b:.3f} | {c:.3f} | {c - a:+.3f} |" in tuning
    both = [said[f"fp8_loss_{name}"] for name in ("qwen_h200", "qwen_seed_2_h200")]
    mean = [statistics.mean(float(of[i][2]) - float(of[i][0]) for of in both) for i in (1, 0)]
    assert f"mean is {mean[0]:.3f} for validation and {mean[1]:.3f} for the last training losses" in tuning
    train = [of for of, _ in fp8_loss.written(results / "fp8_loss_d48_h200.csv")]
    means = [[statistics.mean(of[s] for s in range(i - 121, i + 1)) for of in train] for i in range(732, 1221, 122)]
    apart = [fp8 - bf16 for bf16, _, fp8 in means]
    assert f"fp8 stays {min(apart):.3f} to {max(apart):.3f} above bf16" in tuning
    assert f"falls by {means[0][0] - means[-1][0]:.1f}" in tuning
    both = [fp8_loss.gaps(*map(float, of)) for of in said["fp8_loss_d48_h200"]]
    words = "{:.3f} in training loss where {:.3f} is allowed, and {:.3f} in validation where {:.3f} is"
    assert words.format(*both[0][1:], *both[1][1:]) in tuning
    with (results / "fp8_loss_small_cpu.csv").open(newline="") as file:
        apart = [float(row["fp8 validation"]) - float(row["bf16 validation"]) for row in csv.DictReader(file)]
    words = f"is {sum(apart) / 8:.3f} higher on average, and single ones differ by up to {max(map(abs, apart)):.3f}"
    assert words in tuning
    log = (results / "finetune_h200.txt").read_text()
    for name, loss, end in zip(("bf16", "control", "fp8"), *said["lora_fp8_loss_h200"], strict=True):
        assert re.search(rf"^{name}: +training {loss}, validation .* {end}$", log, re.MULTILINE), name


def test_one_csv_has_the_verdict_of_its_three_runs(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fp8_loss = importlib.import_module("fp8_loss")
    runs = [str(run_of(tmp_path / str(i), [4.0 + x, 5.0 - x], 3.0 + x)) for i, x in enumerate((0, 1 / 7, 0.2))]
    out = str(tmp_path / "out.csv")
    for given in ([*runs, "--out", out], [out]):
        monkeypatch.setattr("sys.argv", ["fp8_loss.py", *given])
        with pytest.raises(SystemExit):
            fp8_loss.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:]
    monkeypatch.setattr("sys.argv", ["fp8_loss.py", *runs[:2]])
    with pytest.raises(SystemExit, match="2"):
        fp8_loss.main()
