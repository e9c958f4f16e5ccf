"""The drawings of the course in docs/learn, from the numbers of its examples: chapters 1 to 10.

python scripts/learn_pictures.py writes all of docs/images/learn, those of learn_pictures_run.py too. They follow the
light or dark mode of the page, and are narrow enough for a phone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from learn_drawing import WIDTH, line, picture, rect, text
from learn_pictures_run import PICTURES_RUN

from daybreak.data.tokenizer import load_ranks

FOLDER = Path(__file__).resolve().parents[1] / "docs/images/learn"
Tokens = list[str]


def course() -> str:
    """GPT-2 from top to bottom, and the chapter that explains each part."""
    rows = [
        ("text", "box", "1", "Text becomes numbers: tokens"),
        ("embedding", "a", "3", "Numbers become vectors"),
        ("layernorm", "b", "4", "Vectors of one size"),
        ("attention", "c", "5", "Every position looks back"),
        ("layernorm", "b", "", ""),
        ("MLP with GELU", "c", "6", "Every position thinks by itself"),
        ("layernorm", "b", "", ""),
        ("head", "a", "3", "Vectors become predictions"),
        ("loss", "box", "2, 7", "How wrong were they?"),
    ]
    parts, y = [], 20.0
    for i, (name, kind, chapter, words) in enumerate(rows):
        parts.append(rect(60, y, 150, 32, kind, name))
        if chapter:
            parts.append(text(268, y + 21, chapter, "e s") + text(282, y + 21, words))
        if i + 1 < len(rows):
            parts.append(line((135, y + 32), (135, y + 46)))
        y += 46
    top, bottom = 20 + 2 * 46 - 7, 20 + 6 * 46 - 7
    parts.append(line((56, top), (44, top), (44, bottom), (56, bottom)))
    parts.append(text(38, (top + bottom) / 2 + 5, "L x", "e s"))
    parts.append(line((135, y - 14), (135, y + 4)) + text(268, y + 21, "8", "e s"))
    parts.append(rect(60, y + 4, 150, 32, "box", "AdamW") + text(282, y + 21, "Every number is improved a little"))
    return picture(y + 52, "GPT-2 from top to bottom, with the chapter for each part", parts)


def merged(tokens: Tokens, pair: tuple[str, str]) -> Tokens:
    made: Tokens = []
    for token in tokens:
        if made and (made[-1], token) == pair:
            made[-1] += token
        else:
            made.append(token)
    return made


def tokens() -> str:
    """Three merges of `banana bandana`."""
    row, parts, learned, size, y = list("banana bandana"), [], [""], 27, 24.0
    said = "14 tokens"
    for _ in range(4):
        x = 16.0
        for token in row:
            kind = "box" if len(token) == 1 else "abc"[learned.index(token) - 1]
            parts.append(rect(x + 1, y, size * len(token) - 3, 32, kind, token.replace(" ", "␣")))
            x += size * len(token)
        parts.append(text(406, y + 21, said, "s"))
        counts = Counter(pairwise(row))
        pair = max(counts, key=lambda p: counts[p])
        row, y = merged(row, pair), y + 50
        said = f"{len(row)} tokens: {' + '.join(pair)}"
        learned.append("".join(pair))
    return picture(y - 2, "banana bandana as 14, 10, 8 and 6 tokens", parts)


def bigram() -> str:
    """How often one letter follows another in the words of GPT-2's vocabulary."""
    words = [w[1:].decode() for w in load_ranks() if re.fullmatch(rb" [a-z]+", w)]
    counts = Counter(pair for word in words for pair in pairwise(f".{word}."))
    letters, size, left, top = ".abcdefghijklmnopqrstuvwxyz", 18, 52, 54
    totals = {a: sum(counts[a, b] for b in letters) for a in letters}
    parts = [text(left, 24, "the next letter", "s"), text(16, 44, "after", "s")]
    cells: dict[int, str] = {}
    for i, a in enumerate(letters):
        parts.append(text(left + i * size + 9, 46, a, "m s") + text(34, top + i * size + 14, a, "m s"))
        for j, b in enumerate(letters):
            level = round(10 * (counts[a, b] / totals[a]) ** 0.5)
            cells[level] = cells.get(level, "") + f"M{left + j * size} {top + i * size}h17v17h-17z"
    parts += [f'<path class="heat" opacity="{max(n / 10, 0.03):g}" d="{d}"/>' for n, d in sorted(cells.items())]
    return picture(top + 27 * size + 14, "Which letter follows which: 27 rows of 27 shares", parts)


