"""The drawings of the course's later chapters, from 11 on; learn_pictures.py writes them."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from learn_drawing import line, picture, rect, text

from daybreak.config_keys import OptimConfig, ScheduleConfig
from daybreak.engine import EngineSpec, plan_engine
from daybreak.engine.arena import ALIGN, _place
from daybreak.images.scenes import scenes
from daybreak.shapes import GPT2Config
from daybreak.training.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]


def rounding() -> str:
    """The numbers with 3 bits of mantissa from 1 to 20, some numbers between them that are rounded, and a lost 1."""
    toy = [2**e * (1 + i / 8) for e in range(5) for i in range(8)]
    rows: list[tuple[str, float, float, Sequence[float], Sequence[tuple[float, float, str]]]] = [
        ("all numbers from 1 to 20", 1, 20, (1, 2, 4, 8, 16, 20), ()),
        ("from 2 to 4", 2, 4, [x for x in toy if 2 <= x <= 4],
         ((2.6, 2.5, "a"), (2.875, 3, "c"), (3.2, 3.25, "a"), (3.625, 3.5, "c"))),
        ("from 12 to 20: 16 + 1 is 16", 12, 20, [x for x in toy if 12 <= x <= 20], ((17, 16, "c"),)),
    ]  # fmt: skip
    parts, y = [], 0.0
    for title, low, high, named, moved in rows:
        unit, y = 504 / (high - low), y + (98 if moved else 62)
        at = {x: 28 + (x - low) * unit for x in [*toy, *(x for x, *_ in moved)]}
        parts += [text(28, y - (66 if moved else 24), title, "s"), line((at[low], y), (at[high], y))]
        parts += [line((at[x], y - 7), (at[x], y + 7)) for x in toy if low <= x <= high]
        parts += [text(at[x], y + 25, f"{x:g}", "m s") for x in named]
        for x, near, kind in moved:
            parts.append(f'<path class="{kind}" stroke-width="2.5" d="M{at[x]:g} {y - 28:g}L{at[near]:g} {y - 10:g}"/>')
            parts.append(f'<circle class="{kind}" cx="{at[x]:g}" cy="{y - 28:g}" r="4"/>')
            parts.append(text(at[x], y - 40, f"{x:g}", "m s"))
        y += 40
    for x, kind, said in ((28, "a", "to the nearest"), (178, "c", "in the middle: to the even one")):
        parts.append(f'<circle class="{kind}" cx="{x + 4}" cy="{y + 6:g}" r="4"/>' + text(x + 16, y + 11, said, "s"))
    return picture(y + 28, "Numbers with 3 bits of mantissa, and numbers between them that are rounded", parts)


def formats() -> str:
    """The bits of 1 + 33,556 / 2^23 in fp32, its two halves, and in fp16."""
    word = 0x3F800000 + 33556
    half = (word + 0x8000) >> 16
    rows = [
        ("fp32: the exact weight", f"{word:032b}", 0, (1, 9)),
        ("bf16: the weight", f"{half:016b}", 0, (1, 9)),
        ("16 more bits: the units it lacks", f"{word & 0xFFFF:016b}", 16, (0, 0)),
        ("fp16: the same weight", "0" + f"{15:05b}" + f"{round(33556 / 2**13):010b}", 0, (1, 6)),
    ]
    parts, size, left, y = [], 16, 24, 22.0
    for title, bits, first, (sign, exponent) in rows:
        if first:
            y -= 54
        parts.append(text(left + first * size, y + 8, title, "s"))
        for i, bit in enumerate(bits):
            kind = "c" if i < sign else "a" if i < exponent else "b" if first == 0 else "box"
            parts.append(rect(left + (first + i) * size, y + 16, size - 1, 24, kind, corner=2))
            parts.append(text(left + (first + i) * size + 7.5, y + 33, bit, "m s"))
        y += 54
    for x, kind, said in ((24, "c", "sign"), (94, "a", "exponent"), (194, "b", "mantissa"), (294, "box", "an int16")):
        parts.append(rect(x, y + 8, 12, 12, kind, corner=2) + text(x + 18, y + 19, said, "s"))
    return picture(y + 34, "The bits of 1.004 in fp32, in bf16 with 16 more bits, and in fp16", parts)


Lives = dict[str, tuple[int, int, int]]  # of each tensor: its size, the first call and the last


def packing() -> str:
    """The example with five tensors: each with bytes of its own, and where the engine's function puts them."""
    lives: Lives = {"x": (2, 0, 5), "h": (4, 1, 4), "y": (3, 2, 3), "dy": (3, 3, 4), "dh": (4, 4, 5)}
    tensors = {n: torch.empty(size * ALIGN, dtype=torch.uint8, device="meta") for n, (size, *_) in lives.items()}
    spans = {name: (first, last) for name, (_, first, last) in lives.items()}
    packed = {e.name: e.offset // ALIGN for e in _place(tensors, [spans])}
    alone = dict(zip(lives, accumulate([0, *(size for size, *_ in lives.values())]), strict=False))
    parts, unit, wide, top = [], 20, 37, 66
    for left, title, offsets in ((40, "each has its own place", alone), (320, "largest first", packed)):
        end = max(offsets[name] + size for name, (size, *_) in lives.items())
        parts.append(text(left + 3 * wide, 28, f"{title}: {end}", "m"))
        parts += [text(left + (i + 0.5) * wide, top - 8, f"{i}", "m s") for i in range(6)]
        parts.append(line((left - 4, top + 16 * unit), (left - 4, top), (left + 6 * wide, top)))
        for (name, (size, first, last)), kind in zip(lives.items(), "aaacc", strict=True):
            x, y, width = left + first * wide, top + offsets[name] * unit, (last - first + 1) * wide - 2
            parts.append(rect(x, y + 1, width, size * unit - 2, kind, name))
        parts += [text(left - 10, top + i * unit + 5, f"{i}", "e s") for i in (0, 4, 8, 12, 16)]
    label = "Five tensors as boxes, as wide as their lives: 16 numbers without sharing, and 13 with it"
    return picture(top + 16 * unit + 18, label, parts)


def memory() -> str:
    """The plan of a model with one block: every activation but statistics, by its calls and its bytes."""
    spec = EngineSpec(GPT2Config(L=1, C=64, NH=1, V=128, max_T=64), B=1, T=64)
    arena = plan_engine(spec)[2]
    rows = [e for e in arena.entries if e.buffer == "activations" and e.padded > ALIGN]
    unit, wide, left, top = 16 / (64 * 64 * 4), 18, 30, 64
    bottom = top + max(e.offset + e.padded for e in rows) * unit
    head, back = (next(i for i, c in enumerate(arena.calls) if c.name == n) for n in ("classifier", "loss_sum"))
    starts, end = (0, head - 1, back + 1), max(e.last for e in rows) + 1
    parts = []
    for name, first, last in zip(("forward", "head", "backward"), starts, (*starts[1:], end), strict=True):
        parts.append(text(left + (first + last) / 2 * wide, 26, name, "m"))
        parts += [line((left + first * wide, 36), (left + first * wide, bottom))] if first else []
    parts += [text(left + (i + 0.5) * wide, top - 10, f"{i}", "m s") for i in range(0, end, 3)]
    for e in rows:
        name, x, y = e.name.removeprefix("h.0."), left + e.first * wide, top + e.offset * unit
        box = rect(x + 1, y + 1, (e.last - e.first + 1) * wide - 2, e.padded * unit - 2, "ac"[name[:2] == "d_"])
        below = e.last - e.first < 2  # a box that is too narrow for its name
        middle = y + e.padded * unit + 12 if below else y + e.padded * unit / 2 + 4.5
        parts.append(box + text(x + (0 if below else 4), middle, name, "s"))
    label = "All activations of a model with one block: from left to right the calls, from top to bottom the bytes"
    return picture(bottom + 16, label, parts)


def measured(operation: str, note: str, backend: str) -> tuple[float, float]:
    """TB/s and TFLOP/s (0: not counted) of an operation of the large GPT-2 on an H100."""
    for row in csv.DictReader((ROOT / "bench/results/kernels.csv").open()):
        if (row["op"], row["note"], row["backend"], row["shape"]) == (operation, note, backend, "d48"):
            return float(row["TB/s"]), float(row["TFLOP/s"] or 0)
    raise LookupError(operation)


def roofline() -> str:
    """Measured operations of the large GPT-2 below the limits of one H100, on axes of powers of ten."""
    left, right, top, bottom, byte_rate, flop_rate = 62, 520, 56, 330, 2.977, 789.0

    def place(intensity: float, speed: float) -> tuple[float, float]:
        x = left + (right - left) * math.log(intensity / 0.3) / math.log(3000 / 0.3)
        return round(x, 1), round(bottom - (bottom - top) * math.log(speed) / math.log(1200), 1)

    parts = [text(left, 28, "trillion FLOPs per second"), text(right, 372, "FLOPs for each byte", "e")]
    for speed in (1, 10, 100, 1000):
        y = place(1, speed)[1]
        parts += [text(left - 8, y + 5, f"{speed:,}", "e s"), line((left, y), (left + 6, y))]
    for intensity in (1, 10, 100, 1000):
        x = place(intensity, 1)[0]
        parts += [text(x, bottom + 20, f"{intensity:,}", "m s"), line((x, bottom), (x, bottom - 6))]
    parts.append(line((left, top), (left, bottom), (right, bottom)))
    corner = flop_rate / byte_rate
    roof = [place(1 / byte_rate, 1), place(corner, flop_rate), place(3000, flop_rate)]
    d = "L".join(f"{x:g} {y:g}" for x, y in roof)
    parts.append(f'<path class="c" style="fill:none;stroke-width:2.5" d="M{d}"/>')
    parts.append(text(*place(4.2, 45), "bytes limit", "e s") + text(place(900, 1)[0], top - 4, "FLOPs limit", "m s"))
    points = [  # its name, FLOPs for each byte where they are not counted, and how far below the name stands
        ("AdamW", "adamw_update", "split masters", "triton", 14 / 26, 0),
        ("layernorm", "layernorm_forward", "", "triton", 8 / 4, 0),
        ("head, 1 token", "matmul_decode", "head, one row", "triton", 1, 0),
        ("attention, forward", "attention_forward", "", "cudnn", 0, 104),
        ("attention, backward", "attention_backward", "", "fa4", 0, 70),
        ("attproj", "matmul_forward", "attproj", "quack", 0, 80),
        ("fc, GELU", "matmul_gelu_forward", "fc", "quack", 0, 62),
        ("qkv", "matmul_forward", "qkv", "quack", 0, 40),
    ]
    for name, operation, note, backend, intensity, down in points:
        moved, speed = measured(operation, note, backend)
        intensity, speed = (intensity, intensity * moved) if intensity else (speed / moved, speed)
        x, y = place(intensity, speed)
        parts += [line((x, y), (x, y + down))] if down else []
        parts.append(f'<circle class="a" cx="{x:g}" cy="{y:g}" r="5"/>')
        parts.append(text(x + (5 if down else 10), y + (down or 5), name, "s"))
    return picture(390, "The roofline of an H100, and operations of the large GPT-2 below it", parts)


def launches() -> str:
    """The example's five operations: launched one by one by Python, and as a graph."""
    times, h, unit, left, parts = (5, 1, 1, 5, 1), 4, 20, 70, []
    ready, end, begins = [h * (i + 1) for i in range(5)], 0, []
    for at, took in zip(ready, times, strict=True):
        begins.append(max(at, end))
        end = begins[-1] + took
    graph = [h + sum(times[:i]) for i in range(5)]
    rows = (("one by one", ready, begins), ("a graph", [h], graph))
    y = 22.0
    for title, launched, started in rows:
        parts += [text(16, y + 8, title), text(16, y + 41, "Python", "s"), text(16, y + 79, "GPU", "s")]
        for i, at in enumerate(launched):
            said = f"{i}" if len(launched) > 1 else "all"
            parts.append(rect(left + (at - h) * unit + 1, y + 22, h * unit - 2, 28, "box", said))
        for i, (at, took) in enumerate(zip(started, times, strict=True)):
            parts.append(rect(left + at * unit + 1, y + 60, took * unit - 2, 28, "a", f"{i}"))
        last = started[-1] + times[-1]
        parts.append(text(left + last * unit + 4, y + 79, f"{last} µs", "s"))
        y += 110
    return picture(y - 4, "Five operations: with gaps between them, and as a graph without", parts)


def ring() -> str:
    """The example with three GPUs in a ring: their three pieces, after each step."""
    N, size, gap, left, top = 3, 44, 160, 92, 60
    held = [[(k + 1) * 10**r for k in range(N)] for r in range(N)]
    kinds = [["box"] * N for _ in range(N)]
    titles = ["start", "step 1", "step 2", "step 3", "step 4"]
    moving = [held[r][r - 1] for r in range(N)]  # what each sends next
    parts = [text(left + r * gap + 1.5 * size, 28, f"GPU {r}", "m") for r in range(N)]
    parts += [text(left + r * gap + (k + 0.5) * size, 48, f"{k}", "m s") for r in range(N) for k in range(N)]
    for step, title in enumerate(titles):
        y = top + step * 52
        if step:
            moving = [moving[r - 1] for r in range(N)]
            for r in range(N):
                piece = (r - step - 1) % N if step < N else (r - step + N - 1) % N
                moving[r] += held[r][piece] if step < N else 0
                held[r][piece], kinds[r][piece] = moving[r], "c" if step < N - 1 else "b"
        parts.append(text(16, y + 21, title, "s"))
        for r in range(N):
            parts += [
                rect(left + r * gap + k * size + 1, y, size - 2, 32, kinds[r][k], f"{held[r][k]}") for k in range(N)
            ]
    y = top + 5 * 52
    for x, kind, said in ((92, "box", "own gradients"), (232, "c", "sum of two"), (352, "b", "sum of all three")):
        parts.append(rect(x, y, 12, 12, kind, corner=2) + text(x + 18, y + 11, said, "s"))
    return picture(y + 26, "Three GPUs in a ring: after two steps each has one sum, and after four all have all", parts)


def zero() -> str:
    """Bytes for each parameter on one of 8 GPUs, at the three stages of ZeRO."""
    N, unit, left, parts = 8, 31, 76, []
    stages = ((2, 2, 10.0), (2, 2 + 2 / N, 10 / N), (2, 4 / N, 10 / N))
    for stage, sizes in enumerate(stages):
        x, y = float(left), 22 + stage * 48
        parts.append(text(16, y + 21, f"stage {stage}", "s"))
        for size, kind in zip(sizes, "acb", strict=True):
            parts.append(rect(x + 1, y, size * unit - 2, 32, kind, f"{size:g}" if size >= 1 else ""))
            x += size * unit
        parts.append(text(x + 8, y + 21, f"{sum(sizes):g}"))
    y = 22 + 3 * 48
    for at, kind, said in ((76, "a", "weights"), (176, "c", "gradients"), (286, "b", "exact weights, m and v")):
        parts.append(rect(at, y, 12, 12, kind, corner=2) + text(at + 18, y + 11, said, "s"))
    return picture(y + 28, "Bytes for each parameter on one of 8 GPUs: 14, 5.5 and 3.75", parts)


def lost(interval: int, save: int = 1, mean: int = 450, minutes: int = 400_000) -> float:
    """The solution of chapter 15: the simulated share of the time that is lost with saves at this interval."""
    chance, kept, work, clock = random.Random(0), 0, 0, 0
    while clock < minutes:
        clock, work = clock + 1, work + 1
        if chance.random() < 1 / mean:
            work = 0
        elif work == interval:
            clock, kept, work = clock + save, kept + work, 0
    return 1 - kept / clock


def interval() -> str:
    """The lost share of the time by interval between saves of 1 minute, with a failure every 450 minutes."""
    left, right, top, bottom = 62, 536, 52, 290

    def place(t: float, share: float) -> tuple[float, float]:
        return round(left + (right - left) * t / 100, 1), round(bottom - (bottom - top) * share / 0.16, 1)

    parts = [text(left, 28, "lost share of the time"), text(right, bottom + 42, "minutes between two saves", "e")]
    for share in (0, 0.05, 0.1, 0.15):
        y = place(0, share)[1]
        parts += [text(left - 8, y + 5, f"{share:.0%}", "e s"), line((left, y), (left + 6, y))]
    for t in range(0, 101, 10):
        parts += [text(place(t, 0)[0], bottom + 20, f"{t}", "m s"), line(place(t, 0), (place(t, 0)[0], bottom - 6))]
    parts.append(line((left, top), (left, bottom), (right, bottom)))
    curves: dict[str, tuple[str, Callable[[float], float]]] = {
        "saving": ("a", lambda t: 1 / t),
        "failures": ("b", lambda t: t / 900),
        "both": ("c", lambda t: 1 / t + t / 900),
    }
    for name, (kind, curve) in curves.items():
        ts = [t / 2 for t in range(13, 201) if curve(t / 2) <= 0.16]
        d = "L".join(f"{x:g} {y:g}" for x, y in (place(t, curve(t)) for t in ts))
        parts.append(f'<path class="{kind}" style="fill:none;stroke-width:2.5" d="M{d}"/>')
        at = {"saving": (90, 0.018), "failures": (78, 0.073), "both": (62, 0.096)}[name]
        parts.append(text(*place(*at), name, "m s"))
    dots = [place(t, lost(t)) for t in (10, 20, 30, 45, 60, 75, 90)]
    parts += [f'<circle class="c" cx="{x:g}" cy="{y:g}" r="4"/>' for x, y in dots]
    return picture(bottom + 58, "The lost share of the time by interval: saving, failures, and both", parts)


def save() -> str:
    """The files on the disk while a run saves step 20 and then step 40, and where a crash would resume."""
    left, unit = 128, 69
    rows = [
        ("step 20", [(0, 6, "b", "complete")]),
        (".tmp-step-40", [(1, 4, "c", "being written")]),
        ("step 40", [(4, 6, "b", "complete")]),
        ("a crash resumes", [(0, 4, "box", "at step 20"), (4, 6, "box", "at step 40")]),
    ]
    parts, y = [], 20.0
    for name, boxes in rows:
        y += 14 if name.startswith("a ") else 0
        parts.append(text(16, y + 21, name, "s"))
        for first, last, kind, said in boxes:
            parts.append(rect(left + first * unit + 1, y, (last - first) * unit - 2, 32, kind, said))
        y += 42
    top = y + 2
    parts.append(line((left, top), (left + 6 * unit, top)))
    for at, said in ((1, "begins"), (3, "manifest"), (4, "rename")):
        parts += [line((left + at * unit, top - 5), (left + at * unit, top + 5))]
        parts.append(text(left + at * unit, top + 22, said, "m s"))
    return picture(top + 36, "What is on the disk while a run saves, and where a crash resumes", parts)


Points = list[tuple[float, float]]
TRAIN, VALIDATION = "mean", "validation"


def curve(run: str, column: str) -> Points:
    """(step, loss) of a real run, from the table that learn_runs.py made."""
    rows = csv.DictReader((ROOT / "bench/results/learn_runs.csv").open())
    return [(float(row["step"]), float(row[column])) for row in rows if row["run"] == run and row[column]]


class Chart:
    """A chart of losses against 2,400 steps, with a place for each."""

    left, right, top, bottom = 48, 536, 52, 300

    def __init__(self, highest: float, marks: Sequence[float]) -> None:
        self.highest = highest
        self.parts = [text(self.left - 30, 28, "loss"), text(self.right, self.bottom + 42, "step", "e")]
        self.parts.append(line((self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)))
        for loss in marks:
            y = self.place(0, loss)[1]
            self.parts += [text(self.left - 8, y + 5, f"{loss:g}", "e s"), line((self.left, y), (self.left + 6, y))]
        for step in range(0, 2401, 400):
            x = self.place(step, 0)[0]
            self.parts += [text(x, self.bottom + 20, f"{step:,}", "m s"), line((x, self.bottom), (x, self.bottom - 6))]

    def place(self, step: float, loss: float) -> tuple[float, float]:
        x = self.left + (self.right - self.left) * step / 2400
        return round(x, 1), round(self.bottom - (self.bottom - self.top) * loss / self.highest, 1)

    def draw(self, points: Points, kind: str, style: str = "fill:none;stroke-width:2.5") -> None:
        """A line through the points that the chart has room for."""
        inside = [self.place(*point) for point in points if point[1] <= self.highest]
        d = "L".join(f"{x:g} {y:g}" for x, y in inside)
        self.parts.append(f'<path class="{kind}" style="{style}" d="M{d}"/>')

    def dots(self, points: Points, kind: str) -> None:
        places = [self.place(*point) for point in points if point[1] <= self.highest]
        self.parts += [f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="3.5"/>' for x, y in places]

    def known(self, loss: float, said: str) -> None:
        """A dashed line at a loss that is known before."""
        x, y = self.place(0, loss)
        self.parts.append(f'<path class="line" stroke-dasharray="5 4" d="M{x:g} {y:g}H{self.right}"/>')
        self.parts.append(text(self.right, y - 7, said, "e s"))

    def say(self, step: float, loss: float, said: str, kind: str = "m s") -> None:
        self.parts.append(text(*self.place(step, loss), said, kind))


def run_good() -> str:
    """A real run: mean, lowest and highest training loss of 20 steps, validation, and the learning rate below."""
    chart = Chart(7.2, range(8))
    band = curve("good", "lowest") + curve("good", "highest")[::-1]
    chart.draw(band, "a", "stroke:none;opacity:.55")
    chart.draw(curve("good", TRAIN), "a", "fill:none;stroke-width:1.5")
    chart.dots(curve("good", VALIDATION), "c")
    chart.known(math.log(1025), "ln V = 6.93: it knows nothing")
    chart.known(4.5655, "4.57: it knows which tokens are frequent")
    optim, schedule = OptimConfig(lr=1.2, horizon=2400), ScheduleConfig(warmup=120, final_frac=0.05)
    rates = [(step, learning_rate(step, optim, schedule)) for step in range(0, 2401, 30)]
    chart.draw(rates, "b", "fill:none;stroke-width:2")
    chart.say(1000, 1.3, "learning rate", "s")
    return picture(358, "The loss of a good run: from 6.75 to 2.26, with the two known values", chart.parts)


def run_four() -> str:
    """Validation losses of four real runs with other learning rates."""
    chart = Chart(7.2, range(8))
    chart.known(4.5655, "baseline")
    for run, kind in (("good", "a"), ("slow", "b"), ("fast", "c"), ("edge", "line")):
        chart.draw(curve(run, VALIDATION), kind)
    x = chart.left + 150
    for i, (kind, said) in enumerate(
        (("a", "0.004"), ("b", "0.0005"), ("c", "0.1"), ("line", "0.03, no warm-up, no clip"))
    ):
        y = 52 + 20 * i
        chart.parts.append(f'<path class="{kind}" style="fill:none;stroke-width:2.5" d="M{x} {y}h22"/>')
        chart.parts.append(text(x + 30, y + 5, said, "s"))
    return picture(358, "Validation losses of four runs with other learning rates", chart.parts)


def run_few() -> str:
    """A real run on little text: training and validation."""
    chart = Chart(4, range(5))
    chart.draw(curve("few", TRAIN), "a")
    points = curve("few", VALIDATION)
    chart.draw(points, "c", "fill:none;stroke-width:1.5")
    chart.dots(points, "c")
    chart.say(2100, 2.6, "validation")
    chart.say(1900, 0.5, "training")
    chart.say(700, 1.75, "lowest", "m s")
    return picture(358, "Training loss falls to 0.1, and validation loss rises from 1.5 to above 2", chart.parts)


def layouts() -> str:
    """The three matmuls of a layer. An arrow in a matrix is the direction that is added up, and lies in memory."""
    rows = [
        ("forward: y = x w\u1d40, over I", ("x", "n", "I", "a"), ("w", "O", "I", "b"), ("y", "n", "O")),
        ("gradient of the input: dx = dy w, over O", ("dy", "n", "O", "c"), ("w, transposed", "I", "O", "b"),
         ("dx", "n", "I")),
        ("gradient of the weight: dw = dy\u1d40 x, over n", ("dy, transposed", "O", "n", "c"),
         ("x, transposed", "I", "n", "a"), ("dw", "O", "I")),
    ]  # fmt: skip
    size, parts, y = {"n": 84, "I": 64, "O": 48}, [], 14.0
    for title, left, right, (made, tall, wide) in rows:
        parts.append(text(24, y + 12, title, "s"))
        for x, (name, row, column, kind) in ((50, left), (228, right)):
            height, width = size[row], size[column]
            parts += [rect(x, y + 42, width, height, kind), text(x + width / 2, y + 36, name, "m s")]
            parts += [
                text(x - 14, y + 47 + height / 2, row, "m s"),
                text(x + width / 2, y + 58 + height, column, "m s"),
            ]
            for i in range(3):
                at, end = y + 42 + height * (i + 1) / 4, x + width - 8
                parts += [line((x + 8, at), (end, at)), line((end - 5, at - 4), (end, at), (end - 5, at + 4))]
        height, width = size[tall], size[wide]
        parts += [text(186, y + 90, "times", "m s"), text(372, y + 90, "makes", "m s")]
        parts += [rect(430, y + 42, width, height), text(430 + width / 2, y + 36, made, "m s")]
        parts += [text(416, y + 47 + height / 2, tall, "m s"), text(430 + width / 2, y + 58 + height, wide, "m s")]
        y += 58 + max(size[left[1]], size[right[1]], height) + 26
    for x, kind, said in (
        (24, "a", "x"),
        (84, "b", "w"),
        (144, "c", "dy"),
        (210, "box", "in bf16; arrows: neighbours"),
    ):
        parts.append(rect(x, y, 12, 12, kind, corner=2) + text(x + 18, y + 11, said, "s"))
    return picture(y + 26, "The three matmuls of a layer, and the order in memory that each needs", parts)


def mosaic() -> str:
    """A caption and its picture of 8 x 8 patches, cut apart, and both as one row of tokens."""
    caption = "a red circle left of a small blue square"
    pixels = dict(scenes())[caption]
    parts, size, gap = [text(24, 30, caption)], 7, 12
    cut = pixels.reshape(2, 8, 2, 8, 3).swapaxes(1, 2).reshape(4, 8, 8, 3)
    for n, patch in enumerate(cut):
        left, top = 40 + n % 2 * (8 * size + gap), 48 + n // 2 * (8 * size + gap)
        parts += [
            f'<rect x="{left + x * size}" y="{top + y * size}" width="{size}" height="{size}" '
            f'fill="#{patch[y, x, 0]:02x}{patch[y, x, 1]:02x}{patch[y, x, 2]:02x}"/>'
            for y in range(8) for x in range(8)
        ]  # fmt: skip
        parts += [line(*((left + x * 56, top + y * 56) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))))]
        code, side = ("7", "12", "31", "40")[n], (left - 22, left + 64)[n % 2]
        parts.append(text(side, top + 33, code, "s"))
    parts.append(
        text(230, 110, "each patch has the number of", "s") + text(230, 130, "its nearest in the dictionary", "s")
    )
    words, x = [*caption.split()[:3], "...", "square"], 16.0
    for kind, said in (
        [("a", w) for w in words] + [("b", "picture")] + [("c", c) for c in ("7", "12", "31", "40")] + [("b", "end")]
    ):
        width = 16 + 8.2 * len(said)
        parts.append(rect(x, 206, width, 32, kind, said))
        x += width + 3
    parts.append(text(16, 262, "text: numbers below V", "s") + text(346, 262, "patches: V and above", "s"))
    return picture(280, "A caption and a picture as one row of tokens", parts)


