"""Checkpoints: values survive, damage is noticed, a kill at any moment loses nothing that was saved."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from daybreak.errors import CheckpointError, Error
from daybreak.state.checkpoint import (
    Snapshot,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    newest_good,
    prune_checkpoints,
    save_checkpoint,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

FILES = ("model.safetensors", "optimizer-00000-of-00001.safetensors", "manifest.json")


def snapshot(step: int, value: float | None = None, numel: int = 96) -> Snapshot:
    """Every number in it follows from `value` (default: the step)."""
    base = torch.arange(numel, dtype=torch.float32) + (step if value is None else value)
    return Snapshot(
        step=step,
        model={"wte": base[:60].view(12, 5), "lnfw": base[64:69]},
        optimizer={"m": [(0, base * 2)], "v": [(0, base * 3)]},
        flat_numel=numel,
        layout=[("wte", 0, (12, 5)), ("lnfw", 64, (5,))],
        extra={"loss_window": torch.full((4,), float(base[0]), dtype=torch.float64), "filled": torch.tensor([step])},
        manifest={"samples": 7 * step, "config": {"optim": {"lr": 0.0006}}, "rng": [1, 2**63]},
    )


def model_value(path: Path) -> float:
    out = torch.empty(12, 5)
    load_checkpoint(path).read_model("wte", out)
    assert torch.equal(out, torch.arange(60, dtype=torch.float32).view(12, 5) + out[0, 0])
    return out[0, 0].item()


def contents(root: Path) -> dict[int, float]:
    """Step -> value of every listed checkpoint, each read and verified in full."""
    return {load_checkpoint(path).step: model_value(path) for path in list_checkpoints(root)}


def hidden(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name.startswith("."))


def fork(body: Callable[[], None]) -> int:
    """A real process that runs `body` and exits 0, or 1 on an exception. Returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def exit_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
    manifest |= changes
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
    with pytest.raises(CheckpointError, match=r"manifest\.json lacks a field of format 1, or holds one of the wrong"):
        load_checkpoint(tmp_path / "c", verify)


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


def damage(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


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
    assert newest_good(tmp_path).step == 2
    first, second = (r.getMessage() for r in caplog.records)
    assert "step-00000004/manifest.json cannot be read (No such file" in first
    assert "step-00000003/model.safetensors is damaged" in second
    for path in paths[:2]:
        damage(path)
    with pytest.raises(CheckpointError, match="none of the 4 checkpoints") as e:
        newest_good(tmp_path)
    assert e.value.exit_code == 5


@pytest.mark.parametrize("version", [2, 10**30])
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
    with pytest.raises(CheckpointError, match="not a daybreak manifest"):
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


# ---- retention


@pytest.mark.parametrize(
    ("steps", "keep", "major", "left"),
    [
        ([1, 2, 3], 0, 0, [1, 2, 3]),
        ([1, 2, 3], 0, 2, [1, 2, 3]),
        ([1, 2, 3], 1, 0, [3]),
        ([1, 2, 3], 2, 0, [2, 3]),
        ([1, 2, 3], 3, 0, [1, 2, 3]),
        ([1, 2, 3], 9, 0, [1, 2, 3]),
        ([100, 200, 300, 400, 450], 1, 200, [200, 400, 450]),
        ([100, 200, 300, 400, 450], 2, 200, [200, 400, 450]),
        ([100, 200, 300, 400, 450], 3, 200, [200, 300, 400, 450]),
        ([0, 7, 14], 1, 5, [0, 14]),
        ([5], 1, 0, [5]),
        ([], 1, 0, []),
        ([99999999, 100000000], 1, 0, [100000000]),
    ],
)
def test_retention(tmp_path, steps, keep, major, left):
    for step in steps:
        save_checkpoint(tmp_path, snapshot(step))
    removed = prune_checkpoints(tmp_path, keep, major)
    kept = [tmp_path / f"step-{s:08d}" for s in sorted(left, reverse=True)]
    assert list_checkpoints(tmp_path) == kept
    assert sorted(p.name for p in removed) == [f"step-{s:08d}" for s in sorted(set(steps) - set(left))]
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_retention_never_removes_the_newest_good_one(tmp_path, caplog):
    paths = [save_checkpoint(tmp_path, snapshot(s)) for s in (1, 2, 3)]
    damage(paths[2])
    assert prune_checkpoints(tmp_path, keep=1, major=0) == [paths[0]]
    assert "step-00000003 is damaged" in caplog.text
    damage(paths[1])
    assert prune_checkpoints(tmp_path, keep=1, major=0) == []
    assert list_checkpoints(tmp_path) == [paths[2], paths[1]]


@pytest.mark.parametrize("verify", ["full", "size", "off"])
def test_retention_after_a_fall_back_spares_what_was_just_saved(tmp_path, verify):
    paths = [save_checkpoint(tmp_path, snapshot(s)) for s in (100, 200, 300)]
    damage(paths[2])
    assert newest_good(tmp_path).step == 200
    mended = save_checkpoint(tmp_path, snapshot(250))
    assert prune_checkpoints(tmp_path, keep=1, major=0, verify=verify) == paths[:2]
    assert newest_good(tmp_path).path == mended


def test_leftovers_of_dead_saves_are_cleaned_and_those_of_live_ones_kept(tmp_path):
    dead = fork(lambda: None)
    assert exit_of(dead) == 0
    sleeper = fork(signal.pause)
    save_checkpoint(tmp_path, snapshot(8))
    save_checkpoint(tmp_path, snapshot(9, value=1.0)).rename(tmp_path / f".old-step-00000009-{dead}")
    for name in (f".tmp-step-00000007-{dead}", f".tmp-step-00000007-{sleeper}", f".old-step-00000008-{dead}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-mine").mkdir()

    assert [p.name for p in list_checkpoints(tmp_path)] == [f".old-step-00000009-{dead}", "step-00000008"]
    assert newest_good(tmp_path).step == 9
    assert [checkpoint_step(p) for p in list_checkpoints(tmp_path)] == [9, 8]
    assert prune_checkpoints(tmp_path, keep=0, major=0) == []
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000008"]
    assert hidden(tmp_path) == sorted([".tmp-mine", f".tmp-step-00000007-{sleeper}"])
    os.kill(sleeper, signal.SIGKILL)
    assert exit_of(sleeper) == -signal.SIGKILL


# ---- crashes


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, snapshot(5))
    path = save_checkpoint(tmp_path, snapshot(5, value=50.0))
    assert model_value(path) == 50.0
    assert hidden(tmp_path) == []
    assert list_checkpoints(tmp_path) == [path]