def linear() -> str:
    """The three matmuls of a linear layer, as shapes."""
    n, I, O = 104, 54, 78
    names = {n: "n", I: "I", O: "O"}
    rows = [
        ("forward", ("x", n, I), ("wᵀ", I, O), ("y", n, O)),
        ("backward", ("dy", n, O), ("w", O, I), ("dx", n, I)),
        ("backward", ("dyᵀ", O, n), ("x", n, I), ("dw", O, I)),
    ]
    parts, y = [], 22.0
    for title, *matrices in rows:
        middle, x = y + 62, 128.0
        parts.append(text(16, middle + 5, title, "s"))
        for (name, high, wide), kind, sign in zip(matrices, "abc", ("·", "=", ""), strict=True):
            parts.append(rect(x, middle - high / 2, wide, high, kind, name, 2))
            parts.append(text(x + wide / 2, middle + high / 2 + 15, names[wide], "m s"))
            parts.append(text(x - 6, middle + 5, names[high], "e s"))
            parts.append(text(x + wide + 28, middle + 5, sign, "m"))
            x += wide + 64
        y += 142
    return picture(y + 4, "Forward is x times w transposed; backward is dy times w, and dy transposed times x", parts)


def bars(label: str, panels: Sequence[tuple[str, Sequence[float]]], unit: float) -> str:
    """One panel a row of numbers, as bars up and down from zero."""
    high = max(v for _, values in panels for v in values) * unit + 62
    low = max(-v for _, values in panels for v in values) * unit + 34
    parts, wide = [], WIDTH / len(panels)
    for p, (title, values) in enumerate(panels):
        left, size = p * wide + 12, (wide - 24) / len(values)
        parts.append(text(p * wide + wide / 2, 28, title, "m"))
        parts.append(line((left, high), (left + size * len(values), high)))
        for i, value in enumerate(values):
            height, middle = abs(value) * unit, left + i * size + size / 2
            parts.append(
                rect(middle - size / 2 + 5, high - max(value, 0) * unit, size - 10, height, "abc"[p], corner=1)
            )
            said = f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "−")
            parts.append(text(middle, high + (-6 - height if value >= 0 else height + 16), said, "m s"))
    return picture(high + low, label, parts)


def layernorm() -> str:
    """The row of the example, centred and scaled."""
    x = [9.0, 3, 3, 1]
    centred = [v - 4 for v in x]
    return bars("A row, the row minus its mean, and that divided by 3",
                [("x", x), ("x − 4", centred), ("(x − 4) / 3", [v / 3 for v in centred])], 15)  # fmt: skip


def layernorm_backward() -> str:
    """The gradient of the example, without its mean, and without its share of xhat."""
    g, xhat = [3.0, 0, 0, 0], [v / 3 for v in (5, -1, -1, -3)]
    flat = [v - 0.75 for v in g]
    return bars("A gradient, without its mean, and without what stretches the row",
                [("g", g), ("minus its mean", flat),
                 ("minus 1.25 x̂", [v - 1.25 * h for v, h in zip(flat, xhat, strict=True)])], 40)  # fmt: skip


def attention() -> str:
    """The example: shares of three queries, the values, and their means."""
    shares = [["1"], ["1/4", "3/4"], ["1/5", "3/5", "1/5"]]
    values, means, size, top = ["10", "20", "40"], ["10", "17.5", "22"], 56, 58
    parts = [text(140 + 1.5 * size, 28, "shares P", "m"), text(374, 28, "values v", "m"), text(492, 28, "output", "m")]
    for r in range(3):
        y = top + r * (size + 4)
        parts.append(
            text(122, y + 33, f"position {r}", "e s") + text(140 + r * (size + 4) + size / 2, 50, f"{r}", "m s")
        )
        for j in range(3):
            seen = j <= r
            share = shares[r][j] if seen else "hidden"
            box = rect(140 + j * (size + 4), y, size, size, "a" if seen else "box")
            parts.append(box + text(140 + j * (size + 4) + size / 2, y + 33, share, "m" if seen else "m s"))
        parts.append(rect(346, y, size, size, "b", values[r]) + rect(464, y, size, size, "c", means[r]))
    parts += [text(333, top + 92, "·", "m"), text(433, top + 92, "=", "m")]
    return picture(
        top + 3 * (size + 4) + 14, "Shares of three positions times values 10, 20, 40 give 10, 17.5, 22", parts
    )


