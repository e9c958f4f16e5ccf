"""data.skip: runs that leave out windows of data, and take exactly the batches that follow them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import recovery
import torch
from numpy.typing import NDArray
from recovery import assert_same, curve
from test_packing import make_set

import daybreak
from daybreak.config import Config
from daybreak.data.loader import Loader
from daybreak.data.mixing import open_loaders
from daybreak.engine import Engine
from daybreak.errors import ConfigError

ROWS = 8  # samples of a step
Taken = list[tuple[NDArray[Any], ...]]  # of each step: tokens and targets, and positions of packed rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recovery.make_shards(tmp_path_factory.mktemp("skip") / "shards")


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    ranks.end_all()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """The batches that engines are given from now on."""
    found: Taken = []
    original = Engine.micro_step

    def noting(self: Engine, *parts: torch.Tensor, first: bool, last: bool) -> None:
        rows = tuple(part.numpy().copy() for part in parts)
        found.append(rows if first else tuple(map(np.concatenate, zip(found.pop(), rows, strict=True))))
        original(self, *parts, first=first, last=last)

    monkeypatch.setattr(Engine, "micro_step", noting)
    return found


def loader_of(c: Config) -> Loader:
    return open_loaders(c.data, c.T, c.run.seed, c.model.V, True, None)[1]


def assert_taken(taken: Taken, c: Config, numbers: list[int]) -> None:
    """The steps took the batches of these numbers, from 1, of the whole order."""
    loader = loader_of(c)
    assert len(taken) == len(numbers)
    for got, number in zip(taken, numbers, strict=True):
        want = loader.batch((number - 1) * ROWS, ROWS)
        assert len(got) == len(want)
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), number


def straight(shards: Path, runs: Path, **values: Any) -> Config:
    return recovery.config(shards, runs, "straight", **{"run__steps": 40, "checkpoint__keep": 0} | values)


def fork(of: daybreak.Run, step: int, name: str, **values: Any) -> daybreak.Run:
    config = of.config.override({"run.name": name} | {k.replace("__", "."): v for k, v in values.items()})
    return daybreak.train(config, fork_from=of.path / f"checkpoints/step-{step:08d}")


def test_a_fork_leaves_out_windows_and_takes_what_follows(shards: Path, tmp_path: Path, taken: Taken) -> None:
    """40 steps; again from step 20 without the batches of 26 to 30, and of what is then step 33. An epoch has 35."""
    run = daybreak.train(straight(shards, tmp_path))
    assert_taken(taken, run.config, [*range(1, 41)])
    taken.clear()
    forked = fork(run, 20, "forked", data__skip="26-30,33-33")
    assert_taken(taken, run.config, [*range(21, 26), *range(31, 38), *range(39, 47)])
    before, after = curve(run), curve(forked)
    assert after[:5] == before[20:25]
    assert all(a[1] != b[1] for a, b in zip(after[5:], before[25:], strict=True))
    tokens = [r["tokens"] for r in forked.metrics("step")]  # what is left out counts
    assert tokens == [n * ROWS * 16 for n in (*range(21, 26), *range(31, 38), *range(39, 47))]
    assert load(forked)["samples"] == 46 * ROWS


def load(run: daybreak.Run) -> dict[str, Any]:
    return run.checkpoint().manifest


def test_where_runs_stop_and_resume_does_not_matter(shards: Path, tmp_path: Path, taken: Taken) -> None:
    """Before, at and after each window, with one that is given only on the way; and forks of forks."""
    whole = daybreak.train(straight(shards, tmp_path, run__name="whole", data__skip="6-8,9-9,14-30"))
    order = [*range(1, 6), 9, 10, 11, *range(13, 17), *range(17, 18), *range(35, 62)]
    assert_taken(taken, whole.config, order)
    for stops in ((5, 8, 9, 13, 14), (6, 10, 20)):
        taken.clear()
        halves = straight(shards, tmp_path, run__name=f"halves{stops[0]}", data__skip="6-8", run__steps=stops[0])
        run = daybreak.train(halves.override({"optim.horizon": 40}))
        late = {"data.skip": "6-8,9-9,14-30"}  # from here on
        for stop in (*stops[1:], 40):
            run = daybreak.train(run.config.override(late | {"run.steps": stop}), resume=run.path)
        assert_taken(taken, whole.config, order)
        assert curve(run) == curve(whole)
        assert load(run)["samples"] == load(whole)["samples"] == order[-1] * ROWS
    taken.clear()
    again = fork(whole, 15, "again", data__skip="6-8,9-9,14-30,20-20")
    assert_taken(taken, whole.config, [*range(37, 41), *range(42, 63)])
    assert again.config.data.skip == "6-8,9-9,14-30,20-20"


def test_a_batch_that_grows(shards: Path, tmp_path: Path, taken: Taken) -> None:
    """A window's steps have the batches of their time: 8 samples to step 5, then 16."""
    c = straight(shards, tmp_path, batch__ramp=((5, 256),), run__steps=9, data__skip="4-7")
    run, loader = daybreak.train(c), loader_of(c)
    assert [len(rows[0]) for rows in taken] == [8] * 5 + [16] * 4
    firsts = [0, 8, 16, 24 + 8 + 8 + 16 + 16, 80, *(88 + 16 * i for i in range(4))]
    for rows, first in zip(taken, firsts, strict=True):
        assert np.array_equal(rows[0], loader.batch(first, len(rows[0]))[0])
    assert load(run)["samples"] == 88 + 64


