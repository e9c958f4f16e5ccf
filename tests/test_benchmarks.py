"""README's and the benchmark page's figures are those of the files in bench/results, and of `plan`."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import pytest

from daybreak.config import resolve
from daybreak.report.plan import figures, plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
README, BENCHMARKS, FAMILIES, GENERATION, MODERN = (
    (ROOT / name).read_text()
    for name in ("README.md", *(f"docs/{page}.md" for page in ("benchmarks", "families", "generation", "modern")))
)
SHAPES = {"d48": "GPT-2 1558M (d48)", "d12": "GPT-2 124M (d12)"}
MISSING = "not measured"
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    return list(csv.DictReader((RESULTS / name).open()))


def others_table() -> str:
    """Whole steps of daybreak, llm.c and torch.compile, sitting by sitting."""
    text = "| model | tokens a step | recompute | sitting | system | tokens per second | ms a step | memory, MiB |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    for r in sorted(read("beside_others.csv"), key=lambda r: (r["model"] == "d12", -int(r["tokens"]), r["date"])):
        ms = f"{float(r['ms']):,.1f}".removesuffix(".0") if r["ms"] else MISSING
        memory = f"{int(r['memory_mib']):,}" if r["memory_mib"] else MISSING
        text += f"| {SHAPES[r['model']]}, B = {r['B']} | {int(r['tokens']):,} | {r['recompute'] or 'not noted'} | "
        text += f"{r['date']} | {r['system']} "
        text += f"{r['version']} | {int(r['tok_s']):,} | {ms} | {memory} |\n"
    return text


def gpu_table() -> str:
    """Our settings on one H100: the latest row of each."""
    text = "| model | recompute | tokens per second | MFU | beside matmul and attention alone | memory, MiB | commit |"
    text += "\n|---|---|---|---|---|---|---|\n"
    latest = {(r["model"], int(r["B"]), r["recompute"], r["tokens"]): r for r in read("gpu_step.csv")
              if r["masters"] == "auto"}  # fmt: skip
    for (model, B, recompute, tokens), r in sorted(latest.items(), key=lambda x: (x[0][0] == "d12", x[0][:3])):
        text += f"| {SHAPES[model]}, B = {B}, {int(tokens):,} tokens a step | {recompute} | {int(r['tok_s']):,} | "
        ratio = f"{float(r['ratio']):.3f}" if r["ratio"] else MISSING
        text += f"{100 * float(r['mfu']):.1f} % | {ratio} | "
        text += f"{int(r['memory_mib']):,} | {r['commit']} |\n"
    return text


def decoder_table() -> str:
    """Whole steps of decoder models, beside transformers. It stands on the family's page."""
    text = "| model | tokens a step | system | weights and moments | GPU | tokens per second | memory, MiB |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for r in sorted(read("decoder_step.csv"), key=lambda r: (r["model"], -int(r["tok_s"]))):
        text += f"| {r['model']}, B = {r['B']}, T = {int(r['T']):,} | {int(r['tokens']):,} | "
        text += f"{r['system']} {r['version']} | {r['precision']} | {r['card'].split()[1]} | "
        text += f"{int(r['tok_s']):,} | {int(r['memory_mib']):,} |\n"
    return text


def spread(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.2f} ({low:.2f} .. {high:.2f})"


def seconds(rows: Rows, **which: str) -> list[float]:
    return [float(r["seconds"]) for r in rows if all(r[k] == v for k, v in which.items())]


