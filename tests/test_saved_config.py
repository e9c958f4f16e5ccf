"""The checkpoint is the truth: a run's config.toml that was edited or cut changes nothing that a run cannot change.

A real run is trained once. Then every key of its config.toml gets another value, every key is taken away, and the file
is cut after every line.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from interop_runs import write_run
from recovery import assert_same, config, make_shards

import daybreak
from daybreak.cli.main import main
from daybreak.config import Config, keys_of, may_change, run_config
from daybreak.errors import ConfigError
from daybreak.manifest import checksum

# The four places of the data may differ: its content is compared when a run is resumed.
FREE = {name for name in keys_of() if may_change(name)} | {"data.name", "data.dir", "data.train", "data.val"}
TEXTS = ("x", "", "bytes", "none", "fp32", "auto", "torch", "plain", "live", "cosine", "constant", "stop", "continue",
         "wandb", "1:2", "never", "always", "gpt2", "muon", "nf4", "bf16", "5-6")  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> daybreak.Run:
    """Six steps, with checkpoints after the second and the fourth."""
    folder = tmp_path_factory.mktemp("truth")
    made = config(make_shards(folder / "shards"), folder, "straight", run__steps=6, checkpoint__every=2)
    return daybreak.train(made.override({"checkpoint.keep": 0}))


@pytest.fixture(scope="module")
def stopped(straight: daybreak.Run) -> Path:
    """The same run as it was after four steps."""
    shutil.copytree(straight.path, copy := straight.path.with_name("stopped"))
    shutil.rmtree(copy / "checkpoints/step-00000006")
    return copy


def edited(run: Path, name: str, value: str | None) -> str:
    """config.toml with another value of one key; None: without the key."""
    section, leaf = name.split(".")
    text = (run / "config.toml").read_text()
    line = "" if value is None else f"{leaf} = {value}\n"
    text, count = re.subn(rf"(\[{section}\]\n(?:[^\[].*\n)*?){leaf} = .*\n", lambda m: m[1] + line, text)
    assert count == 1, name
    return text


def other(now: Config, name: str) -> Any:
    """A value that this key could have instead."""
    value = dict(now.items())[name]
    numbers = (0, 1, 2, 3, 24, 32, 128, 256, 0.5)
    more: tuple[Any, ...] = (not value,) if isinstance(value, bool) else (((3, 64),),) if value == () else TEXTS
    for candidate in map(type(value), numbers) if type(value) in (int, float) else more:
        try:
            (made := now.override({name: candidate})).check()
        except ConfigError:
            continue
        if made != now:
            return candidate
    raise AssertionError(f"{name} could have no other value")


ALONE = ("model.arch", "run.epochs", "run.tokens")  # another family has other keys; what excludes run.steps


@pytest.mark.parametrize("name", [name for name in keys_of() if name not in ALONE])
def test_every_key_that_differs_is_taken_or_refused_by_name(stopped: Path, name: str) -> None:
    was = run_config(stopped)
    before, value = (stopped / "config.toml").read_text(), other(was, name)
    now = was.override({name: value})
    line = next(line for line in now.to_toml().splitlines() if line not in was.to_toml().splitlines())
    try:
        (stopped / "config.toml").write_text(edited(stopped, name, line.partition(" = ")[2]))
        if name in FREE:
            assert run_config(stopped) == now
        else:
            there, here = (re.escape(text.partition(" = ")[2].partition("  #")[0]) for text in (
                next(x for x in was.to_toml().splitlines() if x not in now.to_toml().splitlines()), line))  # fmt: skip
            with pytest.raises(ConfigError, match=rf"/step-00000004 .*: {name} = {here} instead of {there}; delete"):
                run_config(stopped)
        (stopped / "config.toml").write_text(before)
        (stopped / "config.toml").write_text(edited(stopped, name, None))
        assert run_config(stopped) == was
    finally:
        (stopped / "config.toml").write_text(before)


@pytest.mark.parametrize(("name", "value", "said"), [
    ("model.arch", '"x"', "model.arch = 'x' is not known; use one of gpt2"),
    ("run.epochs", "2.0", "run.steps = 6 and run.epochs = 2.0: give only one of them"),
    ("run.tokens", "128", "run.steps = 6 and run.tokens = 128: give only one of them"),
])  # fmt: skip
def test_the_other_keys(stopped: Path, tmp_path: Path, name: str, value: str, said: str) -> None:
    shutil.copytree(stopped, run := tmp_path / "run")
    (run / "config.toml").write_text(edited(stopped, name, value))
    with pytest.raises(ConfigError, match=rf"run/config\.toml: {said}"):
        run_config(run)


def test_only_the_model_of_an_import_is_settled(tmp_path: Path) -> None:
    """Its checkpoint has seen no data. Training may begin with any rate, and may be killed before its first save."""
    write_run(run := tmp_path / "run", "bytes")
    was = run_config(run)
    (run / "config.toml").write_text(was.override({"optim.lr": 0.5, "run.seed": 7}).to_toml())
    assert run_config(run).optim.lr == 0.5
    (run / "config.toml").write_text(was.override({"optim.lr": 0.5, "model.L": 9}).to_toml())
    with pytest.raises(ConfigError, match=r"cannot change: model\.L = 9 instead of \d; delete"):
        run_config(run)


def test_a_file_cut_after_any_line_is_the_same_configuration(stopped: Path) -> None:
    before, was = (stopped / "config.toml").read_text(), run_config(stopped)
    lines = before.splitlines(keepends=True)
    try:
        for end in range(len(lines)):
            (stopped / "config.toml").write_text("".join(lines[:end]))
            assert run_config(stopped) == was, end
    finally:
        (stopped / "config.toml").write_text(before)


def test_a_run_with_a_cut_file_ends_as_if_nothing_had_happened(straight, stopped, tmp_path, capsys) -> None:
    shutil.copytree(stopped, run := tmp_path / "cut")
    (run / "config.toml").write_text("schema = 1\n[checkpoint]\nkeep = 7\n")
    (run / "metrics.jsonl").write_text(
        "".join(line for line in (run / "metrics.jsonl").read_text().splitlines(True) if '"step":6' not in line)
    )
    assert main(["train", str(run)]) == 0
    assert_same(daybreak.Run(run), straight)
    assert "changed since the checkpoint: checkpoint.keep 0 -> 7\n" in capsys.readouterr().err


VERBS = ("train RUN", "train RUN --fork more", "plan RUN", "sample RUN", "eval RUN --hellaswag none.jsonl",
         "serve RUN --port 0", "export RUN --to llmc out", "report RUN", "watch RUN")  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_all_that_differs(stopped, tmp_path, capsys, monkeypatch, verb) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped, "run")
    text = edited(stopped, "model.NH", "4").replace("\nlr = 0.003 ", "\nlr = 0.5 ")
    Path("run/config.toml").write_text(text)
    assert main([word.replace("RUN", "run") for word in verb.split()]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "run/config.toml differs from run/checkpoints/step-00000004 " in said
    assert "model.NH = 4 instead of 2, optim.lr = 0.5 instead of 0.003; delete these lines" in said


def test_verbs_that_look_at_checkpoints_alone(stopped, tmp_path, capsys, monkeypatch) -> None:
    """`doctor` verifies the rest too. An export is the checkpoint's, and --init-from takes its weights."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped, "run")
    Path("run/config.toml").write_text(edited(stopped, "model.NH", "4"))
    assert main(["doctor", "run"]) == 5
    out = capsys.readouterr().out
    assert "good: run/checkpoints/step-00000004, step 4" in out
    assert "BAD: run/config.toml differs from run/checkpoints/step-00000004" in out
    assert main(["export", "run", "--to", "hf", "out"]) == 0
    assert '"n_head": 2' in Path("out/config.json").read_text()


