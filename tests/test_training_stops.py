"""Whole runs in processes of their own: killed, stopped by signals, refused, two at once. Nothing is lost."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
from patience import PATIENCE, until
from test_training import assert_same, config, shards  # noqa: F401  (a fixture)

import daybreak


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    ranks.end_all()


def start(args: list[Any], cwd: Path | None = None) -> ranks.Forked:
    """`daybreak train ARGS` in a process of its own."""
    return ranks.alone(["train", *args, "--quiet"], cwd or Path.cwd())


def wait_for_steps(folder: Path, process: ranks.Forked, steps: int) -> None:
    """Until the run has written `steps` more step records."""

    def count() -> int:
        try:
            return (folder / "metrics.jsonl").read_bytes().count(b'"kind":"step"')
        except FileNotFoundError:
            return 0

    goal = count() + steps
    until(lambda: count() >= goal, process)


def refused(folder: Path, *args: object) -> str:
    """The message of a `daybreak train ARGS` that is refused."""
    line, said = ["train", *args, "--quiet", "--json"], folder / "said.txt"
    assert ranks.finish([ranks.alone(line, folder, err=said)]) == [2]
    return said.read_text()


def test_kill_and_signals_in_a_real_process(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """SIGKILL in mid-run, TERM, INT, USR1: each time `train RUN` goes on, and the end equals an undisturbed run's."""
    keys = {"checkpoint__every": 20, "optim__horizon": 300, "schedule__final_frac": 0.1}
    target = tmp_path / "recipe.toml"  # its end is far away: a busy machine may be slow to send a signal
    target.write_text(config(shards, tmp_path, "killed", run__steps=100000, **keys).to_toml())
    folder = tmp_path / "killed"
    args: list[str | Path] = [target]
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 75)):
        process = start(args)
        args = [folder]
        wait_for_steps(folder, process, 25)
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
    process = start(args)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        wait_for_steps(folder, process, 5)
        before = {p.name for p in daybreak.load(folder).checkpoints}
        process.send_signal(number)
    assert process.wait(PATIENCE) == 75
    assert before
    steps = int(daybreak.load(folder).checkpoints[0].name[5:]) + 10
    assert start([folder, "--steps", steps]).wait(PATIENCE) == 0
    straight = daybreak.train(config(shards, tmp_path, "straight", run__steps=steps, **keys))
    assert_same(straight, daybreak.load(folder))


def test_exit_json_never_speaks_for_another_attempt(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """A finished run, resumed and killed, must not still say 0; nor may a refused start leave the old verdict."""
    run = daybreak.train(config(shards, tmp_path, "a", run__steps=5, schedule__final_frac=0.1))
    assert json.loads(run.folder.exit.read_text())["code"] == 0
    process = start([run.path, "--steps", "100000"])
    wait_for_steps(run.path, process, 5)
    process.kill()
    assert process.wait(PATIENCE) == -9
    assert not run.folder.exit.exists()
    assert daybreak.load(run.path).config.run.steps == 100000  # what was asked for holds from then on
    assert "run.device = 'cuda:77'" in refused(tmp_path, run.path, "--run.device", "cuda:77")
    assert json.loads(run.folder.exit.read_text())["code"] == 2


def test_one_process_at_a_time(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    run = daybreak.train(config(shards, tmp_path, "a", run__steps=2, schedule__final_frac=0.1))
    process = start([run.path, "--steps", "100000"])
    wait_for_steps(run.path, process, 3)
    holder = f"process {process.pid} on {socket.gethostname()}"
    said = refused(tmp_path, run.path, "--steps", "100000")
    assert said == f"daybreak: {run.path} is being trained by {holder}; wait or stop it.\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75
    assert json.loads(run.folder.exit.read_text())["code"] == 75


def test_given_weights_survive_an_early_kill(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """--init-from and --fork save before their first step: nothing else says where the weights came from."""
    first = daybreak.train(config(shards, tmp_path, "first", run__steps=30))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config(shards, tmp_path, "second", run__steps=100000).to_toml())
    process = start([recipe, "--init-from", first.path])
    wait_for_steps(tmp_path / "second", process, 1)
    process.kill()
    process.wait(PATIENCE)
    resumed = daybreak.load(tmp_path / "second")
    run = daybreak.train(resumed.config.override({"run.steps": 3}), resume=resumed.path)
    assert run.metrics("val")[0]["loss"] == first.metrics("val")[-1]["loss"]


def test_a_signal_while_the_corpus_is_prepared(tmp_path: Path) -> None:
    process = start(["d12", "--data", "stdlib"], cwd=tmp_path)
    until(lambda: list(tmp_path.glob("data/.*")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("data/*/*"))
