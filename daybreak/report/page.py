"""One page for `report` and `watch`: charts of runs, samples, configuration; a single file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daybreak import __version__
from daybreak.config import Config
from daybreak.report.series import Follower

WEB = Path(__file__).parent / "web"
# OpenAI's models: published by llm.c (GPT-2: loss on its FineWeb validation set, 1558M on FineWeb-Edu's, and HellaSwag
# by its rules) and by the GPT-3 paper (HellaSwag, zero-shot).
REFERENCES = {
    "124M": {"GPT-2": {"loss": 3.424958, "hellaswag": 0.294463}, "GPT-3": {"hellaswag": 0.337}},
    "350M": {"GPT-2": {"loss": 3.083089, "hellaswag": 0.375224}, "GPT-3": {"hellaswag": 0.436}},
    "774M": {"GPT-2": {"loss": 3.000580, "hellaswag": 0.431986}, "GPT-3": {"hellaswag": 0.510}},
    "1558M": {"GPT-2": {"loss": 2.831273, "hellaswag": 0.488946}, "GPT-3": {"hellaswag": 0.547}},
}


def page_data(runs: Sequence[Follower], *, live: bool = False) -> dict[str, Any]:
    """What the page's script gets."""
    made = time.strftime("made %d %b %Y, %H:%M UTC", time.gmtime())
    return {
        "runs": [run.payload() for run in runs], "references": REFERENCES, "live": live, "made": made,
        "defaults": dict(Config().items()), "daybreak": __version__,
        "version": version(runs),
    }  # fmt: skip


def version(runs: Sequence[Follower]) -> str:
    """Differs whenever there is something new: bytes read, and each run's state."""
    return ".".join([str(sum(run.offset for run in runs)), *(run.state()[0] for run in runs)])


def to_json(data: Any) -> str:
    """JSON without NaN, and without a character that could end the element it stands in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def render(data: dict[str, Any]) -> tuple[str, str]:
    """(the page, its Content-Security-Policy): scripts and styles by their hashes, the network only to itself."""
    text = (WEB / "page.html").read_text()
    style = (WEB / "uPlot.min.css").read_text() + text.split("/*uplot*/")[1].split("</style>")[0]
    library, script = ((WEB / name).read_text() for name in ("uPlot.iife.min.js", "page.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; "
        f"connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    head, rest = text.replace("<!--policy-->", meta).split("/*uplot*/")
    text = head + style + "</style>" + rest.split("</style>", 1)[1]
    for mark, value in (("/*library*/", library), ("/*page*/", script), ("/*data*/", to_json(data))):
        before, after = text.split(mark, 1)
        text = before + value + after
    return text, policy + "; frame-ancestors 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy_of(page: str) -> str:
    """The Content-Security-Policy of a page with one script and one style in it, which talks to its own server only."""
    script, style = (_hash(page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def write_report(paths: Sequence[str], out: Path | None) -> Path:
    """One self-contained file about `paths` (runs, or llm.c's logs), by default in the first one's folder."""
    runs = [Follower(path) for path in paths]
    for run in runs:
        run.update()
    out = out or runs[0].folder / "report.html"
    out.write_text(render(page_data(runs))[0], encoding="utf-8")
    return out