def cpu_table() -> str:
    """daybreak beside eager torch on the CPUs that were at hand."""
    names = {"cpu_step_amd_epyc_avx512.csv": "AMD EPYC, AVX-512", "cpu_step_amd_epyc.csv": "AMD EPYC, AVX2",
             "cpu_step_intel_xeon.csv": "Intel Xeon, AMX", "cpu_step_intel_xeon_2.csv": "Intel Xeon, AMX, second run",
             "cpu_step_intel_xeon_3.csv": "Intel Xeon, no AMX"}  # fmt: skip
    text = "| CPU, commit | dtype | daybreak, s | eager, s | eager / daybreak | matmuls alone, s |\n"
    text += "|---|---|---|---|---|---|\n"
    for name, cpu in names.items():
        rows = read(name)
        kinds = dict.fromkeys((r["dtype"], r["contender"]) for r in rows if r["contender"].startswith("eager"))
        for dtype, eager in kinds:
            ours, theirs = (seconds(rows, dtype=dtype, contender=who) for who in ("daybreak", eager))
            floor = median(seconds(rows, dtype=dtype, contender="matrix products alone"))
            ratio = spread([b / a for a, b in zip(ours, theirs, strict=True)])
            what = dtype + eager.removeprefix("eager").replace(",", "; eager:").replace("cast to bf16", "all bf16")
            text += f"| {cpu}, {rows[0]['commit']} | {what} | {spread(ours)} | {spread(theirs)} | {ratio} | "
            text += f"{floor:.2f} |\n"
    return text


def generate_table() -> str:
    """daybreak beside transformers, generating on the CPU."""
    rows, text = read("generate_speed_amd_epyc.csv"), "| sequences x (prompt + new tokens) | daybreak, s | "
    text += "transformers, s | transformers / daybreak | reading the weights, s |\n|---|---|---|---|---|\n"
    for what in dict.fromkeys(r["texts x prompt + tokens"] for r in rows):
        ours, theirs, floor = (
            [float(r["seconds"]) for r in rows if r["texts x prompt + tokens"] == what and r["contender"] == who]
            for who in ("daybreak", "transformers", "reading the weights")
        )
        ratio = spread([b / a for a, b in zip(ours, theirs, strict=True)])
        text += f"| {what.replace('x ', 'x (')}) | {spread(ours)} | {spread(theirs)} | {ratio} | "
        text += f"{median(floor):.2f} |\n"
    return text


CURVES = ("nanochat seed 1", "nanochat seed 2", "daybreak, scalars in fp32, from seed 1's weights")


def curve(of: str, what: str) -> dict[int, float]:
    """Values of a run by step: its training loss, or its validation bpb."""
    return {int(r["step"]): float(x) for r in read("nanochat_curve_h200.csv") if (x := r[f"{of}, {what}"])}


def losses_at(step: int) -> list[float]:
    """Each run's mean training loss of the 50 steps up to this one."""
    return [fmean(curve(of, "training loss")[n] for n in range(step - 49, step + 1)) for of in CURVES]


def bits_at(step: int) -> list[float]:
    """Each run's validation bits per byte."""
    return [curve(of, "validation bpb")[step] for of in CURVES]


def curve_table() -> str:
    """nanochat's losses and ours: means of the 50 steps up to a validation, and its bits per byte."""
    text = "| step | training loss, seed 1 | seed 2 | daybreak | validation bpb, seed 1 | seed 2 | daybreak |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for step in (50, 100, 200, 300, 382):
        values = [f"{x:.3f}" for x in losses_at(step) + bits_at(step)]
        text += f"| {' | '.join((str(step), *values))} |\n"
    return text


ONCE, FUSED = "daybreak, stream rounded once", "daybreak with ReLU^2 in the epilogues"
WIDE = "daybreak, scalars in fp32"