def test_a_full_disk_is_one_sentence_and_leaves_no_trace(tmp_path):
    save_checkpoint(tmp_path, snapshot(1))

    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(Error, match=f"step-00000002 could not be written .{os.strerror(errno.EFBIG)}.: free") as e:
            save_checkpoint(tmp_path, snapshot(2, numel=4096))
        assert e.value.exit_code == 1

    assert exit_of(fork(body)) == 0
    assert hidden(tmp_path) == []
    assert newest_good(tmp_path).step == 1


FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def test_a_kill_before_any_file_operation_loses_nothing(tmp_path):
    """The same save, re-save and pruning, killed before its 1st, 2nd, ... file operation until it gets through."""

    def scenario(root: Path, fatal: int) -> None:
        count = 0

        def hook(event: str, args: object) -> None:
            nonlocal count
            count += event in FILE_EVENTS
            if event in FILE_EVENTS and count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save_checkpoint(root, snapshot(2, value=22.0))
        save_checkpoint(root, snapshot(3))
        prune_checkpoints(root, keep=1, major=0)

    start = tmp_path / "start"
    for step in (1, 2):
        save_checkpoint(start, snapshot(step))
    outcomes: list[dict[int, float]] = []
    status, fatal = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        fatal += 1
        root = tmp_path / str(fatal)
        shutil.copytree(start, root)
        status = exit_of(fork(lambda root=root, fatal=fatal: scenario(root, fatal)))
        found = contents(root)
        prune_checkpoints(root, keep=0, major=0)
        assert contents(root) == found
        assert hidden(root) == []
        if found not in outcomes:
            outcomes.append(found)
    assert status == 0
    assert fatal > 30
    old, new = {1: 1.0, 2: 2.0}, {1: 1.0, 2: 22.0}
    assert outcomes == [old, new, new | {3: 3.0}, {2: 22.0, 3: 3.0}, {3: 3.0}]


def test_ten_kills_at_random_moments(tmp_path):
    rng = random.Random(4)
    leftovers = 0
    for round_ in range(10):
        read, write = os.pipe()
        first = 100 * round_

        def saves(write: int = write, first: int = first) -> None:
            for step in range(first, first + 100):
                save_checkpoint(tmp_path, snapshot(step, numel=1 << 20))
                os.write(write, struct.pack("<q", step))
                prune_checkpoints(tmp_path, keep=2, major=0)

        pid = fork(saves)
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(pid, signal.SIGKILL)
        assert exit_of(pid) == -signal.SIGKILL
        os.close(write)
        acknowledged = [s for (s,) in struct.iter_unpack("<q", os.read(read, 1 << 16))]
        os.close(read)
        leftovers += bool(hidden(tmp_path)) if tmp_path.exists() else 0
        assert all(step == value for step, value in contents(tmp_path).items())
        if acknowledged:
            assert newest_good(tmp_path).step >= acknowledged[-1]
    assert leftovers >= 3  # the kills did land inside saves
    prune_checkpoints(tmp_path, keep=1, major=0)
    assert hidden(tmp_path) == []
    assert len(list_checkpoints(tmp_path)) == 1
