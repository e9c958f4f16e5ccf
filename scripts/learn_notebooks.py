"""Make a notebook of every chapter of docs/learn: `make notebooks` writes them to the folder notebooks/.

    python scripts/learn_notebooks.py FOLDER

A chapter's Python blocks become cells, with the output that the page shows. Everything else becomes text, and so does
the code of a folded solution, which a cell would unfold. Links and pictures lead to the files of the clone.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "docs/learn").glob("[0-9]*.md"), key=lambda p: int(p.name.split("-")[0]))
CODE = re.compile(r"<!-- code: (\S+) (\S+) -->")
BLOCK = re.compile(r"^```python ci\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.M | re.S)
FOLDED = re.compile(r"^<details.*?^</details>", re.M | re.S)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def function(found: re.Match[str]) -> str:
    """The source of the function that `<!-- code: FILE NAME -->` asks for, so that a page shows the code that runs."""
    source = (ROOT / found[1]).read_text()
    defined = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    node = next(node for node in defined if node.name == found[2])
    first = min(x.lineno for x in (node, *node.decorator_list))
    lines = source.splitlines()[first - 1 : node.end_lineno]
    return "```python text\n" + textwrap.dedent("\n".join(lines)) + "\n```"


def moved(text: str, page: Path, folder: Path) -> str:
    """Markdown of a page with the links of a file in another folder; a chapter's link leads to its notebook."""

    def link(found: re.Match[str]) -> str:
        target, hash_, place = found[2].partition("#")
        if re.match("https?:", target) or not target:
            return found[0]
        file = (page.parent / target).resolve()
        name = file.with_suffix(".ipynb").name if file in CHAPTERS else os.path.relpath(file, folder)
        return f"{found[1]}({name}{hash_}{place})"

    text = re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", link, CODE.sub(function, text))
    text = re.sub(r"^```(\w+) (?:ci|text|gpu|network)$", r"```\1", text, flags=re.M)
    return text.replace('<details markdown="1"><summary>', "<details><summary>")


def notebook(page: Path, folder: Path) -> dict[str, Any]:
    """The chapter as a notebook (format 4.5) that lies in `folder`."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, text: str, **more: Any) -> None:
        if text.strip():
            source = text.strip("\n").splitlines(keepends=True)
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": source, **more})

    text, end = page.read_text(), 0
    folded = [found.span() for found in FOLDED.finditer(text)]
    for block in BLOCK.finditer(text):
        if any(first < block.start() < last for first, last in folded):
            continue
        add("markdown", moved(text[end : block.start()], page, folder))
        shown = {"output_type": "stream", "name": "stdout", "text": (block[2] or "").splitlines(keepends=True)}
        add("code", block[1], execution_count=None, outputs=[shown] if block[2] else [])
        end = block.end()
    add("markdown", moved(text[end:], page, folder))
    return {"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for page in CHAPTERS:
        path = folder / page.with_suffix(".ipynb").name
        path.write_text(json.dumps(notebook(page, folder.resolve()), indent=1, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