def muon() -> str:
    """A circle under the example's three updates: each has strengths of (1, 1) and of (1, -1)."""
    parts = [text(102, 28, "gradient descent", "m"), text(280, 28, "AdamW", "m"), text(458, 28, "Muon", "m")]
    for middle, kind, first, second, said in (
        (102, "c", 4, 2, "4 and 2"), (280, "b", 2, 0, "2 and 0"), (458, "a", 1, 1, "1 and 1"),
    ):  # fmt: skip
        unit, center, half = 18.0, 118.0, math.sqrt(0.5)
        for radius, style in ((1.0, "line"), (0.0, kind)):
            strengths = (radius, radius) if radius else (float(first), float(second))
            points = []
            for i in range(73):
                u, v = strengths[0] * math.cos(i * math.pi / 36), strengths[1] * math.sin(i * math.pi / 36)
                points.append((middle + unit * half * (u - v), center - unit * half * (u + v)))
            d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            if style == "line":
                parts.append(f'<path class="line" stroke-dasharray="4 4" d="{d}"/>')
            else:
                parts.append(f'<path class="{kind}" style="fill-opacity:.6;stroke-width:2.5" d="{d}"/>')
        parts.append(text(middle, 226, said, "m s"))
    parts.append(text(280, 256, "dashed: the circle before the update; below: strengths of (1, 1) and (1, -1)", "m s"))
    label = "A circle under three updates: an ellipse for gradient descent, a line for AdamW, and a circle for Muon"
    return picture(272, label, parts)


PICTURES_RUN: dict[str, Callable[[], str]] = {
    "rounding": rounding, "formats": formats, "packing": packing, "memory": memory,
    "roofline": roofline, "launches": launches,
    "ring": ring, "zero": zero, "interval": interval, "save": save,
    "run-good": run_good, "run-four": run_four, "run-few": run_few, "layouts": layouts,
    "mosaic": mosaic, "muon": muon,
}  # fmt: skip
