"""Checkpoints come and go: retention, replacement, and kills at any moment, which lose nothing that was saved."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from snapshots import contents, damage, exit_of, fork, hidden, model_value, snapshot

from daybreak.errors import Error
from daybreak.manifest import checkpoint_step, list_checkpoints
from daybreak.state.checkpoint import newest_good, prune_checkpoints, save_checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


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


@pytest.fixture
def sleeper():
    """The id of a live process that is not ours to judge."""
    pid = fork(signal.pause)
    yield pid
    os.kill(pid, signal.SIGKILL)
    assert exit_of(pid) == -signal.SIGKILL


def test_leftovers_of_dead_saves_are_cleaned_and_those_of_live_ones_kept(tmp_path, sleeper):
    dead = fork(lambda: None)
    assert exit_of(dead) == 0
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
        with pytest.raises(Error, match=f"step-00000002 could not be written .{os.strerror(errno.EFBIG)}.; free") as e:
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


def test_kills_at_random_moments(tmp_path):
    """Ten, or more on a busy machine: until three killed a save, and one save came to its end."""
    rng = random.Random(4)
    leftovers = 0
    for round_ in range(200):
        if round_ >= 10 and leftovers >= 3 and list_checkpoints(tmp_path):
            break
        read, write = os.pipe()
        first = 100 * round_

        def saves(write: int = write, first: int = first) -> None:
            os.write(write, b"saving")  # a busy machine may be slow to begin
            for step in range(first, first + 100):
                save_checkpoint(tmp_path, snapshot(step, numel=1 << 20))
                os.write(write, struct.pack("<q", step))
                prune_checkpoints(tmp_path, keep=2, major=0)

        pid = fork(saves)
        assert os.read(read, 6) == b"saving"
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
    assert leftovers >= 3  # kills did land inside saves
    prune_checkpoints(tmp_path, keep=1, major=0)
    assert hidden(tmp_path) == []
    assert len(list_checkpoints(tmp_path)) == 1
