"""The page of `report` and `watch`: charts of runs, samples and the configuration, in one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daybreak import __version__
from daybreak.config import every_key
from daybreak.files import write_atomic
from daybreak.report.series import Follower

WEB = Path(__file__).parent / "web"
NO_FRAME = "; frame-ancestors 'none'"  # of a policy, in an HTTP header only
# OpenAI's models: published by llm.c (GPT-2: loss on its FineWeb validation set, 1558M on FineWeb-Edu's, and HellaSwag
# by its rules) and by the GPT-3 paper (HellaSwag, zero-shot).
REFERENCES = {
    "124M": {"GPT-2": {"loss": 3.424958, "hellaswag": 0.294463}, "GPT-3": {"hellaswag": 0.337}},
    "350M": {"GPT-2": {"loss": 3.083089, "hellaswag": 0.375224}, "GPT-3": {"hellaswag": 0.436}},
    "774M": {"GPT-2": {"loss": 3.000580, "hellaswag": 0.431986}, "GPT-3": {"hellaswag": 0.510}},
    "1558M": {"GPT-2": {"loss": 2.831273, "hellaswag": 0.488946}, "GPT-3": {"hellaswag": 0.547}},
}


def page_data(runs: Sequence[Follower], *, live: bool = False) -> dict[str, Any]:
    """The data for the page's script."""
    made = time.strftime("made %d %b %Y, %H:%M UTC", time.gmtime())
    return {
        "runs": [run.payload() for run in runs], "references": REFERENCES, "live": live, "made": made,
        "defaults": {name: key.default for name, key in every_key().items()}, "daybreak": __version__,
        "version": version(runs),
    }  # fmt: skip


def version(runs: Sequence[Follower]) -> str:
    """A text that changes whenever there is something new: the bytes read, and each run's state."""
    return ".".join([str(sum(run.offset for run in runs)), *(run.state()[0] for run in runs)])


def to_json(data: Any) -> str:
    """JSON with null for numbers that are not finite, and without "<", which could end the page's script."""
    data = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def render(data: dict[str, Any]) -> tuple[str, str]:
    """The page and its Content-Security-Policy, which allows its own scripts and styles, by their hashes."""
    text = (WEB / "page.html").read_text("utf-8")
    for mark, name in (("/*uplot*/", "uPlot.min.css"), ("/*library*/", "uPlot.iife.min.js"), ("/*page*/", "page.js")):
        text = text.replace(mark, (WEB / name).read_text("utf-8"), 1)
    policy = policy_of(text)
    text = text.replace("<!--policy-->", f'<meta http-equiv="Content-Security-Policy" content="{policy}">', 1)
    return text.replace("/*data*/", to_json(data), 1), policy + NO_FRAME


def policy_of(page: str) -> str:
    """The Content-Security-Policy of a page that runs its own scripts and styles only, shows pictures that it holds
    itself, and calls its own server."""
    hashes: dict[str, str] = {"script": "", "style": ""}
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        hashes[tag] += f" 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    own = "".join(f"; {tag}-src{found}" for tag, found in hashes.items())
    return f"default-src 'none'{own}; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'"


def write_report(paths: Sequence[str], out: Path | None) -> Path:
    """Write one self-contained file about `paths`, which are runs or llm.c's logs. By default it is in the run's
    folder, or beside the first run's folder if there are several."""
    runs = [Follower(path) for path in paths]
    for run in runs:
        run.update()
    text = render(page_data(runs))[0]
    if out is None:  # in a folder that may be somebody else's: a link there is replaced, not followed
        folder = runs[0].folder if len(runs) == 1 else runs[0].folder.parent
        write_atomic(out := folder / "report.html", text)
    else:
        out.write_text(text, encoding="utf-8")
    return out
