"""The answers of `plan` before a run: memory against what GPUs reported, time and money by hand, advice that holds."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import daybreak
import daybreak.engine.arena as arena_module
import daybreak.engine.fit as fit_module
from daybreak.cli.main import main
from daybreak.config import Config, parse_value, recipe_names, resolve
from daybreak.engine.fit import OUTSIDE, Fit
from daybreak.kernels.cuda import cudnn, fa4, quack
from daybreak.report.gpus import MEASURED, find_gpu
from daybreak.report.plan import figures, plan, recipe_notes
from daybreak.shapes import GPT2Config
from daybreak.state.restore import checkpoint_bytes, checkpoints_kept, warn_of_disk
from daybreak.state.throughput import GPUS, fp8_gain
from daybreak.training.setup import _say_slow

ROOT = Path(__file__).resolve().parents[1]
CSV, MULTI = ROOT / "bench/results/gpu_step.csv", ROOT / "bench/results/multi_gpu.csv"
PAGE = (ROOT / "docs/finetune.md").read_text()
MIB = 1 << 20
SMALL = {"model.L": 2, "model.C": 32, "model.NH": 2, "model.max_T": 64, "model.V": 257, "data.tokenizer": "bytes",
         "batch.B": 2, "run.device": "cpu", "eval.tokens": 256, "eval.sample_tokens": 4}  # fmt: skip


@cache  # a plan keeps every size that it has looked for
def on(target: str, gpu: str | None = "h100", gpus: int = 1, **keys: object) -> daybreak.report.plan.Plan:
    values = {"data.dir": "nowhere"} | {k.replace("__", "."): v for k, v in keys.items()}  # no data has a length here
    return plan(resolve(target)[0].override(values), gpu=gpu, gpus=gpus)


def said(p: daybreak.report.plan.Plan) -> dict[str, tuple[str, str]]:
    return {what: (value, basis) for what, value, basis in figures(p)}


# ------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize(("shape", "recompute"), [("d12", 0), ("d48", 2)])
def test_planned_memory_is_within_two_percent_of_the_drivers(shape: str, recompute: int, gpus: int) -> None:
    keys = {"parallel__zero": 1} if gpus > 1 else {}
    p = on(shape, "h200", gpus, batch__B=16, batch__recompute=recompute, **keys)
    where = "of one rank alone" if gpus == 1 else f"on rank 0 of {gpus}"
    rows = {row["what"]: row["value"] for row in csv.DictReader(MULTI.open())}
    driver = int(rows[f"{shape} MiB {where} as the driver says"])
    assert (p.nbytes + p.outside) / MIB == pytest.approx(driver, rel=0.005)


def test_planned_memory_holds_where_its_constants_were_not_taken() -> None:
    """Two ranks that save, and every row of one H100 since the benchmark takes its checksum in small pieces."""
    rows = {row["what"]: row["value"] for row in csv.DictReader(MULTI.open())}
    driver = int(rows["d12 MiB on rank 0 of 2 with a save every 10 steps"])
    p = on("d12", "h200", 2, batch__B=16, batch__recompute=0, parallel__zero=1)
    assert (p.nbytes + p.outside) / MIB == pytest.approx(driver, rel=0.02)
    steps = [r for r in csv.DictReader(CSV.open()) if r["masters"] == "auto"]
    assert {(r["model"], r["B"]) for r in steps} == {("d48", "16"), ("d48", "28"), ("d48", "34"), ("d12", "64")}
    for row in steps:
        p = on(row["model"], batch__B=int(row["B"]), batch__recompute=int(row["recompute"]))
        assert (p.nbytes + p.outside) / MIB == pytest.approx(int(row["memory_mib"]), rel=0.02)


def test_stored_measurements_are_those_of_the_results_file() -> None:
    if not CSV.is_file():
        pytest.skip("bench/results/gpu_step.csv is not in this checkout")
    rows = [r for r in csv.DictReader(CSV.open()) if r["memory_mib"]]
    for m in (m for m in MEASURED if m.source.startswith("bench/results/gpu_step.csv")):
        key = (m.shape, str(m.B), str(m.recompute), m.gpu)
        row = [r for r in rows if (r["model"], r["B"], r["recompute"], r["card"]) == key][-1]
        assert (float(row["tok_s"]), float(row["mfu"]), int(row["tokens"])) == (m.tok_s, m.mfu, m.tokens)


@pytest.mark.parametrize(("target", "gpu"), [("d12", "4090"), ("d12", "h100"), ("d24", "a100-40gb"), ("d6", "l4")])
@pytest.mark.parametrize("recompute", [0, 3])
def test_the_largest_micro_batch_is_the_largest(target: str, gpu: str, recompute: int) -> None:
    p = on(target, gpu, batch__recompute=recompute)
    B = p.fit.largest_B(p.config)
    need = [p.fit.need(p.config.override({"batch.B": b})) for b in (B, B + 1)]
    assert need[0] <= int(0.98 * GPUS[gpu].mib) * MIB < need[1]


@pytest.mark.parametrize("mib", [6_000, 4_200, 3_900, 3_700])  # each asks for more changes than the one before
@pytest.mark.parametrize("total", [0, 131_072])
def test_following_the_advice_makes_it_fit(mib: int, total: int) -> None:
    config = resolve("d12")[0].override({"precision.compute": "bf16", "batch.B": 16, "batch.total_tokens": total})
    fit = Fit(torch.device("cuda"), (), mib * MIB)
    assert fit.need(config) > fit.budget
    words = fit.advice(config).split()
    flags = {f[2:]: parse_value(f[2:], v) for f, v in zip(words[::2], words[1::2], strict=True)}
    changed = config.override(flags)
    changed.check()
    assert fit.need(changed) <= fit.budget


def test_advice_where_nothing_helps() -> None:
    config = resolve("d12")[0].override({"precision.compute": "bf16"})
    fit = Fit(torch.device("cuda"), (), 1 << 30)
    assert fit.largest_B(config) == 0
    assert fit.advice(config) == "a smaller model or a device with more memory"


def test_least_change_first() -> None:
    config = resolve("d12")[0].override({"precision.compute": "bf16", "batch.B": 64, "batch.total_tokens": 524288})
    budgets = {mib: Fit(torch.device("cuda"), (), mib * MIB).advice(config) for mib in (13_600, 2_700)}
    assert budgets[13_600] == "--batch.B 32"  # rows that divide the step
    assert budgets[2_700].startswith("--batch.recompute")


@pytest.mark.parametrize(
    ("method", "flags", "card", "most"),
    [
        ("lora, r = 16", {"lora__rank": 16}, "4090", 8),
        ("qlora, r = 16", {"lora__rank": 16, "lora__base": "nf4"}, "4090", 19),
        ("full", {"precision__masters": "none", "precision__moments": "bf16"}, "h100", 18),
    ],
)
def test_finetuning_8b_on_one_card(method: str, flags: dict[str, Any], card: str, most: int) -> None:
    """Full finetuning has 2 bytes a weight each for weights, gradients and both moments: 79 GiB hold them."""
    same = {"batch__T": 2048, "batch__recompute": 3, "batch__B": 1}
    p, there = on("llama3-8b", "h100", **same, **flags), on("llama3-8b", card, **same, **flags)
    row = rf"^\| {method}[^|]* \| ([\d,]+) \| \w+ G.?B, where B may be {most} \| `(.*)` \|$"
    ((said, shown),) = re.findall(row, PAGE, re.M)
    assert shown == " ".join(f"--{key.replace('__', '.')} {value}" for key, value in flags.items())
    assert (p.nbytes + p.outside) / MIB == pytest.approx(int(said.replace(",", "")), abs=1)
    assert there.fit.best_B(there.config) == most
    if method == "full":
        sizes = p.arena.sizes()
        assert [sizes[name] for name in ("weights", "grads", "m", "v")] == [2 * 8_030_261_248] * 4
        assert "masters" not in sizes
        assert p.nbytes + p.outside < 79 << 30


# ---------------------------------------------------------------------------------------------- time, money, disk


def test_the_figures_of_the_large_recipe_by_hand() -> None:
    p = on("gpt2-1558M", gpus=8, cost__price=28.0)
    tokens, rate = 32_000 * 1_048_576, 56_367 * 8 * 0.98
    got = said(p)
    assert p.tokens == tokens
    assert p.flops_per_token == 9_817_977_600
    assert p.hours == pytest.approx(tokens / rate / 3600)
    assert got["step"][0].startswith("1,048,576 tokens: 8 micro-steps of B 16 x T 1024 on 8 x NVIDIA H100 80GB HBM3")
    assert got["run"][0] == "32,000 steps, 33.6 billion tokens, 3.29e+20 FLOPs"
    assert got["speed"][0] == f"{rate:,.0f} tok/s"
    assert got["speed"][1].startswith("modelled, from d48 B 16, recompute 1 on one NVIDIA H100")
    assert got["time"][0] == "21h05m"
    assert got["cost"] == (f"${tokens / rate / 3600 * 28:,.2f}", "as the time; $28.00 an hour for all GPUs together")
    assert got["disk: data"] == ("67.1 GB", "counted: 2 bytes a token, if each is seen once")
    assert got["disk: checkpoints"][0] == "74.8 GB"  # four of 12 bytes a parameter
    assert got["use"][0] == "as it is"
    assert got["fits"][0] == "yes: 62,221 MiB of 79,927 MiB"


@pytest.mark.parametrize(("gpu", "gpus"), [("4090", 1), ("h100", 8)])
def test_a_shape_without_a_step_gets_the_rows_that_fit(gpu: str, gpus: int) -> None:
    """Nobody has said how many tokens a step takes: the most rows without recomputation, a micro-step a rank."""
    p = on("d12", gpu, gpus)
    B = p.fit.largest_B(p.config)
    flags, basis = said(p)["use"]
    assert flags == f"--batch.B {B} --batch.recompute 0"
    tokens = f"a step is {B * 1024 * gpus:,} tokens then: see docs/tuning.md for optim.lr"
    assert basis == f"modelled: the least recomputation that keeps the GPU busy; {tokens}"
    followed = on("d12", gpu, gpus, batch__B=B, batch__recompute=0)
    assert said(followed)["use"] == ("as it is", "planned")
    assert followed.config.tokens_at(0, gpus) == B * 1024 * gpus


def test_larger_shapes_without_a_step_recompute_for_enough_rows() -> None:
    flags = said(on("d36", "4090"))["use"][0].split()
    B, level = int(flags[1]), int(flags[3])
    assert level > 0
    assert B >= 16
    p = on("d36", "4090", batch__recompute=level - 1)
    assert p.fit.largest_B(p.config) < 16


def test_what_a_recipe_gets() -> None:
    """Its step stays what it is: `tiny` has none in tokens, but rows that were chosen."""
    assert said(on("tiny"))["use"] == said(on("tiny", None, run__device="cpu"))["use"] == ("as it is", "planned")
    busy = ("as it is", "modelled: it keeps the GPU busy with the least recomputation")
    assert said(on("gpt2-124M", gpus=8))["use"] == said(on("gpt2-124M"))["use"] == busy
    rates = [on("gpt2-124M", batch__B=B).tok_s[0] for B in (64, 128)]
    assert rates == [616_334, 616_334]  # so that a larger B, which fits, is no advice
    basis = "modelled: the least recomputation that keeps the GPU busy"
    assert said(on("gpt2-124M", batch__recompute=2))["use"] == ("--batch.B 64 --batch.recompute 0", basis)
    assert said(on("gpt2-124M", batch__B=8))["use"] == ("--batch.B 128 --batch.recompute 0", basis)  # 8 is too few


def test_a_speed_is_measured_only_where_all_settings_that_cost_time_were_so() -> None:
    """The recipe is the row of gpu_step.csv; each of these was never timed on it."""
    at = "d12 B 64, recompute 0 on one NVIDIA H100 80GB HBM3 (bench/results/gpu_step.csv, 26 Nov 2026)"
    for keys in ({}, {"precision__masters": "split"}, {"optim__lr": 1e-3}, {"eval__every": 10}):
        assert on("gpt2-124M", **keys).tok_s == (616_334, f"measured {at}")
    other: tuple[dict[str, Any], ...] = (
        {"optim__name": "muon"}, {"precision__masters": "none"}, {"precision__masters": "fp32"},
        {"precision__moments": "bf16"}, {"batch__total_tokens": 65_536}, {"batch__recompute": 1}, {"batch__B": 32},
        {"batch__ramp": ((100, 1_048_576),)}, {"data__packed": True},
    )  # fmt: skip
    for keys in other:
        assert on("gpt2-124M", **keys).tok_s == (616_334, f"modelled, from {at}"), keys
    p = on("gpt2-124M")
    without = Fit(p.fit.device, {"quack"}, p.fit.budget)  # this GPU, on a machine that lacks a package
    assert replace(p, fit=without).tok_s == (616_334, f"modelled, from {at}")
    for keys in ({"kernels__matmul": "torch"}, {"kernels__attention": "torch"}, {"lora__rank": 16}):
        p = on("gpt2-124M", **keys)
        assert (p.tok_s, p.hours) == (None, None), keys


def test_what_others_published_is_said_of_the_recipe_as_it_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    """A plan for other data and another vocabulary still prints it, so it says of what."""
    assert main(["plan", "gpt2-124M", "--gpu", "h100", "--model.V", "2000", "--steps", "20"]) == 0
    _, notes = capsys.readouterr().out.split("\n\nPublished, for the recipe as it is shipped:\n")
    assert notes.startswith("GPT-2 124M on 9.9B tokens of FineWeb: ")
    assert main(["plan", "d12", "--gpu", "h100"]) == 0
    assert "Published" not in capsys.readouterr().out


def test_every_basis_of_a_speed() -> None:
    rate, basis = on("d48", batch__B=34, batch__recompute=2, batch__total_tokens=139_264).tok_s
    assert rate == 55_324
    assert basis.startswith(
        "measured d48 B 34, recompute 2 on one NVIDIA H100 80GB HBM3 (bench/results/gpu_step.csv, 26"
    )
    p = on("d48", "a100", batch__B=16, batch__recompute=2)
    rate, basis = p.tok_s
    assert rate == pytest.approx(0.5628 * 312e12 / p.flops_per_token)
    assert basis.startswith("modelled: 56.3% of its peak, as d48 B 16, recompute 2 on one NVIDIA H100 80GB HBM3")
    assert "so small" not in basis
    measured = "as d12 B 64, recompute 0 on one NVIDIA H100 80GB HBM3 (bench/results/gpu_step.csv, 26 Nov 2026)"
    for few in ("d6", "tiny"):  # narrower than all that were measured
        assert on(few).tok_s[1] == f"modelled: 50.1% of its peak, {measured}, but so small a model reaches less"
    why = ("no figure for this family, head size, GPU, precision, kernels or adapters; daybreak bench measures it "
           "there", "CPU speed is not predicted; daybreak bench measures it")  # fmt: skip
    for unknown, basis in zip(
        (on("d6", precision__compute="fp32"), on("tiny", None, run__device="cpu"),
         on("nanochat:d4")), (*why, why[0]), strict=True
    ):  # fmt: skip
        assert said(unknown)["speed"] == ("n/a", basis)
        assert said(unknown)["time"][0] == "n/a"
        assert "cost" not in said(unknown)
    assert said(on("nanochat:d4", cost__price=0.5))["cost"] == ("n/a", "no time")
    timed = said(on("d6", run__steps=1000))
    assert timed["time"][0] != "n/a"
    assert "cost" not in timed  # no price, no dollars
    assert said(on("d6"))["run"] == ("n/a", "one epoch of its data, which is not here; give --steps")


def test_what_does_not_fit_says_the_flag() -> None:
    got = said(on("d48", "4090", batch__B=8))
    assert re.fullmatch(r"NO: it needs [\d,]+ MiB, there are 24,072 MiB", got["fits"][0])
    value, basis = got["to make it fit"]
    assert re.fullmatch(r"--batch.recompute 1 --batch.B [1-9]", value)
    assert basis == "makes it fit: planned"


def test_a_published_length_that_nobody_chose_is_named() -> None:
    """Memory grows with T, and the largest T of a model is more than a GPU holds."""
    long, short = on("llama3.2-1b"), on("llama3.2-1b", batch__T=2048)
    assert said(long)["sequences"][0].startswith("T is 131,072, the longest that the model allows: a shorter --batch.T")
    assert short.nbytes < long.nbytes / 10
    for usual in (short, on("smollm2-135m"), on("llama3.2-1b", batch__T=65_536)):
        assert "sequences" not in said(usual)


def test_several_cards_share_out_state() -> None:
    """ZeRO 1 on 8 GPUs: an eighth each of masters and moments (10 bytes a parameter), a gradient shard (2) more."""
    alone, shared = (on("gpt2-124M", gpus=8, parallel__zero=zero) for zero in (0, 1))
    assert alone.nbytes - shared.nbytes == pytest.approx((10 * 7 - 2) / 8 * alone.parameters, rel=0.001)
    sent = 2 * 2 * alone.parameters * 7 / 8  # bf16 there and back
    for p, stage in ((alone, 0), (shared, 1)):
        value, basis = said(p)["exchange"]
        assert float(value.split()[0]) == pytest.approx(sent / 1e6, rel=0.01)
        assert (value.split(" ", 1)[1], basis) == ("MB sent a step by each", f"counted, ZeRO stage {stage}")
    small = said(on("gpt2-774M", "l4", gpus=8))["to make it fit"][0]
    flags = dict(zip(small.split()[::2], small.split()[1::2], strict=True))
    assert flags["--parallel.zero"] == "1"
    keys = {k[2:].replace(".", "__"): int(v) for k, v in flags.items()}
    advised = on("gpt2-774M", "l4", gpus=8, **keys)
    assert advised.nbytes + advised.outside <= advised.budget


@pytest.mark.parametrize("keys", [{}, {"optim.name": "muon"}, {"optim.name": "muon", "precision.compute": "bf16"}])
def test_checkpoints_on_the_disk_are_as_large_as_planned(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("Every figure is exact or says on what it rests.\n" * 200)
    assert main(["prepare", "my.txt", "--tokenizer", "bytes"]) == 0
    large = {"model.C": 128, "data.name": "my", "run.steps": 4, "checkpoint.every": 1, "checkpoint.keep": 2}
    config = Config().override({**SMALL, **large, **keys, "run.name": "x"})
    p, run = plan(config), daybreak.train(config)
    sizes = [sum(f.stat().st_size for f in path.iterdir()) for path in run.checkpoints]
    assert sizes == [pytest.approx(checkpoint_bytes(p.arena), rel=0.03)] * 2
    assert checkpoints_kept(config) == 3
    held = sum(path.stat().st_size for path in Path("data/my-bytes").glob("*.bin"))
    assert said(p)["disk: data"] == (f"{held / 1e6:.3g} MB", "counted: the shards that are here")


def test_rows_of_whole_documents_need_more_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no shards are
    for fitted, more in ((False, ""), (True, "; best_fit drops some more")):
        p = plan(Config().override({**SMALL, "run.steps": 4, "data.best_fit": fitted}))
        assert said(p)["disk: data"][1] == f"counted: 2 bytes a token, if each is seen once{more}"


def test_what_saving_takes_beside_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Host memory for one process only, since ranks save together; and a warning if the disk has no room."""
    made = Config().override({**SMALL, "run.steps": 4})
    assert [plan(made, gpu="h100", gpus=n).host_nbytes > 0 for n in (1, 2)] == [True, False]
    arena = plan(made).arena
    warn_of_disk(tmp_path, made, arena)
    assert not caplog.messages
    warn_of_disk(tmp_path, made.override({"run.steps": 10**12, "checkpoint.every": 1, "checkpoint.keep": 0}), arena)
    said = r"^the checkpoints of .* need [\d.,e+]+ TB, which is .* TB more than its disk has free; .* lower checkpoint"
    assert re.search(said, *caplog.messages)


