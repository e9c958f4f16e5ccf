"""Minutes and dollars to the capability of GPT-2 1.6B on 8 GPUs: measured step times, times published steps.

    python bench/bill.py ROWS.csv [--price 28]

The file is bill_step.py's; none is in the repository yet. Nothing is run here, and nothing was run on 8 GPUs. A step on
N GPUs, each with as many tokens as on 8, has three parts:

    compute   the micro-steps of one GPU alone, which is the slowest of those measured; it does not change with N
    update    a + b x the part of Muon's arithmetic that the busiest of N ranks has; a and b from 1 GPU and `many`
    exposed   all that is left of the step on `many` GPUs: exchange that nothing hides, and waiting for one another.
              It grows with (N - 1) / N, as what a ring sends does

`many` is 4 GPUs for a step on 8. From 1 and 2 GPUs the same model predicts the step on 4, beside the one measured.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from pathlib import Path

GPUS = 8
PRICE = 28.0  # dollars an hour for 8 H100: llm.c's post
MOST = 4  # GPUs measured


@dataclass(frozen=True)
class Recipe:
    """A published run: its name, depth, vocabulary, tokens for a parameter, and minutes on 8 H100 in fp8."""

    name: str
    L: int
    V: int
    ratio: float
    minutes: float

    def parameters(self, L: int) -> int:
        """Weights of the blocks' matrices and of the head at a depth, which nanochat's rules count."""
        C, gates = 64 * L, 12 * (L // 2) * (-(-L // 2))
        return 12 * L * C * C + gates + C * self.V

    @property
    def step_tokens(self) -> int:
        """Tokens a step: 2^19 of depth 12, and more with a power of the tokens in all, as a power of two."""
        return int(2 ** round(19 + 0.383 * math.log2(self.parameters(self.L) / self.parameters(12))))

    @property
    def steps(self) -> int:
        return int(self.ratio * self.parameters(self.L)) // self.step_tokens

    @property
    def weight_decay(self) -> float:
        """Of Muon."""
        more = math.sqrt(self.step_tokens / 2**19)
        return 0.28 * more * self.parameters(12) / self.parameters(self.L)


RECIPES = {
    "d24": Recipe("nanochat's merged recipe (a825e63), d24", 24, 32768, 8.0, 99.0),
    "d22": Recipe("nanochat's unmerged change #830, d22", 22, 49152, 9.4, 81.8),
    "toy": Recipe("a toy", 4, 256, 8.0, math.nan),
}


@dataclass(frozen=True)
class Row:
    """A measured step. share: of Muon's arithmetic, on the busiest of the ranks; share8: the same of 8 ranks."""

    ranks: int
    ms: float
    update_ms: float
    share: float
    share8: float
    tok_s: float
    mib: int
    card: str
    date: str
    commit: str


@dataclass(frozen=True)
class Step:
    """Milliseconds of the parts of a step."""

    compute: float
    update: float
    exposed: float

    @property
    def ms(self) -> float:
        return self.compute + self.update + self.exposed


def modelled(one: Row, many: Row, ranks: int, share: float) -> Step:
    """The step on `ranks` GPUs, by the model at the top of this file."""
    compute = one.ms - one.update_ms
    b = (one.update_ms - many.update_ms) / (one.share - many.share)
    exposed = max(0.0, many.ms - compute - many.update_ms)
    grown = (1 - 1 / ranks) / (1 - 1 / many.ranks)
    return Step(compute, one.update_ms - b * (one.share - share), exposed * grown)


def minutes(recipe: Recipe, ms: float) -> float:
    """Of all steps of a recipe."""
    return recipe.steps * ms / 60e3


def read(path: Path) -> dict[tuple[str, str], dict[int, Row]]:
    """(recipe, precision) -> ranks -> the last row of the file for these."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    with path.open(newline="") as file:
        for r in csv.DictReader(file):
            row = Row(int(r["ranks"]), *(float(r[key]) for key in ("ms", "update_ms", "share", "share8", "tok_s")),
                      int(r["mib"]), r["card"], r["date"], r["commit"])  # fmt: skip
            found.setdefault((r["recipe"], r["precision"]), {})[row.ranks] = row
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def bill(rows: dict[tuple[str, str], dict[int, Row]], price: float) -> str:
    """The tables, and what they rest on."""
    bills, checks, steps, lacking = [], [], [], []
    for (name, precision), by in rows.items():
        recipe, one, many = RECIPES[name], by.get(1), by[max(by)]
        for ranks, r in sorted(by.items()):
            steps.append([recipe.name, precision, f"{ranks}", f"{r.ms:,.1f}", f"{r.update_ms:.1f}",
                          f"{r.tok_s / ranks:,.0f}", f"{r.mib:,}"])  # fmt: skip
        if one is None or many.ranks == 1:
            lacking.append(f"No bill of {recipe.name} in {precision}: it needs rows of 1 and of 2 or {MOST} GPUs.")
            continue
        eight = modelled(one, many, GPUS, many.share8)
        time = minutes(recipe, eight.ms)
        bills.append([recipe.name, precision, f"{recipe.steps:,}", f"{one.ms:,.1f}", f"{many.ms:,.1f} on {many.ranks}",
                      f"{eight.ms:,.1f}", f"{eight.update:.1f}, {eight.exposed:.1f}", f"{time:.1f}",
                      f"{price * time / 60:.2f}", f"{recipe.minutes:.1f}"])  # fmt: skip
        if 2 in by and MOST in by:
            said = modelled(one, by[2], MOST, by[MOST].share).ms
            checks.append([recipe.name, precision, f"{said:,.1f}", f"{by[MOST].ms:,.1f}",
                           f"{100 * (said / by[MOST].ms - 1):+.2f} %"])  # fmt: skip
    every = [row for by in rows.values() for row in by.values()]
    named = zip(*((row.card, row.date, row.commit[:7]) for row in every), strict=True)
    cards, days, commits = (", ".join(sorted({*of})) for of in named)
    head = ["recipe", "precision", "steps, published rule", "ms on 1 GPU, measured", "ms, measured",
            f"ms on {GPUS}, modelled", "of these update, exposed", "minutes, modelled", "dollars, modelled",
            "minutes in fp8 on 8 H100, published"]  # fmt: skip
    other = ("Nothing was run on an H100. An H200 has an H100's arithmetic and 1.4 times its memory bandwidth, so an "
             "H100 takes longer for what memory limits; no figure here is corrected for that. ")  # fmt: skip
    check = ["recipe", "precision", f"ms on {MOST}, modelled from 1 and 2", "measured", "model / measured"]
    found = [
        *([table(head, bills)] if bills else []),
        *([table(check, checks)] if checks else []),
        table(["recipe", "precision", "GPUs", "ms a step, measured", "of it update", "tokens a second and GPU",
               "MiB, the driver's"], steps),
        *lacking,
        f"Measured on {cards}, {days}, commit {commits}. {price:g} dollars an hour for {GPUS} GPUs.",
        f"Nothing was run on {GPUS} GPUs. {other if 'H100' not in cards else ''}The "
        "steps are those after which nanochat's own runs reached the score, as published. That ours reaches it after "
        "as many is assumed. daybreak has fp8 in the blocks alone, and lacks #830's learned gains of norms.",
    ]  # fmt: skip
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--price", type=float, default=PRICE, help="dollars an hour for 8 GPUs")
    a = parser.parse_args()
    if not a.rows.is_file():
        parser.error(f"{a.rows} is no file; bench/bill_step.py writes one")
    print(bill(read(a.rows), a.price))


if __name__ == "__main__":
    main()