def gelu(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp() -> str:
    """The example: two hidden units, and their sum."""
    units: dict[str, Callable[[float], float]] = {"gelu(x)": gelu, "gelu(−x)": lambda x: gelu(-x)}
    panels = {**units, "their sum": lambda x: gelu(x) + gelu(-x)}
    unit, zero, wide, end, parts = 36, 132, WIDTH / 3, 2.2, []
    for p, (title, curve) in enumerate(panels.items()):
        middle = p * wide + wide / 2
        points = [(middle + unit * x, zero - unit * curve(x)) for x in (end * i / 44 for i in range(-44, 45))]
        parts.append(text(middle, 28, title, "m") + line((middle - end * unit, zero), (middle + end * unit, zero)))
        parts.append(line((middle, zero), (middle, zero - end * unit)))
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="{"abc"[p]}" style="fill:none;stroke-width:2.5" d="M{path}"/>')
        for x in (-1, 0, 1):
            at, high = middle + unit * x, zero - unit * curve(x)
            parts.append(f'<circle class="{"abc"[p]}" cx="{at:g}" cy="{high:.1f}" r="4"/>')
            said = f"{curve(x):.2f}".replace("-", "−")
            if high > zero:
                parts.append(text(at, high - 12, said, "m s"))
            elif x:
                parts.append(text(at + 9 * x, high + 12, said, "s" if x > 0 else "e s"))
            parts.append(text(at, zero + 28, f"{x}".replace("-", "−"), "m s"))
    return picture(zero + 42, "gelu of x, gelu of minus x, and their sum, which is 0.68 at both -1 and 1", parts)


def stream(top: float, title: str, boxes: Sequence[str], numbers: Sequence[str], ahead: int) -> list[str]:
    """A residual stream of two blocks between both uses of e. Numbers: on the stream, then around and in each block,
    then on the way below. `ahead`: 1 for arrows to the right, -1 to the left."""
    y, e, f1, f2, z = top + 98, *boxes
    parts = [text(16, top + 4, title, "s"), line((72, y), (500, y))]
    parts.append(line((44, y), (44, y + 46), (460, y + 46), (460, y)))
    for left, name in ((104, f1), (276, f2)):
        parts.append(line((left, y), (left, y - 54), (left + 124, y - 54), (left + 124, y)))
        parts.append(rect(left + 22, y - 72, 80, 36, "c", name) + rect(left + 112, y - 12, 24, 24, "box", "+", 12))
    parts += [rect(16, y - 18, 56, 36, "a", e), rect(448, y - 12, 24, 24, "box", "×", 12)]
    parts.append(rect(500, y - 18, 44, 36, "box", z))
    for x, high in ((166, y), (338, y), (252, y + 46)):
        parts.append(line((x - 4 * ahead, high - 4), (x, high), (x - 4 * ahead, high + 4)))
    places = [(88, y), (258, y), (430, y), (486, y), (166, y), (338, y), (252, y + 46)]
    branches = [(216, y - 54), (388, y - 54)] if ahead > 0 else [(115, y - 54), (287, y - 54)]
    parts += [text(x, high - 8, n, "m") for (x, high), n in zip([*places, *branches], numbers, strict=True) if n]
    return parts


def backward() -> str:
    """The example with two blocks of one number: what forward computes, and what comes back."""
    forward = stream(26, "forward: the values", ("e: 2", "w₁ x²", "w₂ x²", "z"),
                     ("2", "3", "6", "12", "", "", "2", "1", "3"), 1)  # fmt: skip
    back = stream(220, "backward: the gradients", ("e: 18", "w₁: 24", "w₂: 18", "z"),
                  ("12", "6", "2", "1", "6", "2", "6", "6", "4"), -1)  # fmt: skip
    label = "Values 2, 3, 6 on the way to 12, and gradients 2, 6, 12 on the way back"
    return picture(380, label, [*forward, line((16, 188), (544, 188)), *back])


def adamw() -> str:
    """Eight steps in the example's valley, (a² + 18 b²) / 2: gradient descent, and AdamW with both betas 1/2."""
    steep, half = (1.0, 18.0), 0.5
    plain, ours, m, v = [[4.0, 1.0]], [[4.0, 1.0]], [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 9):
        plain.append([x - 0.1 * s * x for x, s in zip(plain[-1], steep, strict=True)])
        g = [x * s for x, s in zip(ours[-1], steep, strict=True)]
        m = [half * x + half * y for x, y in zip(m, g, strict=True)]
        v = [half * x + half * y * y for x, y in zip(v, g, strict=True)]
        ratios = [x / math.sqrt(y * (1 - half**t)) for x, y in zip(m, v, strict=True)]
        ours.append([x - 0.5 * ratio for x, ratio in zip(ours[-1], ratios, strict=True)])

    def place(a: float, b: float) -> tuple[float, float]:
        return round(76 + 110 * a, 1), round(140 - 110 * b, 1)

    parts = [text(*place(0, -0.05), "+", "m s")]
    for r in (0.5, 1, 2, 3, 4):  # where the loss is r² / 2: an ellipse, cut off on the left
        last = math.acos(max(-0.5 / r, -1))
        angles = [last * i / 40 for i in range(-40, 41)]
        parts.append(line(*(place(r * math.cos(w), r * math.sin(w) / math.sqrt(steep[1])) for w in angles)))
    for kind, name, x, path in (("c", "gradient descent", 24, plain), ("a", "AdamW", 168, ours)):
        points = [place(*at) for at in path]
        d = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        parts.append(f'<path class="{kind}" style="fill:none" stroke-width="2" d="{d}"/>')
        parts += [f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="4"/>' for x, y in [*points, (x, 285)]]
        parts.append(text(x + 12, 290, name, "s"))
    parts.append(text(504, 28, "start (4, 1)", "e s"))
    parts.append(text(250, 290, "+ the lowest point", "s"))
    return picture(306, "Eight steps in a valley: gradient descent jumps across it, AdamW walks along it", parts)


def rotary() -> str:
    """The example's query and key, turned by quarters: three pairs of places."""
    query, key, unit, middle, wide, parts = (1.0, 2.0), (2.0, 1.0), 34, 142, WIDTH / 3, []
    for p, places in enumerate(((0, 0), (1, 0), (2, 1))):
        center, ends = p * wide + wide / 2, []
        reach = 2.4 * unit
        parts.append(line((center - reach, middle), (center + reach, middle)))
        parts.append(line((center, middle - reach), (center, middle + reach)))
        for (x, y), kind, place in zip((query, key), "ac", places, strict=True):
            for _ in range(place):
                x, y = -y, x
            ends.append((x, y))
            angle, tip = math.atan2(y, x), (center + unit * x, middle - unit * y)
            sides = [(tip[0] - 10 * math.cos(angle + s), tip[1] + 10 * math.sin(angle + s)) for s in (-0.4, 0.4)]
            d = "L".join(f"{a:.1f} {b:.1f}" for a, b in ((center, middle), tip, sides[0], sides[1], tip))
            parts.append(f'<path class="{kind}" style="stroke-width:2.5" d="M{d}"/>')
            said = f"({x:g}, {y:g})".replace("-", "−")
            parts.append(text(tip[0], tip[1] + (-8 if y > 0 else 18), said, "m s"))
        turn = [math.atan2(y, x) for x, y in ends]
        turn[0] += 2 * math.pi if turn[0] < turn[1] else 0
        steps = [turn[1] + (turn[0] - turn[1]) * i / 20 for i in range(21)]
        arc = "L".join(f"{center + 20 * math.cos(w):.1f} {middle - 20 * math.sin(w):.1f}" for w in steps)
        parts.append(f'<path class="b" style="fill:none;stroke-width:2.5" d="M{arc}"/>')
        score = f"{ends[0][0] * ends[1][0] + ends[0][1] * ends[1][1]:g}".replace("-", "−")
        parts.append(text(center, 28, f"places {places[0]} and {places[1]}", "m"))
        parts.append(text(center, middle + reach + 28, f"score {score}", "m"))
    for x, kind, said in ((150, "a", "query"), (250, "c", "key"), (340, "b", "angle between")):
        parts.append(rect(x, 270, 12, 12, kind, corner=2) + text(x + 18, 281, said, "s"))
    return picture(298, "A query and a key at three pairs of places: the angle between them decides the score", parts)


def grouped() -> str:
    """Eight heads of queries, each with its own keys and values, or in two groups."""
    left, size, parts = 122, 52, []
    for y, said, groups in ((20, "8 heads of keys", 8), (144, "2 heads of keys", 2)):
        share = 8 // groups
        parts.append(text(16, y + 21, "queries", "s") + text(16, y + 91, said, "s"))
        for head in range(8):
            middle = left + head * size + size / 2
            group = left + (head // share + 0.5) * share * size
            parts.append(line((middle, y + 32), (group, y + 70)) + rect(middle - 20, y, 40, 32, "a", f"q{head}"))
        for group in range(groups):
            words = "k, v" if groups == 8 else "k, v of four heads"
            wide = share * size - 12
            parts.append(rect(left + group * share * size + 6, y + 70, wide, 32, "c", words))
    parts.append(line((16, 133), (544, 133)))
    return picture(264, "Eight heads of queries: each with its own keys and values, or four sharing one", parts)


PICTURES: dict[str, Callable[[], str]] = {
    "course": course, "tokens": tokens, "bigram": bigram, "linear": linear, "layernorm": layernorm,
    "layernorm-backward": layernorm_backward, "attention": attention, "mlp": mlp, "backward": backward, "adamw": adamw,
    "rotary": rotary, "grouped": grouped, **PICTURES_RUN,
}  # fmt: skip

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())