# ------------------------------------------------------------------------------------------------- recipes, GPUs


@pytest.mark.parametrize("name", [n for n in recipe_names() if n not in ("tiny", "shapes")])
def test_a_recipes_head_is_true(name: str) -> None:
    text = " ".join(recipe_notes(name))
    steps, step, gflop, flops = re.search(
        r"([\d,]+) steps x ([\d,]+) tokens x ([\d.]+) GFLOP per token = ([\d.e]+) FLOPs", text
    ).groups()
    p = on(name, gpus=8)
    assert (int(steps.replace(",", "")), int(step.replace(",", ""))) == (p.config.run.steps, p.config.tokens_at(0))
    assert float(gflop) == round(p.flops_per_token / 1e9, 2)
    assert float(flops) == pytest.approx(p.flops_per_token * p.tokens, rel=0.03)
    assert "published" in text
    assert "Expected" in text


def test_the_head_of_pictures_is_true() -> None:
    million, tokens, flops = re.search(
        r"([\d.]+)M parameters, ([\d.]+)M tokens, ([\d.e]+) FLOPs", " ".join(recipe_notes("shapes"))
    ).groups()
    p = on("shapes")
    assert float(million) == round(p.parameters / 1e6, 1)
    assert float(tokens) == round(p.tokens / 1e6, 1)
    assert float(flops) == pytest.approx(p.flops_per_token * p.tokens, rel=0.03)


