"""How long a run is and where it starts: longer than its schedule, finished, by tokens or epochs, from a checkpoint."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from recovery import assert_same, config, make_shards, recipe, train

import daybreak
from daybreak.cli.main import main
from daybreak.cli.train import _print_result
from daybreak.config import Config, resolve
from daybreak.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_steps_at_learning_rate_0_are_refused_with_two_commands_that_work(
    shards: Path, tmp_path: Path, schedule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=4, schedule__name=schedule))
    before = (run.path / "config.toml").read_text()
    capsys.readouterr()
    assert main(["train", str(run.path), "--steps", "6"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"daybreak: --steps 6 adds 2 steps to {run.path}, each with learning rate 0: its schedule ends at step 4 "
    )
    told = json.loads((run.path / "exit.json").read_text())
    assert (before, said) == ((run.path / "config.toml").read_text(), f"daybreak: {told['reason']}\n")
    assert told["code"] == 2
    commands = [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("  daybreak train ")]
    assert len(commands) == 2
    for command in reversed(commands):  # the copy first: the other one makes the run itself longer
        assert main(command) == 0
        name = "r-longer" if "--fork" in command else "r"
        rates = [record["lr"] for record in daybreak.Run(tmp_path / name).metrics("step")]
        assert len(daybreak.Run(tmp_path / name).metrics("step")) == (2 if "--fork" in command else 6)
        assert all(rate > 0 for rate in rates)


def test_the_refusal_asks_only_for_the_steps_that_are_added(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was planned beyond its horizon is resumed as ever; so is one whose rate does not end at 0."""
    planned = config(shards, tmp_path, "p", run__steps=6, optim__horizon=4, run__max_hours=1e-9)
    with pytest.raises(daybreak.Error, match="before the first update"):
        daybreak.train(planned)
    saved = daybreak.load(tmp_path / "p").config
    run = daybreak.train(saved.override({"run.max_hours": 0.0}), resume=tmp_path / "p")
    assert [record["lr"] for record in run.metrics("step")][4:] == [0.0, 0.0]
    assert f"{run.path} has no checkpoint yet (checkpoint.every): it starts from step 0." in caplog.text
    for name, more in (("c", {"schedule__name": "constant"}), ("f", {"schedule__final_frac": 0.5})):
        made = daybreak.train(config(shards, tmp_path, name, run__steps=2, **more))
        caplog.clear()
        longer = daybreak.train(made.config.override({"run.steps": 3}), resume=made.path)
        assert longer.metrics("step")[-1]["lr"] > 0
        past = re.search(r"the schedule ended at step 2: .* last learning rate, (\S+)\. .*horizon 3\.", caplog.text)
        assert past is None if name == "c" else past and float(past[1]) == longer.metrics("step")[-1]["lr"]
    with pytest.raises(ConfigError, match=r"--fork q --steps 8 --optim\.horizon 8"):
        daybreak.train(run.config.override({"run.steps": 8, "run.name": "q"}), fork_from=run.path)
    assert not (tmp_path / "q").exists()
    with pytest.raises(ConfigError, match="--steps 175 adds 169 steps"):  # five epochs of 35 steps
        daybreak.train(run.config.override({"run.steps": 0, "run.epochs": 5}), resume=run.path)


def test_a_finished_run_has_nothing_to_do(shards: Path, tmp_path: Path) -> None:
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=3))
    metrics = run.folder.metrics.read_bytes()
    code, err = train([run.path])
    done = f"nothing to do: {run.path} has made its 3 steps; --steps N --optim.horizon N trains it to step N.\n"
    assert (code, err) == (0, done)
    assert run.folder.metrics.read_bytes() == metrics


