"""SIGKILL at every phase of a save and at random moments: `train` again ends with the bits of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import ranks
from patience import PATIENCE
from recovery import assert_intact, assert_same, config, make_shards, recipe, spawn, train

import daybreak
from daybreak.manifest import list_checkpoints

STEPS = 150
# The very start, then every phase of a save. The second save of a process is hit: it has an older one to lose.
PHASES = {
    "the run's first file": ("audit:os.rename:config.toml", 1),
    "before the copy": ("call:daybreak.state.restore:Staging.take", 2),
    "after the copy": ("after:daybreak.state.restore:Staging.take", 2),
    "metrics on disk": ("call:daybreak.state.metrics:Lines.sync", 2),
    "temporary folder": ("audit:os.mkdir:tmp-step", 2),
    "model opened": ("audit:open:tmp-step.*model.safetensors.*'x'", 2),
    "model half written": ("after:daybreak.state.safetensors_io:_header", 3),
    "model written": ("audit:open:tmp-step.*optimizer.*'x'", 2),
    "optimizer half written": ("after:daybreak.state.safetensors_io:_header", 4),
    "manifest begun": ("audit:open:tmp-step.*manifest", 2),
    "manifest written": ("after:daybreak.state.checkpoint:_write_manifest", 2),
    "published, in memory": ("audit:os.rename:tmp-step.*/step-", 2),
    "published": ("after:daybreak.state.checkpoint:_publish", 2),
    "an old one leaves": ("audit:os.rename:/step-.*tmp-step", 1),
    "an old one half gone": ("audit:os.remove:model.safetensors", 1),
    "saved, before it is said": ("call:daybreak.training.loop:MetricsWriter.write", 21),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> daybreak.Run:
    """Never disturbed; and saved by the other way, while training waits."""
    runs = tmp_path_factory.mktemp("straight")
    return daybreak.train(config(shards, runs, "straight", run__steps=STEPS, checkpoint__background=False))


def finish(folder: Path, straight: daybreak.Run, args: list[Path] | None = None) -> None:
    code, err = train(args or [folder])
    assert code == 0, err
    assert_intact(folder)
    assert_same(straight, daybreak.Run(folder))


def kill_again_and_again(
    accidents: Iterable[dict[str, object] | float], wanted: int, shards: Path, tmp_path: Path, straight: daybreak.Run,
    full: bool,
) -> int:  # fmt: skip
    """One run, killed by `wanted` of the accidents (a float: after so many seconds, if it is not over by then). How
    many kills there were."""
    folder, args = tmp_path / "killed", [recipe(config(shards, tmp_path, "killed", run__steps=STEPS), tmp_path)]
    kills = 0
    for number, accident in enumerate(accidents):
        if kills == wanted:
            break
        if (folder / "exit.json").exists():  # it got through: begin another
            assert_same(straight, daybreak.Run(folder))
            shutil.rmtree(folder)
            args = [recipe(config(shards, tmp_path, "killed", run__steps=STEPS), tmp_path)]
        if isinstance(accident, float):
            process = spawn(args)
            time.sleep(accident)
            process.kill()
            (_, err), code = process.communicate(timeout=PATIENCE), process.returncode
        else:
            code, err = train(args, accident)
        assert code == -9 or (isinstance(accident, float) and code == 0), (accident, err)
        kills += code == -9
        if (folder / "config.toml").exists():
            assert_intact(folder)
            args = [folder]
            if full:
                shutil.copytree(folder, tmp_path / f"{number}" / "killed")
                finish(tmp_path / f"{number}" / "killed", straight)
                shutil.rmtree(tmp_path / f"{number}")
    finish(folder, straight, args)
    assert not list((folder / "checkpoints").glob(".*"))
    return kills


def test_a_kill_in_every_phase_of_a_save(shards, tmp_path, straight, full, figures):
    accidents = [{"do": "kill", "at": at, "n": n} for at, n in list(PHASES.values())[:: 1 if full else 2]]
    kills = kill_again_and_again(accidents, len(accidents), shards, tmp_path, straight, full)
    assert kills == len(accidents) >= 8
    figures["kills, one in each phase of a save"] = kills
    assert len(list_checkpoints(straight.path / "checkpoints")) == 2


def test_kills_at_random_moments(shards, tmp_path, straight, full, figures):
    rng, wanted = random.Random(7), 50 if full else 5
    moments = (rng.uniform(1.0, 3.5) for _ in range(8 * wanted))
    kills = kill_again_and_again(moments, wanted, shards, tmp_path, straight, full)
    assert kills == wanted
    figures["kills at random moments"] = kills


# Shared keys, a window, QK-norm and biases.
DECODER = {"arch": "llama", "L": 2, "NKV": 1, "HS": 8, "F": 24, "layers": "fw", "window": 5, "tied": False}
DECODER |= {"qk_norm": True, "qkv_bias": True, "mlp_bias": True}


def test_kills_while_a_decoder_trains(shards, tmp_path, figures):
    """In the middle of a backward pass, then in the middle of a save."""
    keys = {f"model__{key}": value for key, value in DECODER.items()} | {"run__steps": 40}
    straight = daybreak.train(config(shards, tmp_path, "straight", **keys))
    assert straight.config.model.arch == "llama"
    folder, args = tmp_path / "killed", [recipe(config(shards, tmp_path, "killed", **keys), tmp_path)]
    for at, n in (("after:daybreak.models.llama:Llama.block_backward", 70),
                  ("after:daybreak.state.safetensors_io:_header", 4)):  # fmt: skip
        code, err = train(args, {"do": "kill", "at": at, "n": n})
        assert code == -9, err
        assert 0 <= assert_intact(folder) < 40  # a busy machine may not have saved often
        args = [folder]
    finish(folder, straight)
    assert not list((folder / "checkpoints").glob(".*"))
    figures["kills while a decoder trains"] = 2


# ---- several ranks write one checkpoint

SHARED = [  # (rank, where); the first three in `make test`
    (0, "after:daybreak.state.checkpoint:create_safetensors"),
    (1, "call:daybreak.state.checkpoint:_write_optimizer"),  # its part of the model is in the shared file
    (0, "audit:os.rename:tmp-step.*/step-"),
    (1, "call:daybreak.state.checkpoint:fill_safetensors"),
    (1, "after:daybreak.state.checkpoint:_write_optimizer"),
    (0, "after:daybreak.state.checkpoint:fill_safetensors"),
    (0, "audit:open:tmp-step.*manifest"),
    (0, "after:daybreak.state.checkpoint:_write_manifest"),
    (0, "after:daybreak.state.checkpoint:_publish"),
]


def two_ranks(args: list[object], cwd: Path, accident: tuple[int, str] | None = None) -> list[int]:
    """Exit codes of two ranks that train; one is killed in the second save of its life."""
    port, made = str(ranks.free_port()), []
    for rank in (0, 1):
        line, run = ["train", *args, "--quiet"], ranks.daybreak
        if accident is not None and accident[0] == rank:
            line, run = [json.dumps({"do": "kill", "at": accident[1], "n": 2}), *line], ranks.accident
        made += ranks.start(2, line, cwd, range(rank, rank + 1), port=port, run=run)
    return ranks.finish(made)


def test_a_kill_of_one_of_two_ranks_inside_a_save(shards, tmp_path, full, figures):
    made = config(shards, tmp_path, "straight", run__steps=150 if full else 40, parallel__timeout=30)
    assert two_ranks([recipe(made, tmp_path)], tmp_path) == [0, 0]
    folder, args = tmp_path / "killed", [recipe(made.override({"run.name": "killed"}), tmp_path)]
    points = SHARED if full else SHARED[:3]
    for rank, at in points:
        codes = two_ranks(args, tmp_path, (rank, at))
        assert (codes[rank], codes[1 - rank]) == (-9, 1), (at, ranks.said(tmp_path, 1 - rank))
        assert assert_intact(folder) >= 5
        args = [folder]
    assert two_ranks(args, tmp_path) == [0, 0], ranks.said(tmp_path, 0)
    assert_intact(folder)
    assert_same(daybreak.Run(tmp_path / "straight"), daybreak.Run(folder))
    assert not list((folder / "checkpoints").glob(".*"))
    figures["kills of one of two ranks inside a save"] = len(points)