def test_cards() -> None:
    assert find_gpu("H100") is GPUS["h100"]
    for name in ("RTX4090", "RTX 4090", "NVIDIA GeForce RTX 4090"):
        assert find_gpu(name) is GPUS["4090"]
    assert {c.capability[0] for c in GPUS.values()} == {7, 8, 9, 10, 12}
    p = on("d12", "a100")
    assert p.arena.choices["attention_backward"] == "triton"
    assert p.outside == OUTSIDE
    with pytest.raises(daybreak.Error, match=r"--gpu h10 is not known; did you mean h100\? Known: h100, "):
        find_gpu("h10")


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        ("plan d12 --gpu v100", 2, "--gpu v100 is not known; did you mean"),
        ("plan d12 --gpus 1,2", 2, "--gpus 1,2 compares one kind of GPU; say which with --gpu."),
        ("plan gpt2-124M --gpu h100 --gpus 8,24", 2, "--gpus 24: batch.total_tokens = 524288 is not a multiple of"),
        ("plan d12 --gpus 0", 2, "Invalid value for '--gpus': 0 is not in the range x>=1; see daybreak plan --help."),
        ("plan gpt2-124M --gpu a100 --gpus 3", 2, "must be a multiple of batch.B * T * ranks = 64 * 1024 * 3"),
        ("plan d12 --price -1", 2, "cost.price = -1.0 must be at least 0"),
    ],
)
def test_wrong_use(line: str, code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == code
    assert sentence in capsys.readouterr().err


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2-124M", "--gpu", "h100", "--gpus", "8", "--price", "28"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    names = [line.split("  ")[0] for line in out.splitlines()[:5]]
    assert names == ["fits", "use", "largest B", "speed", "time"]
    assert re.search(r"^model +124,475,904 parameters: gpt2 L=12 C=768 NH=12", out, re.M)
    assert "activation" not in out
    assert "HellaSwag about 29.9 %" in out  # published, with its source
    assert re.search(r"^cost +\$", out, re.M)


def test_what_a_card_cannot_run_is_not_counted() -> None:
    """By the kernels' own rules of compute capabilities: quack runs on Hopper only."""
    for gpu in GPUS.values():
        refused = {name for name, kernels in (("quack", quack), ("cudnn", cudnn), ("fa4", fa4))
                   if "ompute capability" in (kernels.usable(gpu.capability) or "")}  # fmt: skip
        assert gpu.missing == refused, gpu.name
    chosen = {gpu: set(on("d12", gpu).arena.choices.values()) for gpu in ("h100", "b200", "4090")}
    assert [("quack" in chosen[gpu], "fa4" in chosen[gpu]) for gpu in chosen] == [
        (True, True), (False, True), (False, False),
    ]  # fmt: skip


def test_the_speed_of_fp8(caplog: pytest.LogCaptureFixture) -> None:
    """Near the steps that were measured on an H200, in ms; and `train` warns below 1.05."""
    for shape, recompute, bf16_ms, ms in (("d48", 2, 2325, 1654), ("d36", 1, 1243.8, 891.3), ("d24", 1, 618.1, 457.1)):
        keys = {"batch__B": 16, "batch__recompute": recompute}
        bf16, fp8 = (on(shape, "h200", **keys, precision__compute=x).tok_s for x in ("bf16", "fp8"))
        assert fp8[0] / bf16[0] == pytest.approx(bf16_ms / ms)
        assert fp8[1] == f"{bf16[1]}; times {bf16_ms / ms:.2f} for fp8, measured on one H200 for d12 to d48"
        half = on(shape, "h200", **keys, precision__compute="fp8", precision__fp8_until=0.5).tok_s
        assert half[0] / bf16[0] == pytest.approx(bf16_ms / (bf16_ms / 2 + ms / 2))
    at_d48 = on("d48", "h200", batch__B=16, batch__recompute=2, precision__compute="fp8")
    assert at_d48.tok_s[0] == pytest.approx(131_072 / 1.654, rel=0.03)
    assert (
        on("d48", precision__compute="fp8", batch__B=16, batch__recompute=2).tok_s[1].startswith("modelled, from d48")
    )
    assert on("d24", "h200", precision__compute="fp8", precision__fp8="h.1.*").tok_s is None
    x12, x24, x36, x48 = 824.17 / 697.77, 618.1 / 457.1, 1243.8 / 891.3, 2325 / 1654
    shapes = (GPT2Config(L=30, C=1152), GPT2Config(L=42, C=1440), GPT2Config(L=96, C=3200), GPT2Config(L=18, C=900))
    gains = [fp8_gain(shape) for shape in shapes]
    assert x24 < gains[0] < x36 < gains[1] < x48 == gains[2]
    assert x12 < gains[3] < x24
    down = math.log((24 * 1024**2) / (12 * 768**2)), math.log((12 * 768**2) / (6 * 384**2))
    x6 = x12 - (x24 - x12) * down[1] / down[0]
    assert fp8_gain(GPT2Config(L=1, C=16)) == 0.5
    for shape, want in (("d12", x12), ("d6", x6), ("d24", x24)):
        p = on(shape, "h200", precision__compute="fp8")
        basis = (
            "assumed: d12 is the smallest that was measured" if shape == "d6" else "measured on one H200 for d12 to d48"
        )
        assert p.tok_s[1].endswith(f"; times {want:.2f} for fp8, {basis}")
        caplog.clear()
        _say_slow(p.config, torch.device("cuda"), "fp8")
        words = "fp8 may not be worth it: daybreak plan expects 0.90 times bf16's speed for so small a model"
        expected = [f"{words}, and 1.35 times for d24."] if want == x6 else []
        assert [r.getMessage() for r in caplog.records] == expected


@pytest.mark.parametrize("gpu", ["t4", "3060", "4070", "5090", "h100"])
def test_common_cards(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One without bf16 computes in fp32, and has no speed; those that nobody has run on say so."""
    p = on("d12", gpu, batch__B=4)
    assert p.compute == ("fp32" if gpu == "t4" else "bf16")
    assert (p.tok_s is None) == (gpu == "t4")
    assert main(["plan", "d12", "--gpu", gpu, "--batch.B", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fits               yes: ")
    assert (f"daybreak has not been run on {p.gpu} yet" in out) == (gpu != "h100")


def test_very_many_rows_are_planned_by_their_first_and_last_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same memory, entry by entry, as from all chunks; and no more calls for a million rows."""
    config = resolve("d6")[0].override({"batch.B": 700, "precision.compute": "bf16"})
    device = torch.device("cuda")
    short = fit_module.plan_memory(config, device, ())[0]
    many = fit_module.plan_memory(config.override({"batch.B": 1 << 17}), device, ())[0]
    assert len(many.calls) == len(short.calls) < 300
    monkeypatch.setattr(arena_module, "MAX_CHUNKS", 1 << 30)
    whole = fit_module.plan_memory(config, device, ())[0]
    assert len(whole.calls) > len(short.calls)
    placed = [[(e.name, e.offset, e.nbytes) for e in sorted(a.entries, key=lambda e: e.name)] for a in (short, whole)]
    assert placed[0] == placed[1]


def test_help_shows_no_flags_that_only_train_heeds(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("plan", "bench", "import", "train"):
        assert main([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert [flag in text for flag in ("--max-hours", "--profile")] == [verb == "train"] * 2, verb
        assert "--steps" in text


def test_tables_are_for_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--run.device", "cpu", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fits               yes: 318 MiB of ")
    assert re.search(r"^largest B +over 1,000  \[planned\]$", out, re.M)
    assert re.search(r"h\.\*\.fc +│ \(1024, 512\) float32 +│ +2 │", out)
    assert "What the memory holds" not in out


def test_the_table_of_buffers_lists_frozen_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--run.device", "cpu", "--lora.rank", "4", "--verbose"]) == 0
    frozen = 1152 * 128 + 128 * 128 + 2 * (12 * 128**2 + 13 * 128) + 2 * 128  # V of tiny, padded; max_T; L; C
    adapters = 2 * 4 * (4 * 128 + 2 * 128 + 5 * 128 + 5 * 128)
    out = capsys.readouterr().out
    assert re.search(rf"^│ frozen +│ weights that do not learn, .* │ +{frozen * 4 / MIB:.1f} │$", out, re.M)
    assert f"model              {frozen + adapters:,} parameters, {adapters:,} of them trained: gpt2 L=2" in out