def test_a_finished_run_says_one_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of what a training ends with: it made no step. Programs get their object all the same."""
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=3))
    capsys.readouterr()
    assert main(["train", str(run.path), "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "", f"nothing to do: {run.path} is at step 3, past --steps 2; give more than 3.\n"
    )  # fmt: skip
    assert main(["train", str(run.path)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["train", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert main(["train", str(run.path), "--data", "other"]) == 0
    done = f"nothing to do: {run.path} has made its 3 steps; --steps N --optim.horizon N trains it to step N."
    globs = "".join(f'data.{k} "{getattr(run.config.data, k)}" -> "", ' for k in ("train", "val"))[:-2]
    assert capsys.readouterr().err == f'{done} Not read: data.name "stdlib" -> "other", {globs}.\n'


def test_serve_is_advised_with_the_command_that_installs_it(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = str(recipe(config(shards, tmp_path, "r", run__steps=1), tmp_path))
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["train", made]) == 0
    assert capsys.readouterr().out.endswith(
        " a prompt in a browser, after pip install -e '.[serve]' in daybreak's folder\n"
    )


def test_what_was_stopped_in_its_last_validation_is_not_finished(shards: Path, tmp_path: Path) -> None:
    args = [recipe(config(shards, tmp_path, "r", run__steps=10, eval__every=0, checkpoint__every=0), tmp_path)]
    assert train(args, {"do": "term", "at": "call:daybreak.engine.step:Engine.eval_losses"})[0] == 75
    assert daybreak.Run(tmp_path / "r").checkpoint().step == 10
    assert train([tmp_path / "r"])[0] == 0
    assert daybreak.Run(tmp_path / "r").metrics("val")[-1]["step"] == 10


def test_tokens_and_epochs_are_steps(shards: Path, tmp_path: Path) -> None:
    """A step takes 128 tokens, an epoch 35 steps: (3000 - 1) // 16 + (1500 - 1) // 16 = 280 samples."""
    for flags, steps in ((("--tokens", "0.512K"), 4), (("--epochs", "0.2"), 7), (("--tokens", "700"), 5)):
        made = recipe(config(shards, tmp_path, "r" + flags[1], run__steps=99, schedule__warmup=-1), tmp_path)
        assert train([made, *flags])[0] == 0
        run = daybreak.Run(tmp_path / ("r" + flags[1]))
        assert len(run.metrics("step")) == run.config.run.steps == run.config.optim.horizon == steps
        assert (run.config.run.tokens, run.config.run.epochs) == (0, 0.0)
    plan = daybreak.plan(Config().override({"run.tokens": 1_000_000_000, "batch.total_tokens": 524288, "batch.B": 8}))
    assert plan.config.run.steps == 1907
    assert daybreak.plan(config(shards, tmp_path, "x", run__epochs=2.0)).config.run.steps == 70
    assert daybreak.plan(config(shards, tmp_path, "x", run__steps=0)).config.run.steps == 35  # an epoch of what is here
    gone = {"data__train": str(tmp_path / "no*.bin")}
    assert daybreak.plan(config(shards, tmp_path, "x", run__steps=0, **gone)).config.run.steps == 0
    with pytest.raises(DataError, match="no token shard matches"):
        daybreak.plan(config(shards, tmp_path, "x", run__epochs=1.0, **gone))


def test_one_length_replaces_another_and_two_are_refused(tmp_path: Path) -> None:
    assert resolve("tiny", [("run.epochs", "2")])[0].run.steps == 0
    made = tmp_path / "e.toml"
    made.write_text("schema = 1\n[run]\nepochs = 3\n")
    assert resolve(str(made))[0].run.epochs == 3.0
    assert resolve(str(made), [("run.steps", "5")])[0].run.epochs == 0.0
    with pytest.raises(
        ConfigError, match=r"^run\.epochs = 2\.0 and run\.tokens = 1000000000: give only one of them\.$"
    ):
        resolve("tiny", [("run.epochs", "2"), ("run.tokens", "1b")])
    for bad in ("1X", "B", "1.2.3B", "-1B"):
        with pytest.raises(ConfigError, match=r"run\.tokens = "):
            resolve("tiny", [("run.tokens", bad)])


def test_a_new_run_starts_from_an_older_checkpoint(shards: Path, tmp_path: Path) -> None:
    """Forked from step 5, with nothing changed, it is the run itself once more."""
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=12, checkpoint__keep=0, eval__every=0))
    older = run.path / "checkpoints/step-00000005"
    assert train([older, "--fork", "y"])[0] == 0
    forked = daybreak.Run(tmp_path / "y")
    assert [r["step"] for r in forked.metrics("step")] == list(range(6, 13))
    run.folder.metrics.write_text(
        "".join(x for x in run.folder.metrics.read_text().splitlines(True) if '"step",' not in x or _step(x) > 5)
    )
    assert_same(run, forked)
    code, err = train([older])
    assert code == 2
    assert err == (
        f"daybreak: {older} is a checkpoint: start a new run from it with --fork NAME, or resume the run from its "
        f"newest one with `daybreak train {run.path}`.\n"
    )
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7; there are: 5, 10, 12\."):
        daybreak.train(run.config.override({"run.name": "z"}), fork_from=run.path / "checkpoints/step-00000007")
    assert train([run.path, "--fork", "z"]) == (
        2, f"daybreak: {run.path}/checkpoints/step-00000012 is at step 12 of run.steps = 12; give --steps more.\n"
    )  # fmt: skip
    assert not (tmp_path / "z").exists()
    began = daybreak.train(config(shards, tmp_path, "w", run__steps=1, eval__every=1), init_from=older)
    again = daybreak.train(config(shards, tmp_path, "v", run__steps=1, eval__every=1), init_from=run.path)
    assert began.metrics("val")[0]["loss"] != again.metrics("val")[0]["loss"]


