"""The programs beside the package import only names that exist: most of them run on a GPU machine alone."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(p for folder in ("bench", "scripts", "examples") for p in (ROOT / folder).glob("*.py"))


def defined(path: Path) -> set[str]:
    """The names that a file's top level defines or assigns."""
    body = ast.parse(path.read_text()).body
    assigned = {x.id for part in body for x in ast.walk(part) if isinstance(x, ast.Name)}
    return assigned | {part.name for part in body if isinstance(part, ast.FunctionDef | ast.ClassDef)}


def missing(path: Path) -> list[str]:
    """Every `from module import name` of a file, in its functions too, where our module has no such name."""
    found = []
    for node in (x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.ImportFrom)):
        module, beside = node.module or "", path.with_name(f"{node.module}.py")
        for name in (alias.name for alias in node.names):
            if module.split(".")[0] == "daybreak":
                there = hasattr(found_in := importlib.import_module(module), name) or (
                    hasattr(found_in, "__path__") and importlib.util.find_spec(f"{module}.{name}")
                )
            else:
                there = not beside.exists() or name in defined(beside)
            found += [] if there else [f"{module}.{name}"]
    return found


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imported_names_exist(path: Path) -> None:
    assert missing(path) == []


def test_names_that_do_not_exist_are_found(tmp_path: Path) -> None:
    (tmp_path / "timing.py").write_text("A, B = 1, 2\n\ndef median(): ...\n")
    (tmp_path / "program.py").write_text(
        "from daybreak.report.bench import batches, PRODUCTS\nfrom daybreak.data import shards\n"
        "def main():\n    from timing import A, B, C, median\n    from numpy import nothing\n"
    )
    assert missing(tmp_path / "program.py") == ["daybreak.report.bench.PRODUCTS", "timing.C"]


def test_each_section_of_the_smoke_test_has_runs_of_its_own() -> None:
    """All sections share one folder, so two that name the same run would fail, or compare the run of the other."""
    text = (ROOT / "bench/gpu_smoke.sh").read_text()
    parts = re.split(r"^section_(\w+)\(\) \{", text, flags=re.MULTILINE)
    made: dict[str, str] = {}
    for section, body in zip(parts[1::2], parts[2::2], strict=True):
        body = body.split("\n}\n")[0]
        own = set(re.findall(r"--name ([\w$-]+)", body))
        assert not own & set(made), f"{section} and {made[min(own & set(made))]} both make {own & set(made)}"
        made |= dict.fromkeys(own, section)
        assert set(re.findall(r"\bruns/([\w$-]+)", body)) <= own, section
        assert {run for pair in re.findall(r"\$checks (?:same|near) (\S+) ([\w$-]+)", body) for run in pair} <= own, (
            section
        )
    assert len(made) > 40
