"""A picture of where the exchange between ranks lies in a step: from the trace of --run.profile to an SVG.

    python bench/timeline.py TRACE.json[.gz] OUT.svg [--first 5] [--last 15]

Two windows of the traced step, its first and last milliseconds: above, what computes; below, NCCL's kernels. Prints how
much of the exchange's time something computes.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

KINDS = {  # by a piece of the kernel's name, the first that fits
    "gather": ("AllGather",),
    "reduce": ("ReduceScatter", "AllReduce"),
    "attention": ("flash", "sdpa"),
    "product": ("quack", "nvjet", "splitK", "gemm"),
    "update": ("adamw", "norm_kernel", "square_sums", "guard"),
}
COLOURS = {"product": "#4c78a8", "attention": "#72b7b2", "rest": "#b8c4d0", "update": "#9d755d", "gather": "#f58518",
           "reduce": "#e45756"}  # fmt: skip
WIDTH, LEFT, LANE, GAP = 960, 92, 26, 8


class Piece(NamedTuple):
    """A kernel, in milliseconds from the step's begin."""

    begin: float
    end: float
    kind: str


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")


def pieces(path: Path) -> list[Piece]:
    """The kernels of a trace, in order."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[dict[str, Any]] = [e for e in json.loads(text)["traceEvents"] if e.get("cat") == "kernel"]
    zero = min(e["ts"] for e in events)
    found = [Piece((e["ts"] - zero) / 1e3, (e["ts"] + e["dur"] - zero) / 1e3, kind_of(e["name"])) for e in events]
    return sorted(found)


def hidden(all_: list[Piece], kind: str) -> tuple[float, float]:
    """Milliseconds of a kind of exchange, and those of them in which something computes."""
    busy: list[list[float]] = []
    for p in all_:
        if p.kind in ("gather", "reduce"):
            continue
        if busy and p.begin <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], p.end)
        else:
            busy.append([p.begin, p.end])
    mine = [p for p in all_ if p.kind == kind]
    under = sum(max(0.0, min(p.end, b) - max(p.begin, a)) for p in mine for a, b in busy)
    return sum(p.end - p.begin for p in mine), under


def panel(all_: list[Piece], start: float, stop: float, top: int, title: str) -> list[str]:
    """One window as SVG elements."""
    scale = (WIDTH - LEFT - 12) / (stop - start)
    out = [f'<text x="{LEFT}" y="{top - 8}" class="t">{title}</text>']
    for lane, name in enumerate(("compute", "exchange")):
        y = top + lane * (LANE + GAP)
        out.append(f'<text x="{LEFT - 8}" y="{y + LANE - 8}" text-anchor="end">{name}</text>')
        out.append(f'<rect x="{LEFT}" y="{y}" width="{(stop - start) * scale:.1f}" height="{LANE}" fill="#f4f4f4"/>')
        for p in all_:
            if (p.kind in ("gather", "reduce")) == bool(lane) and p.end > start and p.begin < stop:
                a, b = max(p.begin, start), min(p.end, stop)
                x, width = LEFT + (a - start) * scale, max((b - a) * scale, 0.3)
                out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE}" fill="{COLOURS[p.kind]}"/>')
    bottom = top + 2 * LANE + GAP
    for tick in range(-(-int(start * 1000) // 1000), int(stop) + 1):
        if tick >= start and (stop - start < 8 or tick % 2 == 0):
            x = LEFT + (tick - start) * scale
            out.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
            out.append(f'<rect x="{x:.1f}" y="{bottom}" width="1" height="4" fill="#666"/>')
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=float, default=5.0, help="milliseconds of the first window")
    parser.add_argument("--last", type=float, default=15.0)
    a = parser.parse_args()
    all_ = pieces(a.trace)
    end = max(p.end for p in all_)
    body = panel(all_, 0.0, a.first, 36, "the step begins: updated weights are gathered, forward follows (ms)")
    body += panel(all_, end - a.last, end, 156, "it ends: gradients are reduced under backward, then the update (ms)")
    for i, (kind, colour) in enumerate(COLOURS.items()):
        x = LEFT + 140 * i
        body.append(f'<rect x="{x}" y="252" width="12" height="12" fill="{colour}"/>')
        body.append(f'<text x="{x + 18}" y="262">{kind}</text>')
    style = "text{font:12px sans-serif;fill:#333}.t{font-weight:bold}"
    a.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 276" width="{WIDTH}" height="276">'
        f'<style>{style}</style><rect width="{WIDTH}" height="276" fill="#fff"/>' + "\n".join(body) + "</svg>\n"
    )
    for kind in ("gather", "reduce"):
        total, under = hidden(all_, kind)
        print(f"{kind}: {total:.2f} ms of {end:.1f}, {under:.2f} of them ({under / total:.0%}) under computation")


if __name__ == "__main__":
    main()
