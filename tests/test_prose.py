"""README and docs are plain English that a machine can vouch for: short sentences, few figures, the field's words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PAGES += [README, ROOT / "CONTRIBUTING.md"]
SECTIONS = ["Install", "Two commands", "Two minutes on a laptop", "I want to", "Your own text", "One GPU", "Many GPUs",
            "What it does not do", "Speed", "Documentation, citation, licence"]  # fmt: skip
# Words that we do not use, and why not: the field says it otherwise, or English does.
UNUSED = r"""cards?(?! catalogue) yardsticks? (?<!dot\s)(?:matrix\ )?products? go(?:es)?\ on texts hangs?\ up be\ it
    costs?\ no (?:is|are)\ told has\ no\ image leaps? apart,\ as in\ that\ order,\ in\ that nobody\ knows whoever
    therein thereof knows\ no what\ is\ more to\ the\ last\ (?:bit|byte)"""
UNUSED_WORD = re.compile("|".join(rf"\b{word}\b" for word in re.split(r"(?<!\\)\s+", UNUSED)), re.I)


def blocks(text: str) -> tuple[list[str], list[str]]:
    """Paragraphs and list items, and the cells of tables: without fences, headings, pictures; a code span is a word."""
    text = re.sub(r"^```.*?^```$|^#.*?$|<[^>]*>|!\[.*?\]\(.*?\)|\$\$.*?\$\$", "\n", text, flags=re.M | re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "Code", text)).replace("*", "")
    cells = [cell for row in re.findall(r"^\|(.*)\|$", text, re.M) for cell in row.split("|")]
    prose = re.split(r"\n\s*\n|\n(?=\s*(?:[-*>]|\d+\.) )", re.sub(r"^\|.*\|$", "\n", text, flags=re.M))
    return prose, cells


def sentences(parts: list[str]) -> list[list[str]]:
    """Words of every sentence."""
    ended = (s for part in parts for s in re.split(r"(?<=[\w)%\"'$][.!?])[\"')]?\s+", part))
    words = [[w for w in s.split() if re.search(r"\w", w)] for s in ended]
    return [w for w in words if w]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sentences_are_short_and_plain(page: Path) -> None:
    prose, cells = blocks(page.read_text())
    found = sentences(prose)
    long = [" ".join(s) for s in found + sentences(cells) if len(s) > 35]
    assert not long, "\n".join(long)
    mean = sum(map(len, found)) / len(found)
    assert mean <= 18, f"{mean:.1f} words a sentence"
    unused = [m[0] for m in UNUSED_WORD.finditer(re.sub(r'"[^"]*"', "", "\n".join(prose + cells)))]
    assert not unused, unused


def test_readme_is_short_and_has_few_figures() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    code = [line for fence in re.findall(r"^```.*?^```$", text, re.M | re.S) for line in fence.splitlines()]
    assert [line for line in code if len(line) > 88] == []
    prose, cells = blocks(text)
    words = [w for part in prose + cells for w in part.split() if re.search(r"\w", w)]
    figures = [w for w in words if re.search(r"\d", w)]
    assert len(figures) <= 0.06 * len(words), f"{len(figures)} of {len(words)}: {figures}"
