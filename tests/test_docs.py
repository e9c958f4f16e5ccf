"""The documentation holds: its tables are what the code counts, its fences run, both READMEs agree, it builds."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import defaultdict
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

from daybreak.cli.main import VERBS
from daybreak.config import (
    _KIND_WORDS,
    Config,
    keys_of,
    may_change,
    resolve,
)
from daybreak.config_keys import toml_value
from daybreak.engine import EngineSpec, arena, plan_engine
from daybreak.kernels import Impl, Op, Recorder
from daybreak.report.bench import nbytes_of
from daybreak.report.plan import plan
from daybreak.shapes import ARCHS, parse_shape

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs"
OPERATIONS = PAGES / "operations.md"
CHAPTERS = sorted((PAGES / "learn").glob("[0-9]*.md"))
MEASURED_OPERATIONS = ROOT / "bench/results/operations_d48.csv"  # what `daybreak bench d48` printed
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
COPY, PRODUCT = 2.925e12, 690.9e12  # bytes/s, FLOP/s: the card's own limits, measured beside them


class Counting(Recorder):
    """Also adds up what each call moves and computes."""

    costs: ClassVar[dict[str, list[float]]] = {}

    def _bind(self, operation: Op, impl: Impl) -> Any:
        record, names = super()._bind(operation, impl), operation.parameters

        def count(*args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            cost = self.costs[operation.name]
            for i, x in enumerate((1, nbytes_of(operation, given), operation.flops(given))):
                cost[i] += x
            record(*args, **kwargs)

        return count


@cache
def costs() -> dict[str, tuple[float, ...]]:
    """Operation -> calls, bytes, FLOPs, least ms: one micro-step and update of d48, B = 16, recompute 2, on an H100."""
    options = {"B": 16, "T": 1024, "compute": "bf16", "recompute": 2, "device_type": "cuda"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "Recorder", Counting)
        patch.setattr(Counting, "costs", defaultdict(lambda: [0, 0, 0]))
        patch.setattr("daybreak.engine.passes.plan_arena", first_schedule_only)
        plan_engine(EngineSpec(parse_shape("d48"), **options))
        found = sorted(Counting.costs.items())
    return {name: (n, size, flops, 1e3 * max(size / COPY, flops / PRODUCT)) for name, (n, size, flops) in found}


def cost_cells(name: str) -> str:
    calls, size, flops, floor = costs()[name]
    return f"{calls} | {size / 1e9:.2f} | {f'{flops / 1e12:.2f}' if flops else ''} | {floor:.2f}"


def costs_table() -> str:
    """The costs of every operation, each with its section of the reference."""
    titles = {name: next(title for title, text in sections().items() if f"`{name}`" in text) for name in costs()}
    places = {name: title.lower().replace(" ", "-") for name, title in titles.items()}
    rows = [f"| [{name}](operations.md#{place}) | {cost_cells(name)} |" for name, place in places.items()]
    head = "| operation | calls | GB | TFLOP | least ms |\n|---|---|---|---|---|\n"
    total = sum(cost[-1] for cost in costs().values())
    return head + "\n".join(rows) + f"\n| **all** | | | | **{total:.1f}** |\n"


def sections() -> dict[str, str]:
    """Title -> text of each section of the operations' reference."""
    parts = re.split(r"^## (.*)\n", OPERATIONS.read_text(), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def section_table(text: str) -> str:
    """The costs of one section's operations, and what they took on an H100; "" without any."""
    took = {row["operation"]: row for row in csv.DictReader(MEASURED_OPERATIONS.open())}
    table = "| operation | calls | GB | TFLOP | least ms | measured ms |\n|---|---|---|---|---|---|\n"
    for name in (name for name in costs() if f"`{name}`" in text):
        assert int(took[name]["calls"]) == costs()[name][0]
        table += f"| {name} | {cost_cells(name)} | {took[name]['ms']} ({took[name]['backend']}) |\n"
    return table if table.count("\n") > 2 else ""


def first_schedule_only(table: Any, dtype: Any, state: Any, schedules: Any, *rest: Any) -> Any:
    return arena.plan_arena(table, dtype, state, schedules[:1], *rest)


def memory_table() -> str:
    """Planned against reported memory of the runs on several GPUs."""
    said = {row["what"]: row["value"] for row in csv.DictReader((ROOT / "bench/results/multi_gpu.csv").open())}
    rows = []
    for (shape, recompute), gpus in itertools.product((("d12", 0), ("d48", 2)), (1, 2, 4)):
        keys = {"batch.B": 16, "batch.recompute": recompute, "parallel.zero": int(gpus > 1)}
        p = plan(resolve(shape)[0].override(keys), gpu="h200", gpus=gpus)
        planned, arena_mib = (p.nbytes + p.outside) / 2**20, p.nbytes / 2**20
        where = "of one rank alone" if gpus == 1 else f"on rank 0 of {gpus}"
        driver = int(said[f"{shape} MiB {where} as the driver says"])
        rows.append(f"| {shape}, B 16, recompute {recompute}, {gpus} GPUs | {arena_mib:,.0f} | {planned:,.0f} | "
                    f"{driver:,} | {100 * (planned / driver - 1):+.1f} % |")  # fmt: skip
    return "| | arena, MiB | with what lies outside | the driver | |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def keys_table() -> str:
    """Every configuration key, section by section: default, meaning, rule (without one, its type)."""
    sections = {section: [f"{section}.{key}" for key in vars(keys)] for section, keys in vars(Config()).items()}
    whole = [section for section, names in sections.items() if all(map(may_change, names))]
    text = f"A resumed run may change these sections: {', '.join(whole)}. Of the others it may change:\n"
    some = [name for name in keys_of() if name.partition(".")[0] not in whole and may_change(name)]
    text += ", ".join(f"`{name}`" for name in some) + ".\n\n"
    titled = [(f"model, where `model.arch` is `{arch}`", shape(), arch) for arch, shape in ARCHS.items()]
    titled += [(section, keys, "gpt2") for section, keys in vars(Config()).items() if section != "model"]
    for title, keys, arch in titled:
        text += f"### {title}\n{(type(keys).__doc__ or '').splitlines()[0]}\n\n"
        text += "| key | default | meaning | allowed |\n|---|---|---|---|\n"
        for name in (f"{title.partition(',')[0]}.{key}" for key in vars(keys)):
            key = keys_of(arch)[name]
            rule, default = key.metadata["rule"], toml_value(key.default)
            allowed = rule.text.removeprefix("must be ").removeprefix("is not supported: ") if rule else ""
            text += (
                f"| `{name}` | `{default}` | {key.metadata['doc']} | {allowed or _KIND_WORDS[type(key.default)]} |\n"
            )
        text += "\n"
    return text.rstrip("\n") + "\n"


@pytest.mark.parametrize(
    ("page", "table"), [("tour.md", costs_table), ("plan.md", memory_table), ("parameters.md", keys_table)]
)
def test_generated_tables_are_up_to_date(page: str, table: Any) -> None:
    """On a difference: paste what the assertion prints."""
    text = (PAGES / page).read_text()
    assert table() in text, "\n" + table()


@pytest.mark.parametrize("title", sections())
def test_an_operation_s_section_says_what_it_costs(title: str) -> None:
    """On a difference: paste what the assertion prints."""
    text = sections()[title]
    assert section_table(text) in text, "\n" + section_table(text)


def fences(text: str, label: str) -> list[tuple[str, str]]:
    return re.findall(rf"^```(\w+) {label}\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda p: str(p.relative_to(PAGES)))
def test_every_fence_is_labelled(page: Path) -> None:
    opened = re.findall(r"^```(\S+.*)$", page.read_text(), re.M)
    assert {x.split(" ")[-1] for x in opened} <= {"ci", "gpu", "network", "text"}


@pytest.mark.parametrize("label", ["ci", "gpu", "network"])
def test_no_example_gives_two_runs_one_name(label: str) -> None:
    """A reader may paste a whole example, and a name that is taken is refused."""
    found = 0
    for page in [ROOT / "README.md", *PAGES.rglob("*.md")]:
        for _, text in fences(page.read_text(), label):
            made = re.findall(r"\btrain (?!runs/)\S.*?--name (\S+)", text.replace("\\\n", " "))
            assert len(made) == len(set(made)), f"{page.name}: {made}"
            found += len(made)
    assert found


def test_the_reference_s_derivations_hold() -> None:
    """Of operations that no chapter derives, the reference checks its formulas against autograd in fp64."""
    code = [text for language, text in fences(OPERATIONS.read_text(), "ci") if language == "python"]
    assert code
    for block in code:
        exec(block, {})


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_prints_what_it_shows(page: Path) -> None:
    """Its blocks run in order, as in one session of a reader. Each prints the text block right below it, or nothing."""
    blocks = re.findall(r"^```python ci\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", page.read_text(), re.M | re.S)
    assert any(shown for _, shown in blocks)
    session: dict[str, Any] = {"__name__": page.stem}
    for code, shown in blocks:
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, session)
        assert printed.getvalue() == shown, code


def test_the_course_s_pictures_are_what_their_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from learn_pictures import PICTURES

    committed = {path.stem: path.read_text() for path in (PAGES / "images/learn").glob("*.svg")}
    assert committed == {name: draw() for name, draw in PICTURES.items()}


def test_every_operation_has_its_section() -> None:
    """It names the operation's file, and a chapter that names this file too, or it checks the formulas itself."""
    from daybreak.kernels import all_ops

    for name, operation in all_ops().items():
        text = next((text for text in sections().values() if f"`{name}`" in text), "")
        assert f"`kernels/{operation.group}.py`" in text or name in ("gelu_forward", "gelu_backward"), name
        chapters = [(PAGES / page).read_text() for page in re.findall(r"\]\((learn/[^)#]*)", text)]
        derived = any(f"kernels/{operation.group}.py" in chapter for chapter in chapters)
        assert derived or "```python ci" in text or operation.group == "operand", name


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "README.zh-CN.md", *PAGES.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_paths_that_are_named_are_there() -> None:
    found = 0
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES.rglob("*.md")]:
        for path in re.findall(r"`((?:daybreak|bench|scripts|tests|examples|docs)/[a-z0-9_./]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
            found += 1
    assert found > 50


def test_the_chinese_readme_is_a_part_of_readme() -> None:
    """Its commands are README's, without the comments, and so is every figure outside of them."""
    ours, theirs = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    lines = [
        [x for fence in re.findall(r"^```.*?^```$", text, re.M | re.S) for x in fence.splitlines() if x[:1] != "#"]
        for text in (ours, theirs)
    ]
    assert len(lines[1]) > 10
    assert [line for line in lines[1] if line not in lines[0]] == []
    prose = [re.sub(r"^```.*?^```$|\([^)]*\)|`[^`]*`", "", text, flags=re.M | re.S) for text in (ours, theirs)]
    assert set(NUMBER.findall(prose[1])) <= set(NUMBER.findall(prose[0]))


def test_the_post_has_every_claim() -> None:
    """Every row says which of four things it is, and its commands are ours."""
    text = (PAGES / "llmc-post.md").read_text()
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", text, re.M) if "the post says" not in row]
    assert len(rows) >= 20
    for claim, command, result, status in rows:
        assert claim
        assert result
        assert status in ("measured", "tested small", "projected", "not run"), status
        verb = re.search(r"daybreak (\w+)", command)
        assert verb is None or verb[1] in {command.name for command in VERBS}
