"""Configuration: where the values of a target come from, be it a recipe, a shape, a TOML file or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daybreak.config import Config, check_resume, resolve
from daybreak.errors import ConfigError


def _saved_run(folder: Path, **values: Any) -> Config:
    folder.mkdir(parents=True)
    config = Config().override({"run.name": folder.name, "run.dir": str(folder.parent)} | values).concrete(500 * 4096)
    (folder / "config.toml").write_text(config.to_toml())
    return config


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(None)[0] == Config()
    shape, _ = resolve("d24")
    assert (shape.model.L, shape.model.C, shape.optim.lr, shape.run.name) == (24, 1024, 6e-4, "d24")
    Path("mine.toml").write_text("[model]\nL = 2\n[optim]\nlr = 0.5\nclip = 2\n[data]\ntrain = 'a'\nval = 'b'\n")
    recipe, resume = resolve("mine.toml", [("optim.lr", "0.25")])
    assert (recipe.model.L, recipe.model.C, recipe.optim.lr, recipe.optim.clip) == (2, 768, 0.25, 2.0)
    assert recipe.run.name == "mine"
    assert resume is None
    assert resolve("mine.toml", [("data.name", "book")])[0].data.train == ""
    assert resolve("mine.toml", [("optim.lr", "1"), ("optim.lr", "2")])[0].optim.lr == 2.0
    saved = _saved_run(Path("runs/old"), **{"optim.lr": 0.125, "eval.every": 7})
    config, resume = resolve("runs/old", [("eval.every", "9")])
    assert (config.optim.lr, config.eval.every, config.run.steps) == (0.125, 9, 500)
    assert resume is not None
    assert (resume.run, resume.saved) == (Path("runs/old"), saved)


def test_the_form_of_the_target_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2-124M")[0].data.name == "fineweb-10B"  # the recipe, not only the shape of that name
    assert resolve("gpt3:c768")[0].model.max_T == 2048
    assert resolve("gpt3:c768")[0].run.name == "gpt3-c768"
    _saved_run(Path("tiny"), **{"optim.lr": 0.125})
    config, resume = resolve("tiny")  # an existing run comes first
    assert config.optim.lr == 0.125
    assert resume is not None
    Path("tiny/config.toml").rename("other.toml")
    assert resolve("tiny")[0].model.C == 128  # a folder that is no run does not hide the recipe
    assert Config.from_target("tiny") == resolve("tiny")[0]


def test_a_run_is_where_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = _saved_run(Path("runs/old"))
    Path("runs").rename("moved")
    config, resume = resolve("moved/old/")
    assert (config.run.dir, config.run.name) == ("moved", "old")
    assert resume is not None
    check_resume(saved, config)
    monkeypatch.chdir("moved/old")
    assert resolve(".")[0].run.name == "old"


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ([], "def "),
        ([("data.name", "stdlib")], "def "),
        ([("data.name", "book")], ""),
        ([("data.name", "stdlib=0.5,book=0.5")], ""),
        ([("data.train", "a*.bin"), ("data.val", "b*.bin")], ""),
        ([("data.name", "book"), ("eval.prompt", "It was")], "It was"),
    ],
)
def test_the_demos_prompt_is_of_its_own_data(given: list[tuple[str, str]], prompt: str) -> None:
    """A document of other data does not begin with "def"."""
    assert resolve("tiny", given)[0].eval.prompt == prompt


def test_a_prompt_that_was_saved_or_written_down_stays(tmp_path: Path) -> None:
    """Of an old run whatever its data, and of one's own recipe with other data."""
    saved = _saved_run(tmp_path / "old", **{"data.name": "book", "eval.prompt": "def "})
    assert resolve(str(tmp_path / "old"), [("data.name", "other")])[0].eval.prompt == saved.eval.prompt == "def "
    (tmp_path / "mine.toml").write_text('[eval]\nprompt = "Once"\n')
    assert resolve(str(tmp_path / "mine.toml"), [("data.name", "other")])[0].eval.prompt == "Once"


UNKNOWN_TARGETS = [
    ("tini", "unknown target 'tini'; did you mean 'tiny'? "),
    ("gpt2-124m", "unknown target 'gpt2-124m'; did you mean 'gpt2-124M'? "),
    ("d13", "unknown target 'd13'; did you mean 'd12'? "),
    ("mine", "unknown target 'mine'; none has this name. "),
    ("gpt3:c769", "unknown target 'gpt3:c769'; did you mean 'gpt3:c768'? "),
    ("none.toml", "none.toml does not exist; recipes shipped with daybreak: "),
    ("empty", "empty is not a run: it has no config.toml; give a folder that daybreak train made."),
    ("old", "unknown target 'old'; to resume the run of that name give its folder: runs/old."),
    ("runs/olf", "runs/olf does not exist; did you mean runs/old?"),
    ("runs/nosuch", "runs/nosuch does not exist; give a run's folder, "),
    ("runs/old/log", "runs/old/log is not a run: it has no config.toml; it is a file of a run: give runs/old."),
    ("runs/log", "runs/log is not a run: it has no config.toml; give a folder that daybreak train made."),
]


@pytest.mark.parametrize(("target", "sentence"), UNKNOWN_TARGETS)
def test_an_unknown_target(target: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    _saved_run(Path("runs/old"))
    for file in ("runs/old/log", "runs/log"):
        Path(file).touch()
    with pytest.raises(ConfigError) as e:
        resolve(target)
    assert str(e.value).startswith(sentence)
    if "unknown target" in sentence and sentence.endswith(" "):
        assert str(e.value).endswith(
            "Recipes: gpt2-124M, gpt2-1558M, gpt2-350M, gpt2-774M, gpt3-125M, llama-1B, nanochat-d12, nanochat-d24, "
            "shapes, smollm-135M, tiny; or a shape such as d12, a recipe.toml, or a run's folder."
        )


# The contract: run, log, eval, checkpoint, guard, cost, parallel, kernels, batch sizes, recompute, weight layout,
# horizon; but not the seed.
