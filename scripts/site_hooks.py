"""Additions to mkdocs: pages and parts that are made from the code, files outside docs/, and formulas."""

from __future__ import annotations

import html
import inspect
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from learn_notebooks import CODE, function  # noqa: E402

import daybreak  # noqa: E402
from daybreak.cli.main import VERBS  # noqa: E402

OUTSIDE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
API = ("Config", "Config.from_target", "Config.override", "plan", "train", "load", "Run", "Run.config", "Run.metrics",
       "Run.checkpoints", "Run.checkpoint", "Error")  # fmt: skip


def command_line() -> str:
    """Every verb: its summary, usage, explanation, examples and flags, from the code that parses them."""
    text = ""
    for verb in VERBS:
        context = click.Context(verb, info_name=f"daybreak {verb.name}")
        parts = re.split(r"\n[ \t]*\n", inspect.cleandoc(verb.help or ""))
        usage = verb.get_usage(context).removeprefix("Usage: ")
        text += f"## {verb.name}\n\n{parts[0]}\n\n```text\n{' '.join(usage.split())}\n```\n\n"
        for part in parts[1:]:
            if part.startswith("\b"):  # lines as they stand: a list, or examples
                title, _, body = part.lstrip("\b\n").partition("\n")
                text += f"{title}\n\n```text\n{inspect.cleandoc(body)}\n```\n\n"
            else:
                text += " ".join(part.split()) + "\n\n"
        rows = [record for p in verb.get_params(context) if (record := p.get_help_record(context)) is not None]
        text += "| flag | meaning |\n|---|---|\n"
        for flag, meaning in rows:
            text += f"| <code>{cell(flag)}</code> | {cell(meaning)} |\n"
        text += "\n"
    return text


def cell(text: str) -> str:
    """Text that cannot leave its cell of a table."""
    return re.sub(r"[|<*_`\[]", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def python_api() -> str:
    """The public names with their signatures and docstrings."""
    text = ""
    for name in API:
        found: Any = daybreak
        for part in name.split("."):
            found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
        target = found.__func__ if isinstance(found, classmethod | staticmethod) else found
        signature = ""
        if callable(target) and name not in ("Config", "Error"):
            signature = re.sub(r"\b(self|cls)(, )?", "", str(inspect.signature(target))).replace("'", "")
        doc = inspect.getdoc(target.fget if isinstance(target, property) else target) or ""
        text += f"### {name}\n\n```python text\ndaybreak.{name}{signature}\n```\n\n{doc}\n\n"
    return text


MADE = {"<!-- the command line -->": command_line, "<!-- the Python API -->": python_api}


def on_files(files: Files, config: Any) -> Files:
    for name, path in OUTSIDE.items():
        text = (ROOT / path).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    for mark, make in MADE.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    markdown = CODE.sub(function, markdown)
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", partial(link, Path(page.file.src_uri).parent), markdown)


def link(folder: Path, found: re.Match[str]) -> str:
    """Links to files outside docs/ lead somewhere in a clone; on the site only their text is left."""
    text, target = found.groups()
    if re.match("https?:|#", target):
        return found[0]
    path = os.path.normpath(folder / target.partition("#")[0])
    on_site = path in OUTSIDE or (not path.startswith("..") and (ROOT / "docs" / path).is_file())
    return found[0] if on_site else text


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas become MathML, which browsers draw by themselves."""

    def formula(found: re.Match[str]) -> str:
        latex = html.unescape(found[2]).strip()
        return convert(latex.removeprefix("\\(").removeprefix("\\[").removesuffix("\\)").removesuffix("\\]").strip(),
                       display="block" if found[1] == "div" else "inline")  # fmt: skip

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, content, flags=re.S)
