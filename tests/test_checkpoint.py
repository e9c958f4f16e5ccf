"""Checkpoints: values survive, damage is noticed, foreign files are never opened."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from snapshots import FACTS, damage, exit_of, fork, hidden, model_value, snapshot

from daybreak.errors import CheckpointError
from daybreak.manifest import list_checkpoints
from daybreak.state.checkpoint import load_checkpoint, newest_good, save_checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

FILES = ("model.safetensors", "optimizer-00000-of-00001.safetensors", "manifest.json")


# ---- save and load


def test_round_trip(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    snap = snapshot(120)
    path = save_checkpoint(root, snap)
    assert path == root / "step-00000120"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    assert hidden(root) == []

    c = load_checkpoint(path)
    assert (c.step, c.flat_numel, c.layout, c.names()) == (120, 96, snap.layout, ["wte", "lnfw"])
    assert {k: c.manifest[k] for k in snap.manifest} == snap.manifest
    assert c.manifest["format"] == 1
    for name, (shape, dtype) in {"wte": ((12, 5), torch.bfloat16), "lnfw": ((5,), torch.float64)}.items():
        out = torch.empty(shape, dtype=dtype)
        c.read_model(name, out)
        assert torch.equal(out, snap.model[name].to(dtype))
    window, filled = torch.empty(4, dtype=torch.float64), torch.empty(1, dtype=torch.int64)
    c.read_extra("loss_window", window)
    c.read_extra("filled", filled)
    assert window.tolist() == [120.0] * 4
    assert filled.item() == 120
    v = torch.empty(10)
    c.read_optimizer("v", 50, v)
    assert torch.equal(v, snap.optimizer["v"][0][1][50:60])

    with pytest.raises(CheckpointError, match=r"'wte' has shape \(12, 5\), not \(5, 12\)"):
        c.read_model("wte", torch.empty(5, 12))
    for bad in (lambda: c.read_optimizer("v", 90, v), lambda: c.read_optimizer("w", 0, v)):
        with pytest.raises(CheckpointError, match="holds no element"):
            bad()
    model = safetensors.torch.load_file(path / "model.safetensors")  # an ordinary file to everybody else
    assert torch.equal(model["wte"], snap.model["wte"])


def write_by_hand(path: Path, **changes: object) -> dict[str, object]:
    """A two-rank checkpoint of format 1 made without our code: m = 0..9 cut at 3, 4 and 7 between the ranks."""
    path.mkdir(parents=True)
    m = torch.arange(10, dtype=torch.float32)
    cuts: list[list[tuple[int, int]]] = [[(0, 3), (4, 7)], [(3, 4), (7, 10)]]
    save = safetensors.torch.save_file
    save({"w": m.view(2, 5) / 4}, path / "model.safetensors")
    for rank, ranges in enumerate(cuts):
        tensors = {f"m[{a}:{b}]": m[a:b].clone() for a, b in ranges}
        if rank == 0:
            tensors["extra.window"] = torch.ones(2)
        save(tensors, path / f"optimizer-{rank:05d}-of-00002.safetensors", {"ranges": json.dumps({"m": ranges})})
    manifest: dict[str, object] = {"format": 1, "step": 5, "world": 2, "flat_numel": 10, "layout": [["w", 0, [2, 5]]]}
    manifest["files"] = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in path.iterdir()
    }
    manifest |= {**FACTS, **changes}
    manifest = {k: v for k, v in manifest.items() if v is not None}
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def test_a_checkpoint_of_two_ranks_is_read_across_their_ranges(tmp_path):
    write_by_hand(tmp_path / "c")
    c = load_checkpoint(tmp_path / "c")
    for start in range(11):
        for stop in range(start, 11):
            out = torch.full((stop - start,), -1.0)
            c.read_optimizer("m", start, out)
            assert out.tolist() == list(range(start, stop))
    w = torch.empty(2, 5)
    c.read_model("w", w)
    assert w.flatten().tolist() == [i / 4 for i in range(10)]


@pytest.mark.parametrize(
    "changes",
    [
        {"step": None}, {"step": -1}, {"step": "5"}, {"step": True}, {"world": 1}, {"world": 3}, {"world": 0},
        {"world": 2.0}, {"flat_numel": None}, {"layout": 1}, {"layout": [["w", 0]]}, {"layout": [["w", 0, [-2]]]},
        {"layout": [[1, 0, [2]]]}, {"files": {}}, {"files": None}, {"files": []}, {"files": {"model.safetensors": 1}},
        {"files": {"model.safetensors": {"size": 1, "sha256": ""}, "../../secret": {"size": 1, "sha256": ""}}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("verify", ["full", "off"])
def test_a_manifest_that_is_sealed_but_wrong_is_refused(tmp_path, changes, verify):
    write_by_hand(tmp_path / "c", **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json (is not a manifest|lists files that are not)"):
        load_checkpoint(tmp_path / "c", verify)


def test_a_layout_names_tensors_that_the_checkpoint_has(tmp_path):
    write_by_hand(tmp_path / "c", layout=[["w", 0, [2, 5]], ["b", 10, [1]]])
    with pytest.raises(CheckpointError, match=r"manifest\.json has 'b' in its layout, and model\.safetensors does not"):
        load_checkpoint(tmp_path / "c", "off")


@pytest.mark.parametrize(
    "ranges", [None, "x", "[]", '{"m": 1}', '{"m": [[0, 4]]}', '{"m": [[0, 3, 4]]}', '{"m": [["a", 3]]}']
)
def test_ranges_must_match_the_tensors(tmp_path, ranges):
    name = "optimizer-00000-of-00002.safetensors"
    write_by_hand(tmp_path / "c")
    tensors = {"m[0:3]": torch.zeros(3), "m[0:4]": torch.zeros(3)}
    safetensors.torch.save_file(tensors, tmp_path / "c" / name, None if ranges is None else {"ranges": ranges})
    with pytest.raises(CheckpointError, match=f"{name}: its 'ranges' do not match"):
        load_checkpoint(tmp_path / "c", "off")


# ---- damage


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_noticed(tmp_path, name):
    path = save_checkpoint(tmp_path, snapshot(3))
    rng = random.Random(name)
    good = (path / name).read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(bad)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(path)
    (path / name).write_bytes(good)
    assert load_checkpoint(path).step == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", ["full", "size", "off"])
def test_truncated_grown_or_missing_files_are_noticed(tmp_path, name, verify):
    path = save_checkpoint(tmp_path, snapshot(3))
    good = (path / name).read_bytes()
    for bad in (b"", good[:7], good[: len(good) // 2], good[:-1], good + b"x"):
        (path / name).write_bytes(bad)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(path, verify)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.*No such file"):
        load_checkpoint(path, verify)
    (path / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path, verify)


def test_verify_levels_differ(tmp_path):
    path = save_checkpoint(tmp_path, snapshot(3))
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    assert load_checkpoint(path, "size").step == load_checkpoint(path, "off").step == 3
    with pytest.raises(CheckpointError, match="sha256 does not match"):
        load_checkpoint(path, "full")


def test_falls_back_to_the_newest_good_one(tmp_path, caplog):
    assert newest_good(tmp_path / "none") is None
    assert newest_good(tmp_path) is None
    paths = [save_checkpoint(tmp_path, snapshot(s)) for s in (1, 2, 3, 4)]
    assert list_checkpoints(tmp_path) == paths[::-1]
    assert newest_good(tmp_path).step == 4
    assert caplog.text == ""
    (paths[3] / "manifest.json").unlink()
    damage(paths[2])
    assert list_checkpoints(tmp_path) == [paths[2], paths[1], paths[0]]
    found = newest_good(tmp_path)
    assert found.step == 2
    first, second = (r.getMessage() for r in caplog.records)
    assert [f"Falling back to an older checkpoint: {reason}" for reason in found.passed_over] == [first, second]
    assert "step-00000004/manifest.json cannot be read (No such file" in first
    assert "step-00000003/model.safetensors is damaged" in second
    for path in paths[:2]:
        damage(path)
    with pytest.raises(CheckpointError, match="none of the 4 checkpoints") as e:
        newest_good(tmp_path)
    assert e.value.exit_code == 5


@pytest.mark.parametrize("version", [3, 10**18])
def test_a_newer_format_is_refused_not_passed_over(tmp_path, version):
    save_checkpoint(tmp_path, snapshot(1))
    path = save_checkpoint(tmp_path, snapshot(2))
    (path / "manifest.json").write_text(json.dumps({"format": version, "step": 2, "shape of things": "to come"}))
    for call in (lambda: load_checkpoint(path), lambda: newest_good(tmp_path)):
        with pytest.raises(CheckpointError, match="written by a newer daybreak") as e:
            call()
        assert e.value.exit_code == 5


@pytest.mark.parametrize("manifest", ["[]", "null", "1", "{}", '{"format": "1"}', '{"format": true}', '{"format": 1}'])
def test_a_foreign_manifest_is_refused(tmp_path, manifest):
    path = save_checkpoint(tmp_path, snapshot(2))
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json(: | is not a manifest of daybreak: | is not JSON)"):
        load_checkpoint(path, "off")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_planted_files_are_named_and_never_opened(tmp_path, caplog):
    path = save_checkpoint(tmp_path / "c", snapshot(2))
    planted = ["data.pkl", "optimizer-00001-of-00001.safetensors", "pytorch_model.bin"]
    for name in planted:
        (path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))

    def body() -> None:
        def hook(event: str, args: tuple[object, ...]) -> None:
            if (event == "open" and str(args[0]).endswith(tuple(planted))) or event.startswith("pickle."):
                os._exit(9)

        sys.addaudithook(hook)
        assert model_value(newest_good(tmp_path / "c").path) == 2

    assert exit_of(fork(body)) == 0
    assert not (tmp_path / "boom").exists()
    with caplog.at_level(logging.WARNING):
        load_checkpoint(path)
    assert [r.getMessage().split(" is not part")[0] for r in caplog.records] == [str(path / n) for n in planted]
    pickle.loads((path / "data.pkl").read_bytes())
    assert (tmp_path / "boom").exists()  # the bomb was live