def test_packed_rows(tmp_path: Path, taken: Taken) -> None:
    c = recovery.config(make_set(tmp_path / "shards"), tmp_path, "packed", run__steps=6, data__skip="3-4")
    daybreak.train(c)
    assert len(taken[0]) == 3
    assert_taken(taken, c, [1, 2, 5, 6, 7, 8])


@pytest.mark.parametrize("kill", [3, 6, 9])
def test_a_kill_before_in_and_after_a_window(shards: Path, tmp_path: Path, kill: int) -> None:
    """kill -9 in an update of a fork from step 20, whose window begins at 25; resumed, it has the same bits."""
    run = daybreak.train(straight(shards, tmp_path, run__steps=30))
    checkpoint, args = run.path / "checkpoints/step-00000020", ["--data.skip", "25-27", "--checkpoint.every", "2"]
    assert recovery.train([checkpoint, "--fork", "whole", *args])[0] == 0
    accident = {"do": "kill", "at": "call:daybreak.engine.step:Engine.update", "n": kill}
    assert recovery.train([checkpoint, "--fork", "killed", *args], accident)[0] == -9
    assert recovery.train([tmp_path / "killed"])[0] == 0
    whole, killed = daybreak.Run(tmp_path / "whole"), daybreak.Run(tmp_path / "killed")
    assert_same(whole, killed)
    assert load(whole)["samples"] == load(killed)["samples"] == 33 * ROWS
    assert curve(whole)[:4] == curve(run)[20:24]
    assert curve(whole)[4:] != curve(run)[24:]


def test_two_ranks_take_the_batches_of_one(shards: Path, tmp_path: Path) -> None:
    c = straight(shards, tmp_path, run__steps=8, data__skip="3-4,6-6", precision__compute="fp64", batch__B=2)
    one = daybreak.train(c.override({"run.name": "one"}))
    path = recovery.recipe(c.override({"run.name": "two"}), tmp_path)
    assert ranks.finish(ranks.start(2, ["train", path, "--quiet", "--parallel.zero", "1"], tmp_path)) == [0, 0]
    two = daybreak.Run(tmp_path / "two")
    assert [r["loss"] for r in two.metrics("step")] == pytest.approx([r["loss"] for r in one.metrics("step")], rel=1e-9)
    assert load(two)["samples"] == load(one)["samples"] == 11 * ROWS


def test_windows_behind_a_checkpoint_must_stay(shards: Path, tmp_path: Path) -> None:
    """A refusal writes nothing, and windows ahead may come and go."""
    run = daybreak.train(straight(shards, tmp_path, run__steps=20, data__skip="5-6,30-31", optim__horizon=40))
    toml = (run.path / "config.toml").read_bytes()
    at = 'step-00000020, which has "5-6,30-31", up to its step 20: their batches are behind it; begin new windows at '
    for skip in ("", "5-7,30-31", "4-4,5-6", "5-6,20-25"):
        for start in ({"resume": run.path}, {"fork_from": run.path}):
            name = run.config.run.name if "resume" in start else "refused"
            config = run.config.override({"data.skip": skip, "run.steps": 24, "run.name": name})
            with pytest.raises(ConfigError) as error:
                daybreak.train(config, **start)
            assert str(error.value).startswith(f'data.skip = "{skip}" must keep the windows of {run.path}'), error.value
            assert f"{at}step 21 or later, or use --fork with an older checkpoint." in str(error.value)
    assert not (tmp_path / "refused").exists()
    assert (run.path / "config.toml").read_bytes() == toml
    assert fork(run, 5, "older", data__skip="5-6,6-6", run__steps=8).config.data.skip == "5-6,6-6"
    for skip, steps in (("5-6", 21), ("5-6,22-23", 22)):
        run = daybreak.train(run.config.override({"data.skip": skip, "run.steps": steps}), resume=run.path)
    assert load(run)["samples"] == (22 + 2 + 2) * ROWS


def test_the_command_line_says_so(shards: Path, tmp_path: Path) -> None:
    run = daybreak.train(straight(shards, tmp_path, run__steps=5, optim__horizon=40))
    for args in ([run.path], [run.path, "--fork", "new"]):
        code, said = recovery.train([*args, "--data.skip", "2-3", "--steps", "9"])
        assert code == 2
        assert 'data.skip = "2-3" must keep the windows of' in said
    code, said = recovery.train([run.path, "--data.skip", "7-6", "--steps", "9"])
    assert code == 2
    assert 'data.skip = "7-6" must be windows A-B of steps' in said
