"""How the drawings of the course are made: an SVG card that follows light and dark mode, and its parts."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 560
LIGHT = """text{font:15px system-ui,sans-serif;fill:#1f2328}.s{font-size:13px;fill:#57606a}.m{text-anchor:middle}
.e{text-anchor:end}.card{fill:#fdfdfc;stroke:#d0d7de}.box{fill:#eef1f5;stroke:#8c959f}.a{fill:#c5dafc;stroke:#2563eb}
.b{fill:#c3ebdb;stroke:#0f9d76}.c{fill:#fcdcc5;stroke:#d9480f}.line{fill:none;stroke:#8c959f;stroke-width:1.5}
.heat{fill:#1d4ed8}"""
DARK = """text{fill:#e6e8ec}.s{fill:#a9b2be}.card{fill:#1e2129;stroke:#3d444d}.box{fill:#2c313c;stroke:#768390}
.a{fill:#1f3f7a;stroke:#7aa7ff}.b{fill:#14503f;stroke:#3fcf9f}.c{fill:#6b3413;stroke:#ff9a5c}.line{stroke:#9aa4b0}
.heat{fill:#8ab4ff}"""


def picture(height: float, label: str, parts: Sequence[str]) -> str:
    """An SVG file: a card with parts on it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'role="img" aria-label="{label}">\n<style>{LIGHT}\n@media(prefers-color-scheme:dark){{{DARK}}}</style>\n'
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{height - 2:g}" rx="10"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str = "box", words: str = "", corner: float = 4) -> str:
    """A box, with words in its middle."""
    box = f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}"/>'
    return box + (text(x + width / 2, y + height / 2 + 5, words, "m") if words else "")


def line(*points: tuple[float, float]) -> str:
    return '<path class="line" d="M' + "L".join(f"{x:g} {y:g}" for x, y in points) + '"/>'
