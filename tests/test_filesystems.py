"""File systems that cannot lock or flush folders: a warning, and the run goes on. Those that never answer end it.

fsync of a folder in /proc really fails (EINVAL). For flock no such file system can be had here: the call is replaced.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE
from recovery import config, exit_code, make_shards

import daybreak
from daybreak import files
from daybreak.cli.main import main
from daybreak.errors import ConfigError
from daybreak.files import fsync_folder, lock, locked


@pytest.fixture(autouse=True)
def forget() -> None:
    files._warn_unable.cache_clear()


def test_a_folder_that_cannot_be_flushed_is_a_warning(caplog):
    for _ in range(3):
        fsync_folder(Path("/proc/self"))
    lost = "so a power cut may lose what was saved (Invalid argument)"
    said = f"This file system cannot flush files or folders, {lost}."
    assert [r.getMessage() for r in caplog.records] == [said]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_run_without_locks_and_fsync(tmp_path, monkeypatch, caplog, code):
    data = make_shards(tmp_path / "data")
    straight = daybreak.train(config(data, tmp_path, "straight", run__steps=10))

    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    part = daybreak.train(config(data, tmp_path, "r", run__steps=5, optim__horizon=10))
    run = daybreak.train(part.config.override({"run.steps": 10}), resume=part.path)
    assert [(r["step"], r["loss"]) for r in run.metrics("step")] == [
        (r["step"], r["loss"]) for r in straight.metrics("step")
    ]
    assert main(["doctor", str(run.path)]) == 0
    said = [r.getMessage() for r in caplog.records if "This file system" in r.getMessage()]
    assert sorted(said) == sorted(set(said))
    assert {text.split(",")[0] for text in said} == {
        "This file system cannot lock", "This file system cannot flush files or folders"
    }  # fmt: skip


def test_other_failures_still_count(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with locked(tmp_path, ConfigError("busy")) as fd:
        monkeypatch.setattr(os, "fsync", fail)
        monkeypatch.setattr(fcntl, "flock", fail)
        with pytest.raises(OSError, match="Input/output error"):
            fsync_folder(tmp_path)
        with pytest.raises(OSError, match="Input/output error"):
            lock(fd, fcntl.LOCK_EX)
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="busy"), locked(tmp_path, ConfigError("busy")):
            pass


def test_a_lock_that_another_has_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    """`watch` takes a killed run's lock to see that nobody has it, and a restart may come at that instant."""
    other = os.open(tmp_path, os.O_RDONLY)
    assert lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        os.close(other)

    monkeypatch.setattr(files.time, "sleep", wait)
    with locked(tmp_path, ConfigError("busy")):
        assert len(waited) == 1


def test_a_hung_run_ends_though_its_disk_never_answers(tmp_path):
    """A pipe that nobody reads is in the place of crash.txt: to open it takes forever, as on a dead file server."""
    os.mkfifo(tmp_path / "crash.txt")
    code = """
import sys, time
from pathlib import Path
from daybreak.state.run_folder import RunFolder
from daybreak.training import watchdog

watchdog.PATIENCE = 0.5
with watchdog.Watchdog(RunFolder(Path(sys.argv[1])), lambda: 1, 5, 0.2) as dog:
    for _ in range(watchdog.ARMED):
        dog.step(0.01)
    time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], timeout=PATIENCE, capture_output=True, text=True)
    assert done.returncode == exit_code(tmp_path) == 7
    reason = json.loads((tmp_path / "exit.json").read_text())["reason"]
    assert reason.startswith("nothing happened for ")
    assert done.stderr.strip() == f"daybreak: {reason}"
