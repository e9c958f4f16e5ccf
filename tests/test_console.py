"""A console, a log or a reader that goes away: training goes on and saves, other verbs end quietly. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE
from recovery import CHILD, config, exit_code, make_shards, recipe, wait_for

import daybreak

DAYBREAK = [sys.executable, "-m", "daybreak"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


def shell(line: str, where: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`daybreak LINE` in bash, which ends with the exit code of daybreak itself whatever it is piped to."""
    script = f'd() {{ {" ".join(DAYBREAK)} "$@"; }}; d {line}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", script], cwd=where, env=ENV | more, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize("to", ["2>&1 | head -n 1 >/dev/null", ">/dev/full 2>&1", ">&- 2>&-", "2>&1 | (exec <&-)"])
def test_a_run_whose_console_breaks_is_whole(shards: Path, tmp_path: Path, to: str) -> None:
    target = recipe(config(shards, tmp_path, "r", run__steps=12), tmp_path)
    done = shell(f"train {target} {to}", tmp_path)
    assert (done.returncode, exit_code(tmp_path / "r")) == (0, 0)
    run = daybreak.Run(tmp_path / "r")
    assert run.checkpoint().step == len(run.metrics("step")) == 12


def test_a_result_that_cannot_be_printed_is_in_the_folder(shards: Path, tmp_path: Path) -> None:
    target = recipe(config(shards, tmp_path, "r", run__steps=2), tmp_path)
    done = shell(f"train {target} --quiet --json >/dev/full", tmp_path)
    assert done.returncode == 0
    assert done.stderr == (
        f"standard output cannot be written (No space left on device); the result is in {tmp_path}/r.\n"
    )


def test_ctrl_c_while_tee_dies_saves(shards: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the pipe: the reader is gone before the run says that it stops."""
    target = recipe(config(shards, tmp_path, "r", run__steps=100000), tmp_path)
    reader, writer = os.pipe()
    process = subprocess.Popen([*DAYBREAK, "train", target], env=ENV, stdout=writer, stderr=writer)
    os.close(writer)
    tee = subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.DEVNULL)
    os.close(reader)
    wait_for(tmp_path / "r", process, 5)
    tee.kill()
    tee.wait()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == exit_code(tmp_path / "r") == 75
    run = daybreak.Run(tmp_path / "r")
    assert run.checkpoint().step == run.metrics("step")[-1]["step"]


def test_the_watchdog_survives_its_console(shards: Path, tmp_path: Path) -> None:
    target = recipe(
        config(shards, tmp_path, "h", run__steps=100, guard__hang_factor=5, guard__hang_seconds=1), tmp_path
    )
    accident = json.dumps({"do": "hang", "at": "call:daybreak.engine.step:Engine.micro_step", "n": 60})
    with open("/dev/full", "w") as full:
        command = [sys.executable, CHILD, accident, "train", target]
        done = subprocess.run(command, env=ENV, stdout=full, stderr=full, timeout=PATIENCE)
    assert done.returncode == exit_code(tmp_path / "h") == 7
    assert "in happen" in (tmp_path / "h/crash.txt").read_text()


VERBS = [
    "--help",
    "--version",
    "plan tiny",
    "train tiny --print-config",
    "train --help",
    "doctor",
    "report r",
    "nosuch",
]


def test_a_reader_that_leaves_is_no_error(tmp_path: Path, shards: Path) -> None:
    daybreak.train(config(shards, tmp_path, "r", run__steps=2))
    for verb in [*VERBS[:-1], "sample r --tokens 9"]:
        done = shell(f"{verb} | (exec <&-)", tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), verb


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_result_on_a_full_disk_is_one_sentence(tmp_path: Path, buffered: str) -> None:
    for verb in VERBS[:4] if buffered else VERBS[2:3]:
        done = shell(f"{verb} >/dev/full", tmp_path, PYTHONUNBUFFERED=buffered)
        said = (
            "daybreak: standard output failed (No space left on device); free space or repair the disk, then run the "
            "same command again.\n"
        )
        assert (done.returncode, done.stderr) == (1, said)


def test_closed_streams_take_nothing_and_write_nowhere(tmp_path: Path) -> None:
    """With stderr closed its messages must not go to stdout, nor its number to the next file that is opened."""
    done = shell("nosuch 2>&-", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    code = "import os, sys; from daybreak.console import guard_streams; guard_streams(True); "
    code += "print(os.dup(0) > 2, sys.stdin is not None)"  # chat asks it whether it is a terminal
    for closed in ("2>&-", "<&-", "0<&- 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f'"{sys.executable}" -c "{code}" {closed}'], env=ENV, capture_output=True, text=True
        )
        assert done.stdout == "True True\n", (closed, done.stderr)


def test_a_console_that_cannot_show_a_letter(tmp_path: Path) -> None:
    command = [*DAYBREAK, "train", "tiny", "--name", "é語", "--print-config"]
    done = subprocess.run(command, env=ENV | {"PYTHONIOENCODING": "latin-1:strict"}, capture_output=True, check=True)
    assert 'name = "é\\u8a9e"'.encode("latin-1") in done.stdout