def _step(line: str) -> int:

    return int(json.loads(line)["step"])


def test_a_diverged_run_says_so(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = {"optim__lr": 30.0, "schedule__name": "constant", "optim__clip": 0.0, "guard__max_skips": 1000}
    made = recipe(
        config(shards, tmp_path, "wild", run__steps=20, guard__loss_z=0.0, guard__norm_z=0.0, **wild), tmp_path
    )
    assert main(["train", str(made), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "The run diverged: its validation loss ended at " in out
    assert main(["train", str(recipe(config(shards, tmp_path, "tame", run__steps=20), tmp_path)), "--quiet"]) == 0
    assert "The run diverged" not in capsys.readouterr().out


def test_home_is_expanded_wherever_a_path_is_given(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s").symlink_to(shards)
    made = config(shards, tmp_path, "r", run__steps=2)
    text = made.to_toml().replace(f'"{shards}/', '"~/s/').replace(f'"{tmp_path}"', '"~/runs"')
    assert text.count("~/") == 3
    (tmp_path / "r.toml").write_text(text)
    assert main(["train", "~/r.toml", "--quiet"]) == 0
    assert daybreak.load("~/runs/r").checkpoint().step == 2
    for verb in (["sample", "~/runs/r", "--tokens", "3"], ["doctor", "~/runs/r"], ["plan", "~/runs/r"],
                 ["report", "~/runs/r", "-o", "~/page.html"], ["report", "~/runs/r", "--out=~/other.html"],
                 ["export", "~/runs/r", "--to", "hf", "~/hf"],
                 ["train", "~/r.toml", "--init-from", "~/hf", "--name", "i"],
                 ["train", "tiny", "--data", "~/s=1", "--run.dir=~/x", "--print-config"]):  # fmt: skip
        capsys.readouterr()
        assert main(verb) == 0, (verb, capsys.readouterr().err)
    printed = capsys.readouterr().out
    assert f'name = "{tmp_path}/s=1"' in printed
    assert f'dir = "{tmp_path}/x"' in printed
    assert all((tmp_path / name).exists() for name in ("page.html", "other.html", "hf/config.json", "runs/i"))
    for flags in (["--eval.prompt", "~/x"], ["--eval.prompt=~/x"]):  # a text is no path
        assert main(["train", "tiny", "--print-config", *flags]) == 0
        assert 'prompt = "~/x"' in capsys.readouterr().out


def test_a_run_that_learns_by_heart_says_when_it_was_best(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last lines of a run whose file of metrics has validation losses that rise, and training losses that fall."""
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=2, eval__every=1))
    lines = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]

    def said(vals: list[float], steps: list[float]) -> str:
        for line in lines:
            if line["kind"] in ("val", "step"):
                line["loss"] = vals[line["step"]] if line["kind"] == "val" else steps[line["step"] - 1]
        run.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        capsys.readouterr()
        _print_result(run, as_json=False)
        return capsys.readouterr().out

    low, nan = "It was lowest at step 1: 3.0000. If the training loss fell on", float("nan")
    for vals, steps, lines_of_it in (
        ([5.0, 3.0, 3.5], [4.0, 2.0], [low]),
        ([5.0, 3.0, 5.5], [4.0, 2.0], [low]),
        ([5.0, 5.2, 5.01], [5.0, 4.0], ["It was lowest at step 0: 5.0000. If the training loss fell on"]),
        ([5.0, 4.99, 4.995], [5.0, 4.0], []),  # 2 % are noise
        ([5.0, 3.0, 5.5], [4.0, 9.0], ["The run diverged: its validation loss ended at 5.5, above its start."]),
        ([5.0, 3.0, nan], [4.0, 2.0], ["The run diverged: its validation loss ended at nan, above its start."]),
        ([5.0, 3.0, 5.5], [4.0, nan], ["The run diverged: its validation loss ended at 5.5, above its start."]),
        ([5.0, 3.0, 2.9], [4.0, 2.0], []),
    ):
        out = said(vals, steps)
        assert [text in out for text in lines_of_it] == [True] * len(lines_of_it), out
        assert sum(out.count(text) for text in ("It was lowest", "diverged")) == len(lines_of_it)
    assert "validation loss 5.0000 -> 2.9000" in out
    next(line for line in lines if line["kind"] == "val" and line["step"] == 1)["tokens_evaluated"] += 16
    out = said([5.0, 1.0, 2.9], [4.0, 2.0])  # eval.tokens was another one at step 1
    assert "It was lowest" not in out
    assert "validation loss 5.0000 -> 2.9000" in out
    lines = [line for line in lines if line["kind"] != "val" or line["step"] == 2]  # as with eval.every = 0
    assert "validation loss 2.9000 (baseline" in said([5.0, 3.0, 2.9], [4.0, 2.0])