def nanochat_speeds() -> dict[tuple[str, str], dict[str, str]]:
    """The median round of each program in each pair of programs, from the newest GPU on."""
    groups: dict[tuple[str, str], Rows] = {}
    for r in sorted(read("nanochat_speed_h200.csv"), key=lambda r: int(r["tok_s"])):
        groups.setdefault((r["pair"], r["program"]), []).append(r)
    return {key: rows[len(rows) // 2] for key, rows in groups.items()}


def nanochat_table() -> str:
    """Both programs' speeds, with a letter for the GPU of each pair in place of its sitting."""
    text = "| system | B | tokens per second | ms a step | memory, MiB | GPU, day | commit |\n"
    text += "|---|---|---|---|---|---|---|\n"
    speeds = nanochat_speeds()
    for gpu, pair, program in (("A", "4", ONCE), ("A", "4", "nanochat"), ("B", "6", WIDE), ("C", "2", "nanochat")):
        r = speeds[pair, program]
        commit = r["nanochat's commit"] if program == "nanochat" else r["commit"]
        memory = f"{int(r['memory_mib']):,}" if r["memory_mib"] else MISSING
        system = program if r["attention"] == "FlashAttention-4" else f"{program}, {r['attention']}"
        text += f"| {system} | {r['B']} | {int(r['tok_s']):,} | "
        text += f"{1000 * float(r['seconds']) / int(r['steps']):,.1f} | {memory} | {gpu}, {r['date']} | {commit} |\n"
    return text


PAGES = {"decoder_table": FAMILIES, "generate_table": GENERATION}


@pytest.mark.parametrize(
    "table",
    [others_table, gpu_table, decoder_table, cpu_table, generate_table, curve_table, nanochat_table],
    ids=lambda t: t.__name__,
)
def test_tables_are_those_of_the_results(table: Any) -> None:
    """On a difference: paste what the assertion prints."""
    assert table() in PAGES.get(table.__name__, BENCHMARKS), "\n" + table()


def test_nanochat_s_curve_is_that_of_the_results() -> None:
    """The page's table, and that losses are within the distance of two seeds in every stretch."""
    page, notes = " ".join(MODERN.split()), (ROOT / "bench/NOTES-nanochat.md").read_text()
    first, second, ours = (curve(of, "training loss") for of in CURVES)
    assert max(first) == max(second) == max(ours) == 382
    far = [fmean(abs(run[n] - first[n]) for n in first) for run in (ours, second)]
    assert "| training loss, distance from seed 1's, mean of 382 steps | {:.4f} | {:.4f} |".format(*far) in page
    stretches = {
        (11, 50): "steps 11 to 50",
        (51, 100): "",
        (101, 200): "",
        (201, 332): "",
        (333, 382): "the last 50 steps",
    }
    gaps = {}
    for (start, end), said in stretches.items():
        gap, spread = gaps[end] = [fmean(run[n] - first[n] for n in range(start, end + 1)) for run in (ours, second)]
        assert abs(gap) < abs(spread)
        assert not said or f"| mean training loss of {said}, less seed 1's | {gap:+.4f} | {spread:+.4f} |" in page
    assert f"The first ten agree to {max(abs(ours[n] - first[n]) for n in range(1, 11)):.4f}." in page

    base, other, bits = (curve(of, "validation bpb") for of in CURVES)
    end = f"| bits per byte on other text at the end, less seed 1's | {bits[382] - base[382]:+.4f} | "
    assert f"{end}{other[382] - base[382]:+.4f} |" in page
    more = [abs(bits[n] - base[n]) - abs(other[n] - base[n]) for n in base if n]
    assert f"At {sum(x > 0 for x in more)} of {len(more)} validations they differ more" in page
    assert max(more) < 0.001
    assert more[-1] < 0

    once = curve("daybreak, stream rounded once, from seed 1's weights", "training loss")
    for run, said in ((once, "stream rounded once"), (ours, "scalars in fp32"), (second, "seed 2")):
        gap = [fmean(run[n] - first[n] for n in range(start, end + 1)) for start, end in ((9, 9), (10, 10), *stretches)]
        assert f"| {said} | {' | '.join(f'{x:+.4f}' for x in gap)} |" in notes
    for run, said in ((bits, "scalars in fp32"), (other, "seed 2")):
        assert f"| {said} | {' | '.join(f'{run[n] - base[n]:+.4f}' for n in base if n)} |" in notes
    changes = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    ours_gap, seeds_gap = gaps[382]
    old_gap = fmean(once[n] - first[n] for n in range(333, 383))
    after = f"Validation at the end is {bits[382] - base[382]:.4f} bits per byte higher"
    words = f"is {-ours_gap:.4f} below nanochat's instead of {-old_gap:.3f}, and two seeds of nanochat differ by"
    assert f"{words} {seeds_gap:.3f}. {after}" in changes


def test_nanochat_s_losses_on_a_cpu_are_those_of_the_results() -> None:
    page, notes = (" ".join(text.split()) for text in (MODERN, (ROOT / "bench/NOTES-nanochat.md").read_text()))
    held = [[float(r[f"scalars held, {of} bf16"]) for r in read("nanochat_rounding_cpu.csv")[:60]] for of in
            ("nanochat, all in", "daybreak,")]  # fmt: skip
    apart = max(abs(a - b) for a, b in zip(*held, strict=True))
    assert f"of 60 steps. The two in bf16 agree to {apart:.4f}." in notes

    exact, one, two, three = (
        max(float(r["difference"]) for r in read("nanochat_parity.csv")
            if (r["depth"], r["precision"], r["nanochat's 1e-6"], r["seed"]) == (depth, precision, eps, seed))
        for depth, precision, eps, seed in (("4", "fp64", "removed", "1"), ("4", "fp32", "kept", "1"),
                                            ("2", "fp32", "kept", "1"), ("4", "fp32", "kept", "2"))
    )  # fmt: skip
    assert f"nanochat's own losses to {exact:.0e}, and its weights".replace("e-0", "e-") in page
    words = f"drift apart by at most {one:.3f}, {two:.3f} and {three:.3f} in the steps of"
    assert f"{words} `bench/results/nanochat_parity.csv`" in page


def test_what_parts_nanochat_s_losses_on_a_cpu() -> None:
    """The table of the notes, and the means that the page gives, from the losses of each run at step 9."""
    row = read("nanochat_scalars_cpu.csv")[8]
    apart = {
        name: float(x) - float(row[f"nanochat, {name.rpartition(', ')[2]}"])
        for name, x in row.items()
        if name != "step"
    }
    notes = (ROOT / "bench/NOTES-nanochat.md").read_text()
    shown = {"nanochat, B = 4": "nanochat, B = 4", "nanochat, stream x 1.003": "nanochat, its stream 0.3 % longer"}
    shown |= {f"daybreak {commit}": f"daybreak {commit}" for commit in ("0c0fa74", "225107a")}
    for run, said in (shown | {"daybreak 225107a, scalars in fp32": "the same, scalars read in fp32"}).items():
        cells = [f"{apart[key]:+.4f}" if (key := f"{run}, seed {n}") in apart else "" for n in (1, 2, 3)]
        assert " ".join(f"| {said} | {' | '.join(cells)} |".split()) in notes
    mended = {"daybreak 225107a": "daybreak 225107a", "daybreak d0c4cf8": "daybreak d0c4cf8, scalars in fp32"}
    mended |= {
        "daybreak 245f4d8": "daybreak 245f4d8, backout too",
        "nanochat, stream x 1.003": shown["nanochat, stream x 1.003"],
    }
    distance = {run: sum(abs(apart[f"{run}, seed {n}"]) for n in (1, 2, 3)) / 3 for run in mended}
    for run, said in mended.items():
        cells = [f"{apart[f'{run}, seed {n}']:+.4f}" for n in (1, 2, 3)]
        assert f"| {said} | {' | '.join(cells)} | {distance[run]:.4f} |" in notes
    means = [distance[f"daybreak {commit}"] for commit in ("245f4d8", "225107a", "d0c4cf8")]
    words = "at step 9 are {:.3f} from nanochat's instead of {:.3f}, and {:.3f} without the second change".format(
        *means
    )
    assert words in " ".join((ROOT / "CHANGELOG.md").read_text().split())


def test_nanochat_s_speed_is_that_of_the_results() -> None:
    page, speeds = " ".join(MODERN.split()), nanochat_speeds()
    ours, theirs, sdpa = (int(speeds[key]["tok_s"]) for key in (("4", ONCE), ("4", "nanochat"), ("2", "nanochat")))
    assert f"daybreak trained {round(ours / 1000)},000 tokens per second" in page
    assert f"and nanochat {round(theirs / 1000)},000" in page
    assert f"nanochat reached {round(sdpa / 1000)},000" in page
    assert f"That is {ours / theirs:.2f} times as fast" in page
    wide, once, before = speeds["6", WIDE], speeds["5", ONCE], speeds["5", FUSED]
    assert f"daybreak trained {round(int(wide['tok_s']) / 1000)},000 on another H200" in page
    turns = int(speeds["3", FUSED]["tok_s"]) / int(speeds["3", "nanochat"]["tok_s"])
    notes = " ".join((ROOT / "bench/NOTES-nanochat.md").read_text().split())
    assert f"this change was {turns:.3f} times as fast as nanochat (pair 3" in notes
    assert f"have a median of {1000 * float(wide['seconds']):.1f} ms" in notes

    theirs_mib = speeds["1", "nanochat"]["memory_mib"]
    mib = f"{int(wide['memory_mib']):,} MiB for daybreak with 64 rows, and {int(theirs_mib):,} for nanochat with 32"
    assert mib in page
    assert once["memory_mib"] == speeds["4", ONCE]["memory_mib"]
    ms = [f"{1000 * float(r['seconds']):.0f}" for r in (once, before)]
    changes = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    assert f"MiB instead of {int(before['memory_mib']):,}, and a step takes {ms[0]} ms instead of {ms[1]}" in changes
    assert f"with 64 rows needs {int(wide['memory_mib']) - int(once['memory_mib'])} MiB more" in changes
    newest = {(r["op"], r["note"]): float(r["percent"]) for r in read("nanochat_kernels_h200.csv")}
    rates = list(newest.values())
    operations = (ROOT / "docs/operations.md").read_text()
    assert f"reach {min(rates):.0f} to {max(rates):.0f} % of the speed of a copy" in operations
    rows = read("nanochat_speed_h200.csv")
    assert {r["nanochat's commit"] for r in rows} == {"92d63d4"}
    assert "(nanochat 92d63d4, torch 2.11)" in BENCHMARKS
    assert {r["torch"] for r in rows} == {"2.11.0+cu130"}


def beside(model: str, other: str) -> tuple[dict[str, str], dict[str, str], bool]:
    """daybreak's row and the other's at the larger batch: of the newest sitting that has both, else the newest of each.

    The last value says whether they are of one sitting.
    """
    rows = [r for r in read("beside_others.csv") if r["model"] == model and int(r["tokens"]) > 100_000]
    ours, theirs = ([r for r in rows if r["system"].startswith(who)] for who in ("daybreak", other))  # by date
    pairs = [(a, b) for a in ours for b in theirs if a["sitting"] == b["sitting"]]
    return (*pairs[-1], True) if pairs else (ours[-1], theirs[-1], False)


def test_the_speeds_that_are_compared_are_of_one_sitting() -> None:
    """The comparison's table, in thousands. Only one of its pairs is of different days, and says so."""
    comparison = (ROOT / "docs/comparison.md").read_text()
    for model, name in (("d48", "GPT-2 1.6B"), ("d12", "GPT-2 124M")):
        for other, words in (("llm.c", "beside llm.c"), ("torch", "beside `torch.compile`")):
            ours, theirs, same = beside(model, other)
            if not same:
                assert "train_gpt2.py" in theirs["system"]
                words = f"beside llm.c's PyTorch script (B = {theirs['B']}, another day)"
            speeds = " | ".join(f"{int(r['tok_s']) / 1000:.0f}" for r in (ours, theirs))
            assert f"| {name}, {words} | {speeds} |" in comparison


def test_the_speeds_of_readme() -> None:
    """In thousands. Where daybreak had another speed beside each of the others, the lower one stands there."""

    def thousands(*rates: str) -> str:
        return " | ".join(f"{float(rate) / 1000:.0f}" for rate in rates)

    llmc, torch = (beside("d12", other)[:2] for other in ("llm.c", "torch"))
    ours = min(llmc[0]["tok_s"], torch[0]["tok_s"], key=int)
    large = [r["tok_s"] for r in beside("d48", "llm.c")[:2]]
    qwen = [r for r in read("decoder_step.csv") if r["model"] == "qwen2.5-1.5b" and r["card"] == "NVIDIA H200"]
    pair = [
        [r["tok_s"] for r in qwen if r["system"].split(" (")[0] == name][-1]
        for name in ("daybreak", "transformers + Liger")
    ]
    fp8 = re.findall(r"medians bf16 .* fp8 .* ms (\d+) tok/s; driver", (RESULTS / "fp8_h200.txt").read_text())
    lora = re.findall(r"llama3-8b, lora, B 4, recompute 1: .* (\d+) tok/s", (RESULTS / "finetune_h200.txt").read_text())
    peft = re.findall(r"PEFT \+ Liger, B 4: .* (\d+) tok/s", (RESULTS / "finetune_h200.txt").read_text())[0]
    for row in (
        f"| GPT-2 1.6B | {thousands(*large)} | |",
        f"| the same in `fp8` | {thousands(fp8[1])}* | | |",
        f"| GPT-2 124M | {thousands(ours, llmc[1]['tok_s'], torch[1]['tok_s'])} |",
        f"| Qwen2.5-1.5B | {thousands(pair[0])}* | | {thousands(pair[1])}* |",
        f"| LoRA on Llama-3-8B | {thousands(lora[-1])}* | | {thousands(peft)}* |",  # a star: of an H200
    ):
        assert row in README, row


def test_readme_s_ratios_are_of_one_sitting() -> None:
    for model, other, low, high, words in (
        ("d48", "llm.c", 1.08, 1.13, "the 1.6B model trains a tenth faster than llm.c"),
        ("d12", "torch", 1.22, 1.28, "and 124M a quarter faster than `torch.compile`"),
    ):
        ours, theirs, same = beside(model, other)
        assert same
        assert low < int(ours["tok_s"]) / int(theirs["tok_s"]) < high
        assert words in " ".join(README.split())


def test_the_headline_is_what_plan_says() -> None:
    config = resolve("gpt2-1558M")[0].override({"cost.price": 28.0})
    said = {what: value for what, value, _ in figures(plan(config, gpu="h100", gpus=8))}
    hours = re.fullmatch(r"(\d+)h(\d+)m", said["time"])
    assert hours
    dollars = float(said["cost"].strip("$").replace(",", ""))
    headline = re.search(r"about (\d+) hours and \$(\d+) on the same\s+node", README)
    assert headline
    assert round(int(hours[1]) + int(hours[2]) / 60) == int(headline[1])
    assert abs(dollars - int(headline[2])) < 5


def test_readme_s_other_figures() -> None:
    speeds = {r["what"]: r["value"] for r in read("multi_gpu.csv")}
    worst = min(float(speeds[f"{model} ratio of 4"]) for model in ("d12", "d48"))
    assert f"at\nleast {100 * worst:.0f} %" in README or f"at least {100 * worst:.0f} %" in README
    kills = {r["figure"]: r["value"] for r in read("recovery.csv")}
    assert f"{kills['kills at random moments']} random moments" in README
    assert "[one short file](daybreak/models/gpt2.py)" in README
    assert len((ROOT / "daybreak/models/gpt2.py").read_text().splitlines()) < 200