def test_weights_with_other_heads_are_refused(stopped, tmp_path, capsys) -> None:
    """Heads show in no tensor's shape."""
    made = run_config(stopped).override({"model.NH": 4, "run.name": "other", "run.dir": str(tmp_path)})
    (tmp_path / "other.toml").write_text(made.to_toml())
    assert main(["train", str(tmp_path / "other.toml"), "--init-from", str(stopped)]) == 5
    said = capsys.readouterr().err
    assert "step-00000004 is of another model: model.NH is 2 there and 4 here;" in said
    assert "use the shape of these weights (--model.NH 2)." in said
    assert not (tmp_path / "other").exists()  # a folder would be resumed from random weights


def test_a_run_of_a_newer_version_says_so(
    straight: daybreak.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that only the future knows is no typing error."""
    shutil.copytree(straight.path, run := tmp_path / "future")
    (run / "config.toml").write_text((run / "config.toml").read_text() + "\n[attention]\nsinks = 4\n")
    for path in run.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["config"]["attention.sinks"] = 4
        path.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    assert main(["train", str(run), "--steps", "8"]) == 5
    said = capsys.readouterr().err
    newest = run / "checkpoints/step-00000006/manifest.json"
    fix = "it has the key 'attention.sinks', which this one does not know; upgrade."
    assert said == f"daybreak: {newest} was written by a newer daybreak: {fix}\n"
