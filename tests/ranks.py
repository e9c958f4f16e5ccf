"""Real processes that train together: start them, wait for them, read what they say.

They are forked from a server that has imported everything once, which a fresh interpreter takes seconds for. `python`
is for tests of what an interpreter itself does.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import recovery_child
from patience import PATIENCE

Run = Callable[[list[str]], int]
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "PYTHONWARNINGS": "ignore"}
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["pytest", "torch.distributed", "daybreak.cli.main", "daybreak.llmc", "daybreak.training.loop"]
)


def free_port() -> int:
    """A port nobody listens at, below those that the system gives to whoever asks for any."""
    while True:
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port := random.randrange(20000, 32000)))
            return port


def environment(rank: int, world: int, port: int, **more: str) -> dict[str, str]:
    own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {k: str(v) for k, v in own.items()} | more


# ---- what a rank does: functions of its arguments


def daybreak(args: list[str]) -> int:
    """The command line."""
    from daybreak.cli.main import main

    return main(args)


def llmc(args: list[str]) -> int:
    """llm.c's command line."""
    from daybreak.llmc import main

    return main(args)


def llmc_at(args: list[str]) -> int:
    """The same, ARGS[1:], whose ranks meet at the port ARGS[0] of an address."""
    with patch("daybreak.llmc.PORT", args[0]):
        return llmc(args[1:])


def accident(args: list[str]) -> int:
    """`daybreak ARGS[1:]` with an accident on the way: the JSON in ARGS[0], see recovery_child."""
    recovery_child.Accident(**json.loads(args[0]))
    return daybreak(args[1:])


def out_of_memory(args: list[str]) -> int:
    """`daybreak ARGS[1:]` whose fifth update fails with the text ARGS[0]."""
    from daybreak.engine import Engine

    update, calls = Engine.update, itertools.count(1)

    def failing(engine: Engine) -> Any:
        if next(calls) == 5:
            raise RuntimeError(args[0])
        return update(engine)

    with patch.object(Engine, "update", failing):
        return daybreak(args[1:])


def small_files(args: list[str]) -> int:
    """`daybreak ARGS` on a disk that takes no file above 30 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
    return daybreak(args)


# ---- processes


class Forked:
    """A forked process with the methods of subprocess.Popen that tests use; its output goes to one file or to two."""

    stderr: Any = None  # the second file, where who started it has opened it

    def __init__(
        self, run: Run, args: list[str], cwd: Path, out: Path, env: Mapping[str, str], err: Path | None = None
    ) -> None:
        with patch.dict(os.environ, QUIET):
            forkserver.ensure_running()
        arguments = (run, args, str(cwd), str(out), str(err or ""), dict(env))
        self._process = FORK.Process(target=_begin, args=arguments, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)


def _begin(run: Run, args: list[str], cwd: str, out: str, err: str, env: dict[str, str]) -> None:
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if err else 1, 2)
    os.chdir(cwd)
    os.environ.update(env)
    sys.exit(run(args))


STARTED: list[Any] = []


def end_all() -> None:
    """End what a failed test left running."""
    for p in STARTED:
        if p.poll() is None:
            p.kill()
            p.wait()
    STARTED.clear()


def start(
    world: int, args: list[Any], cwd: Path, ranks: range | None = None, run: Run = daybreak, **more: Any
) -> list[Any]:
    """Start ranks of one launch of `run(ARGS)`; each one's output is in CWD/rank-N.txt."""
    port = int(more.pop("port", 0)) or free_port()
    made = []
    for rank in ranks if ranks is not None else range(world):
        env = environment(rank, world, port, **more)
        made.append(Forked(run, [str(arg) for arg in args], cwd, cwd / f"rank-{rank}.txt", env))
    STARTED.extend(made)
    return made


def alone(args: list[Any], cwd: Path, run: Run = daybreak, err: Path | None = None) -> Forked:
    """Start one process of `run(ARGS)` that is no rank; it says nothing, but its stderr may go to a file."""
    STARTED.append(Forked(run, list(map(str, args)), cwd, Path(os.devnull), os.environ, err))
    return STARTED[-1]


def python(args: list[Any], cwd: Path, out: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start an interpreter, `python ARGS`; its output is in CWD/OUT."""
    line = [sys.executable, *map(str, args)]
    with open(cwd / out, "w") as file:
        env = os.environ | QUIET | env
        STARTED.append(subprocess.Popen(line, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT))
    return STARTED[-1]


def finish(processes: list[Any], seconds: float = PATIENCE) -> list[int]:
    """Their exit codes; whatever still runs after `seconds` is killed."""
    deadline = time.monotonic() + seconds
    try:
        return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.wait()


def said(cwd: Path, rank: int) -> str:
    return (cwd / f"rank-{rank}.txt").read_text()
