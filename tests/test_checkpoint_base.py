"""Checkpoints of runs with adapters: the base is on the disk once, and each checkpoint is complete nevertheless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from snapshots import facts
from test_finetune_runs import build, train

from daybreak.engine import Engine
from daybreak.errors import CheckpointError
from daybreak.manifest import read_manifest
from daybreak.models.adapters import is_adapter
from daybreak.state.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from daybreak.state.restore import restore, snapshot

torch.set_num_threads(1)


def save(engine: Engine, root: Path, step: int) -> Path:
    return save_checkpoint(root, snapshot(engine, step, facts(engine)))


def test_the_base_is_written_once_and_outlives_the_checkpoint_that_wrote_it(tmp_path: Path) -> None:
    engine, root = build(), tmp_path / "checkpoints"
    first = save(engine, root, 0)
    train(engine, range(2))
    second = save(engine, root, 2)
    bases = [path / "base.safetensors" for path in (first, second)]
    assert bases[0].stat().st_ino == bases[1].stat().st_ino
    found = load_checkpoint(second)
    assert set(found.names()) == set(engine.names())
    assert read_manifest(second)["format"] == 2
    entries = [read_manifest(path)["files"]["base.safetensors"] for path in (first, second)]
    assert entries[0] == entries[1]
    assert prune_checkpoints(root, 1, 0) == [first]
    assert not first.exists()
    shutil.copytree(second, tmp_path / "elsewhere" / second.name)  # a copy has a file of its own
    losses = train(engine, range(2, 4))
    for path in (second, tmp_path / "elsewhere" / second.name):
        other = build()
        other.load_params({name: torch.zeros_like(other.param(name)) for name in other.names()})
        restore(other, load_checkpoint(path))
        assert train(other, range(2, 4)) == losses


def test_another_base_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """One value in the middle of one matrix is another."""
    engine, root = build(), tmp_path
    first = save(engine, root, 0)
    engine.param("h.1.gateupw").view(-1)[engine.param("h.1.gateupw").numel() // 2] += 1
    second = save(engine, root, 1)
    assert (first / "base.safetensors").stat().st_ino != (second / "base.safetensors").stat().st_ino
    out = torch.empty_like(engine.param("h.1.gateupw"))
    load_checkpoint(second).read_model("h.1.gateupw", out)
    assert torch.equal(out, engine.param("h.1.gateupw"))
    load_checkpoint(first).read_model("h.1.gateupw", out)
    assert not torch.equal(out, engine.param("h.1.gateupw"))


def test_a_base_in_doubt_is_written_again(tmp_path: Path) -> None:
    """A shortened file, and one that its manifest does not list."""
    engine = build()
    first = save(engine, tmp_path, 0)
    (first / "base.safetensors").write_bytes((first / "base.safetensors").read_bytes()[:-8])
    second = save(engine, tmp_path, 1)
    assert load_checkpoint(second).step == 1
    with pytest.raises(CheckpointError, match=r"base\.safetensors has \d+ bytes instead of"):
        load_checkpoint(first)
    data = bytearray((second / "base.safetensors").read_bytes())
    data[-1] ^= 1
    (second / "base.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"base\.safetensors is damaged"):
        load_checkpoint(second)


def test_a_run_without_adapters_has_no_base(tmp_path: Path) -> None:
    """So an older daybreak reads its checkpoints, and it says of the others that they are newer."""
    engine = build()
    path = save(engine, tmp_path, 0)
    assert {name for name in load_checkpoint(path).names() if is_adapter(name)}
    plain = Engine(engine.spec.__class__(engine.cfg, B=1, T=4))
    without = save(plain, tmp_path / "plain", 0)
    assert json.loads((without / "manifest.json").read_text())["format"] == 1
    assert not (without / "base.safetensors").exists()
