"""Training and validation loss of one or several runs as one SVG picture, from their logs.

    python bench/plot_curves.py OUT.svg NAME=RUN ... [--title TEXT] [--line LOSS=TEXT] [--tokens-per-step N]

RUN is the folder of a run, or a main.log of llm.c. An llm.c log has no token counts: --tokens-per-step gives them.
Every run has a colour. The faint line is the training loss of every step, the darker line the mean of the steps around
it, and the dots are validation.
"""

from __future__ import annotations

import argparse
import math
from html import escape
from pathlib import Path

from daybreak.report.series import Follower

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 420, 64, 28, 84, 52
COLOURS = ("#2563eb", "#0f9d76", "#d9480f", "#7c3aed")
POINTS = 600  # of a drawn line: more than the picture has pixels to show
Points = list[tuple[float, float]]


def columns(run: Follower, curve: str, tokens_per_step: int) -> Points:
    """(tokens, loss) of a run's `train` or `val` curve."""
    found = getattr(run, curve).columns
    tokens = (t if t == t else s * tokens_per_step for s, t in zip(found["step"], found["tokens"], strict=True))
    return [(t, y) for t, y in zip(tokens, found["loss"], strict=True) if math.isfinite(y)]


def smooth(points: Points, share: float = 0.02) -> Points:
    """Means of neighbours: of a window that is `share` of the whole, narrower towards both ends."""
    widest = max(1, int(len(points) * share / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for i, (x, _) in enumerate(points):
        half = min(widest, i, len(points) - 1 - i)
        a, b = i - half, i + half + 1
        found.append((x, (sums[b] - sums[a]) / (b - a)))
    return found


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(runs: dict[str, tuple[Points, Points]], title: str, lines: dict[str, float], top: float | None) -> str:
    """The picture. `runs`: name -> training, validation."""
    everything = [p for pair in runs.values() for points in pair for p in points]
    right = max(x for x, _ in everything)
    high = top or max(y for _, y in everything)
    low = math.floor(min([y for _, y in everything] + list(lines.values())) * 2) / 2
    unit, word = next(((u, w) for u, w in ((1e9, "billion "), (1e6, "million "), (1, "")) if right >= u), (1, ""))

    def x_of(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * tokens / right

    def y_of(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(loss, high) - low) / (high - low)

    def path(points: Points) -> str:
        thin = points[:: max(1, len(points) // POINTS)]
        return "M" + "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in thin)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">',
        "<style>text{font:13px system-ui,sans-serif;fill:#57606a}.t{font-size:16px;font-weight:600;fill:#1f2328}"
        "path{fill:none;stroke-linejoin:round}.g{stroke:#e4e8ec}.h{stroke:#8c959f;stroke-dasharray:5 4}</style>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" fill="#fdfdfc" stroke="#d0d7de"/>',
        f'<text x="24" y="34" class="t">{escape(title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="34" text-anchor="end">line: training, dots: validation</text>',
    ]
    for y in ticks(low, high, 6):
        out.append(f'<path class="g" d="M{LEFT} {y_of(y):.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 10}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(0, right / unit, 8):
        out.append(f'<text x="{x_of(x * unit):.1f}" y="{HEIGHT - 30}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 11}" text-anchor="middle">{word}tokens</text>')
    out.append(f'<text x="{LEFT}" y="{TOP - 10}" text-anchor="middle">loss</text>')
    for text, y in lines.items():
        out.append(f'<path class="h" d="M{LEFT} {y_of(y):.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{WIDTH - RIGHT}" y="{y_of(y) - 7:.1f}" text-anchor="end">{escape(text)}</text>')
    at = 24
    for i, ((name, (train, val)), colour) in enumerate(zip(runs.items(), COLOURS, strict=False)):
        out.append(f'<path d="{path(train)}" stroke="{colour}" stroke-opacity=".18"/>')
        out.append(f'<path d="{path(smooth(train))}" stroke="{colour}" stroke-opacity=".75" stroke-width="1.5"/>')
        dot = f'r="{max(2.5, 6 - 1.75 * i):g}" fill="{colour}" stroke="#fff"/>'  # smaller ones lie on top
        out += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" {dot}' for x, y in val]
        text = f"{name}: {val[-1][1]:.3f} at the end"
        out.append(f'<path d="M{at} 53h18" stroke="{colour}" stroke-width="3"/>')
        out.append(f'<text x="{at + 25}" y="57">{escape(text)}</text>')
        at += 50 + int(6.6 * len(text))
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    """Read the runs and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--title", default="Loss")
    parser.add_argument("--line", action="append", default=[], metavar="LOSS=TEXT", help="a dashed line at LOSS")
    parser.add_argument("--top", type=float, help="the largest loss on the axis (default: of all)")
    parser.add_argument("--tokens-per-step", type=int, default=0, help="of an llm.c log")
    args = parser.parse_args()
    runs = {}
    for name, where in (pair.split("=", 1) for pair in args.runs):
        run = Follower(Path(where))
        run.update()
        train, val = (columns(run, curve, args.tokens_per_step) for curve in ("train", "val"))
        runs[name] = (train, val)
        print(f"{name}: {len(train)} training losses, validation {val[0][1]:.4f} to {val[-1][1]:.4f}")
    lines = {text: float(loss) for loss, text in (line.split("=", 1) for line in args.line)}
    args.out.write_text(draw(runs, args.title, lines, args.top))


if __name__ == "__main__":
    main()
